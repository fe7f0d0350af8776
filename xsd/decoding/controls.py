"""Controls: drafting by rote, without looking at the scene, and with the answer in hand."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from xsd.decoding.accept import Draft, accepted_prefix_length
from xsd.decoding.policy import Policy

Ids = tuple[int, ...]
_COPIED = 0.97
"""What a copied token is taken for, apart from all that a table finds."""


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
        self._best: list[dict[Ids, int]] = []

    def fit(self, answers: Iterable[tuple[Sequence[int], Sequence[int]]]) -> NGramTable:
        """``(prompt ids, answer ids)``: the prompt's tail is the first tokens' context."""
        for prompt, answer in answers:
            ids = [*prompt[-(self.order - 1) :], *answer]
            for position in range(len(ids) - len(answer), len(ids)):
                for size in range(min(self.order, position + 1)):
                    context = tuple(ids[position - size : position])
                    self._counts[size][context][ids[position]] += 1
        self._best = [
            {context: counter.most_common(1)[0][0] for context, counter in table.items()}
            for table in self._counts
        ]
        return self

    def draft(self, ids: Sequence[int], length: int) -> list[int]:
        """``length`` tokens after ``ids``, each from the longest context that was seen."""
        drafted = list(ids[-(self.order - 1) :])
        start = len(drafted)
        for _ in range(length):
            if (found := self.following(drafted)) is None:
                break
            drafted.append(found[0])
        return drafted[start:]

    def following(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """The token after ``ids``, and how long its context was; None: nothing was ever seen."""
        context = tuple(ids[-(self.order - 1) :])
        for start in range(len(context) + 1):
            size = len(context) - start
            if (
                size < len(self._best)
                and (token := self._best[size].get(context[start:])) is not None
            ):
                return token, size
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
        policy: Policy | None = None,
    ) -> None:
        """
        Args:
            prompt: a question's prompt ids, without the visual tokens.
            answers: ``(question, ids)`` of a training set.
            policy: says when to stop; None: never before gamma.
        """
        self._policy = policy or Policy()
        self._prompt = prompt
        self._table = NGramTable(order).fit((prompt(question), ids) for question, ids in answers)
        self._context: list[int] = []

    def begin(self, question: str, visual: Tensor | None, reader: object) -> None:
        self._context = list(self._prompt(question))

    def propose(self, tokens: Sequence[int], states: Tensor, gamma: int) -> Draft:
        said = [*self._context, *tokens]
        if found := looked_up(said, gamma):
            return Draft(found, confidence=[_COPIED] * len(found))
        # What follows a longer context is likelier; how much so is for the policy to learn.
        drafted: list[int] = []
        confidence: list[float] = []
        joint = 1.0
        while len(drafted) < gamma and (next_ := self._table.following(said)) is not None:
            token, size = next_
            said.append(token)
            drafted.append(token)
            confidence.append((size + 0.5) / (self._table.order + 1))
            joint *= self._policy.chance(confidence[-1])
            if not self._policy.go_on(joint, len(drafted)):
                break
        return Draft(drafted, confidence=confidence)


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
