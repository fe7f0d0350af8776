from __future__ import annotations

from xsd.decoding.controls import NGramTable, commonest_answers, ngram_tau, template_prefix


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


def test_tau_of_a_perfect_and_of_a_useless_table() -> None:
    text = [([0], [1, 2, 3, 4, 5, 6, 7])]
    assert ngram_tau(NGramTable().fit(text), text, gamma=2) == 3.0
    assert ngram_tau(NGramTable(1).fit([([0], [99])]), text, gamma=2) == 1.0
