"""Controls: what drafting by rote reaches, without looking at the scene."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from xsd.decoding.accept import accepted_prefix_length

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
            for size in range(min(self.order - 1, len(drafted)), -1, -1):
                token = self._best[size].get(tuple(drafted[len(drafted) - size :]))
                if token is not None:
                    drafted.append(token)
                    break
        return drafted[start:]


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
