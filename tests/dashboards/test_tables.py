from __future__ import annotations

import pandas as pd

from dashboards.tables import Column, Table, configs


def test_a_column_that_no_row_has_is_left_out() -> None:
    frame = pd.DataFrame({"a": [1.0, None], "b": [None, None]})
    table = Table((Column("a", "A"), Column("b", "B"), Column("c", "C")), frame)
    assert [column.title for column in table.shown()] == ["A"]
    assert [table.shown()[0].text(value) for value in frame["a"]] == ["1.0", "-"]


def test_a_config_that_changes_an_answer_says_how_many() -> None:
    frame = pd.DataFrame(
        {
            "strategy": ["vl_baseline", "L4+VL", "E3_decode"],
            "num_free": [0.0, 0.4, 0.0],
            "lossless": [True, False, True],
            "num_different": [0, 3, 2],
            "num_near_ties": [0, 1, 2],
        }
    )
    table = configs(frame)
    assert list(table.frame["verdict"]) == ["yes", "no: 2 differ", "yes, 2 near ties"]
    assert table.breaks() == [1, 2]
    assert [column.key for column in table.shown()] == ["strategy", "num_free", "verdict"]
