"""Controls: drafting by rote, without looking at the scene, and with the answer in hand."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from xsd.decoding.accept import Draft, accepted_prefix_length

Ids = tuple[int, ...]


def commonest_answers(answers: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Ids]:
    """``(question, ids)`` of a training set -> its commonest answer to every question.

    Ties go to the answer that shares the longest opening with others, then to the first in order:
    among answers that are all different that is the fairest template.
    """
    by_question: defaultdict[str, Counter[Ids]] = defaultdict(Counter)
    for question, ids in answers:
        by_question[question][tuple(ids)] += 1
    return {question: _fairest(counts) for question, counts in by_question.items()}


def _fairest(counts: Counter[Ids]) -> Ids:
    top = max(counts.values())
    openings: Counter[Ids] = Counter()
    for ids, number in counts.items():
        for size in range(1, min(len(ids), 8) + 1):
            openings[ids[:size]] += number

    def shared(ids: Ids) -> int:
        return sum(openings[ids[:size]] for size in range(1, min(len(ids), 8) + 1))

    candidates = [ids for ids, number in counts.items() if number == top]
    return max(sorted(candidates), key=shared)


class NGramTable:
    """The likeliest next token after the last ``order - 1``, backing off to shorter contexts."""

    def __init__(self, order: int = 5) -> None:
        self.order = order
        self._counts: list[defaultdict[Ids, Counter[int]]] = [
            defaultdict(Counter) for _ in range(order)
        ]
        self._best: dict[Ids, tuple[int, float]] = {}
        self._chains: dict[Ids, tuple[list[int], list[float]]] = {}

    def fit(self, answers: Iterable[tuple[Sequence[int], Sequence[int]]]) -> NGramTable:
        """``(prompt ids, answer ids)``: the prompt's tail is the first tokens' context."""
        for prompt, answer in answers:
            ids = [*prompt[-(self.order - 1) :], *answer]
            for position in range(len(ids) - len(answer), len(ids)):
                for size in range(min(self.order, position + 1)):
                    context = tuple(ids[position - size : position])
                    self._counts[size][context][ids[position]] += 1
        for table in self._counts:
            for context, counter in table.items():
                token = counter.most_common(1)[0][0]
                self._best[context] = token, self.chance(context, token)
        return self

    def chance(self, context: Ids, token: int) -> float:
        """How probable a token is after a ``context``: Witten and Bell's interpolation of its share
        with its chance after shorter contexts. What was seen once is not thought certain."""
        chance = 0.0
        for size in range(len(context) + 1):
            seen = self._counts[size].get(context[len(context) - size :])
            if seen is None:
                break
            chance = (seen[token] + len(seen) * chance) / (seen.total() + len(seen))
        return chance

    def draft(self, ids: Sequence[int], length: int) -> list[int]:
        """``length`` tokens after ``ids``, each from the longest context that was seen."""
        return self.chain(ids, length)[0]

    def chain(self, ids: Sequence[int], length: int) -> tuple[list[int], list[float]]:
        """The same, and how probable each is; a chain behind a context is made once."""
        context = self.context(ids)
        tokens, chances = self._chains.setdefault(context, ([], []))
        while len(tokens) < length:
            found = self._following(self.context((*context, *tokens)))
            if found is None:
                break
            tokens.append(found[0])
            chances.append(found[1])
        return tokens[:length], chances[:length]

    def context(self, ids: Sequence[int]) -> Ids:
        """What of ``ids`` the next token is looked up behind."""
        return tuple(ids[max(0, len(ids) - self.order + 1) :])

    def _following(self, context: Ids) -> tuple[int, float] | None:
        """The token after it, and how probable it is; None: nothing was ever seen."""
        for start in range(len(context) + 1):
            if (found := self._best.get(context[start:])) is not None:
                return found
        return None


def template_prefix(
    templates: Mapping[str, Ids], answers: Iterable[tuple[str, Sequence[int]]], limit: int = 22
) -> float:
    """Mean accepted prefix of the templates, counted as ``accepted_prefix_<limit>``."""
    lengths = [
        accepted_prefix_length(templates.get(question, ())[:limit], ids)
        for question, ids in answers
    ]
    return sum(lengths) / len(lengths)


def ngram_tau(
    table: NGramTable, answers: Iterable[tuple[Sequence[int], Sequence[int]]], gamma: int = 6
) -> float:
    """tau_gamma of the table over whole answers (``(prompt ids, answer ids)``)."""
    emitted = cycles = 0
    for prompt, answer in answers:
        said = 1
        while said < len(answer):
            drafts = table.draft([*prompt, *answer[:said]], gamma)
            accepted = accepted_prefix_length(drafts, answer[said:])
            step = min(accepted + 1, len(answer) - said)
            said += step
            emitted += step
            cycles += 1
    return emitted / cycles


class NGramHead:
    """Control: copies what followed the longest context found in prompt and answer, else asks a
    table of the training answers."""

    reads_drafter = False

    def __init__(
        self,
        prompt: Callable[[str], Sequence[int]],
        answers: Iterable[tuple[str, Sequence[int]]],
        order: int = 5,
    ) -> None:
        """
        Args:
            prompt: a question's prompt ids, without the visual tokens.
            answers: ``(question, ids)`` of a training set.
        """
        self._prompt = prompt
        self._table = NGramTable(order).fit((prompt(question), ids) for question, ids in answers)
        self._context: list[int] = []

    def begin(self, question: str, visual: Tensor | None, reader: object) -> None:
        self._context = list(self._prompt(question))

    def propose(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Draft:
        """As deep as was asked for: a look-up costs the same however much is read off it."""
        said = [*self._context, *tokens]
        found = looked_up(said, gamma)
        if not found:
            drafted, confidence = self._table.chain(said, gamma)
            return Draft(drafted, confidence=confidence)
        confidence = []
        for token in found:
            # A context that was seen once, with this behind it (see ``NGramTable.chance``).
            confidence.append((1.0 + self._table.chance(self._table.context(said), token)) / 2)
            said.append(token)
        return Draft(found, confidence=confidence)


def looked_up(ids: Sequence[int], length: int, order: int = 4) -> list[int]:
    """What followed the last earlier occurrence of the last ``order - 1`` tokens; maybe nothing.

    Prompt lookup decoding, with one context length: shorter ones are the table's.
    """
    size = order - 1
    for start in range(len(ids) - size - 1, -1, -1):
        if ids[start : start + size] == ids[len(ids) - size :]:
            return list(ids[start + size : start + size + length])
    return []


class Known:
    """The answer of plain decoding, where a control may look it up."""

    def __init__(self) -> None:
        self.answer: list[int] = []


class OracleHead:
    """Controls ``oracle`` and ``synthetic``: drafts that hold always, or at given rates.

    Whether a draft holds is drawn, position by position; the system is then measured without any
    drafter, and what it says is still the verifier's own.
    """

    reads_drafter = False

    def __init__(self, known: Known, rates: Sequence[float], vocab_size: int, seed: int) -> None:
        """``rates[i]``: how often draft i holds, given those before it; the last one goes on."""
        self._known, self._rates, self._vocab_size = known, rates, vocab_size
        self._random = random.Random(seed)

    def begin(self, question: str, visual: Tensor | None, reader: object) -> None:
        """Nothing to prepare."""

    def propose(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Draft:
        rest = self._known.answer[len(tokens) : len(tokens) + gamma]
        rates = [self._rates[min(i, len(self._rates) - 1)] for i in range(len(rest))]
        drafts = [
            token if self._random.random() < rate else (token + 1) % self._vocab_size
            for token, rate in zip(rest, rates, strict=True)
        ]
        return Draft(drafts, confidence=rates)
