from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from xsd.decoding.controls import (
    Known,
    NGramHead,
    NGramTable,
    OracleHead,
    commonest_answers,
    looked_up,
    ngram_tau,
    template_prefix,
)
from xsd.decoding.strategies import acceptance_rates
from xsd.errors import XsdError

STATES = torch.zeros(1, 2)


def test_the_commonest_answer_is_found_a_question() -> None:
    answers = [
        ("a", [1, 2]),
        ("a", [1, 3]),
        ("a", [1, 3]),
        ("b", [4]),
        ("b", [5, 6]),
        ("b", [5, 7]),
    ]
    templates = commonest_answers(answers)
    assert templates["a"] == (1, 3)
    assert templates["b"][0] == 5, "among equals, the opening that most answers share"
    assert template_prefix(templates, [("a", [1, 3, 9]), ("a", [2])]) == 1.0
    assert template_prefix(templates, [("unheard of", [1])]) == 0.0


def test_the_table_prefers_the_longest_context() -> None:
    table = NGramTable(3).fit([([0], [1, 2, 3]), ([0], [9, 2, 4]), ([0], [9, 2, 4])])
    assert table.draft([1], 2) == [2, 3]
    assert table.draft([9], 2) == [2, 4]
    assert table.draft([77], 1) == [2], "unseen context: the commonest token"


def test_a_context_that_was_seen_once_is_not_certain() -> None:
    table = NGramTable(2).fit([([0], [5, 6])] + [([0], [7, 8])] * 9)
    often, once = table.chain([7], 1), table.chain([5], 1)
    assert (often[0], once[0]) == ([8], [6])
    # Witten and Bell: 6 is 1 of 20 tokens of 4 kinds, then 1 of 1 behind 5.
    assert once[1] == pytest.approx([(1 + 1 / 24) / 2])
    assert often[1] == pytest.approx([(9 + 9 / 24) / 10])
    assert table.chain([7], 3)[0][:1] == [8], "a longer chain begins with the shorter one"


def test_tau_of_a_perfect_and_of_a_useless_table() -> None:
    text = [([0], [1, 2, 3, 4, 5, 6, 7])]
    assert ngram_tau(NGramTable().fit(text), text, gamma=2) == 3.0
    assert ngram_tau(NGramTable(1).fit([([0], [99])]), text, gamma=2) == 1.0


def test_what_was_said_before_is_looked_up_last_occurrence_first() -> None:
    assert looked_up([1, 2, 3, 4, 9, 1, 2, 3, 5, 1, 2, 3], 2) == [5, 1]
    assert looked_up([1, 2, 3], 4) == [] and looked_up([], 4) == []


def test_the_ngram_head_prefers_the_prompt_to_the_corpus() -> None:
    head = NGramHead(lambda _: [1, 2, 3, 4], [("q", [1, 2, 3, 7, 8])])
    head.begin("q", None, None)
    assert head.propose([1, 2, 3], STATES, 1).tokens == [4]
    assert head.propose([9, 2, 3, 7], STATES, 1).tokens == [8]


def test_the_oracle_is_right_until_the_answer_ends() -> None:
    known = Known()
    known.answer = [3, 1, 4, 1, 5]
    oracle = OracleHead(known, [1.0], 10, seed=0)
    assert oracle.propose([3], STATES, 3).tokens == [1, 4, 1]
    assert oracle.propose([3, 1, 4, 1], STATES, 3).tokens == [5]


def test_synthetic_drafts_hold_at_their_rates() -> None:
    known = Known()
    known.answer = [0] * 3
    head = OracleHead(known, [0.8, 0.3], 10, seed=0)
    drafts = [head.propose([0], STATES, 2).tokens for _ in range(2000)]
    assert sum(first == 0 for first, _ in drafts) / 2000 == pytest.approx(0.8, abs=0.04)
    assert sum(second == 0 for _, second in drafts) / 2000 == pytest.approx(0.3, abs=0.04)


def test_rates_are_read_from_text_and_file(tmp_path: Path) -> None:
    assert acceptance_rates("0.8") == [0.8]
    assert acceptance_rates("0.9,.5") == [0.9, 0.5]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([1, 0.5]))
    assert acceptance_rates(str(path)) == [1.0, 0.5]
    for wrong in ("", "much", "1.5", str(tmp_path / "missing.json")):
        with pytest.raises(XsdError):
            acceptance_rates(wrong)
