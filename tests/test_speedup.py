from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.errors import XsdError
from xsd.speedup import (
    Costs,
    breakdown,
    chain_tau,
    decode_bound,
    measured,
    modelled,
    per_sample,
    tokens_before_decode,
)
from xsd.types import Trace


def trace(strategy: str, sample: str, total_ms: float, **changes: object) -> Trace:
    made = Trace(
        sample_key=sample,
        strategy=strategy,
        repeat=0,
        question="what is this scene about?",
        token_ids=(5, 6, 7, 2),
        text="a road",
        prefill_ms=40.0,
        decode_ms=total_ms - 40.0,
        total_ms=total_ms,
        num_free=0,
        gap_drafted=0,
        gap_accepted=0,
        cycle_drafted=(),
        cycle_accepted=(),
        first_difference=None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


PLAIN = [trace("vl_baseline", "a", 100.0), trace("vl_baseline", "b", 300.0)]


def row(traces: list[Trace], strategy: str) -> dict[str, object]:
    frame = measured(traces)
    return frame[frame["strategy"] == strategy].iloc[0].to_dict()


class TestMeasured:
    def test_pooled_ratio_is_sum_over_sum(self) -> None:
        fast = row([*PLAIN, trace("E1", "a", 50.0), trace("E1", "b", 300.0)], "E1")
        assert fast["speedup"] == pytest.approx(400 / 350)
        assert fast["ratio_mean"] == pytest.approx(1.5)  # 2.0 and 1.0
        assert fast["ratio_std"] == pytest.approx(0.5)
        assert fast["ratio_p5"] == pytest.approx(1.05)
        assert fast["ratio_p95"] == pytest.approx(1.95)
        assert fast["decode_speedup"] == pytest.approx(320 / 270)
        assert fast["share_slower"] == 0
        assert fast["total_ms"] == 175

    def test_plain_decoding_is_that_beside_the_strategy(self) -> None:
        """A machine that was slower in one repeat and for one strategy is not the strategy's."""
        times = [(0, 50.0, 100.0), (1, 200.0, 400.0), (2, 90.0, 150.0)]
        traces = [
            *(trace("vl_baseline", "a", 100.0, repeat=repeat) for repeat in range(3)),
            *(
                trace(
                    "E1",
                    "a",
                    ms,
                    repeat=repeat,
                    beside={"prefill_ms": 40.0, "decode_ms": plain - 40.0, "total_ms": plain},
                )
                for repeat, ms, plain in times
            ),
        ]
        fast = row(traces, "E1")
        assert fast["ratio_mean"] == pytest.approx(2.0)  # the median of 2, 2 and 1.67
        assert fast["time_p95"] == pytest.approx(0.5)
        assert fast["speedup"] == pytest.approx(150 / 90)  # a median over a median
        assert fast["decode_speedup"] == pytest.approx(110 / 50)
        assert fast["total_ms"] == pytest.approx(90.0)
        plain = row(traces, "vl_baseline")
        assert plain["speedup"] == plain["ratio_mean"] == 1.0

    def test_baseline_is_one_and_first(self) -> None:
        frame = measured([*PLAIN, trace("E1", "a", 90.0), trace("E1", "b", 310.0)])
        assert list(frame["strategy"]) == ["vl_baseline", "E1"]
        assert frame["speedup"][0] == frame["ratio_mean"][0] == 1
        assert frame["share_slower"][1] == 0.5
        assert math.isnan(frame["accept_rate"][0]) and frame["tau"][0] == 1

    def test_failed_sample_leaves_both_sides_and_is_counted(self) -> None:
        one = row([*PLAIN, trace("E1", "a", 50.0)], "E1")
        assert one["num_samples"] == 1 and one["num_failed"] == 1
        assert one["speedup"] == 2  # not 400 / 50

    def test_repeats_become_a_median_first(self) -> None:
        plain = [
            trace("vl_baseline", "a", t, repeat=r) for r, t in enumerate((100.0, 110.0, 900.0))
        ]
        fast = [trace("E1", "a", t, repeat=r) for r, t in enumerate((55.0, 500.0, 50.0))]
        assert row([*plain, *fast], "E1")["speedup"] == pytest.approx(110 / 55)

    def test_a_sample_that_failed_once_of_many_times_is_out_and_counted(self) -> None:
        plain = [trace("vl_baseline", key, 100.0, repeat=r) for key in "ab" for r in range(3)]
        fast = [trace("E1", "a", 50.0, repeat=r) for r in range(3)]
        once = trace("E1", "b", 1.0, repeat=1)
        got = row([*plain, *fast, once], "E1")
        assert (got["num_samples"], got["num_failed"], got["speedup"]) == (1, 1, 2)
        # And plain decoding's own failure takes every config's sample with it.
        got = row([*plain[:-1], *fast, *(replace(t, sample_key="b") for t in fast)], "E1")
        assert (got["num_samples"], got["num_failed"]) == (1, 1)

    def test_modelled_stands_beside_measured_and_never_mixes(self) -> None:
        plain = [replace(one, modelled_ms=90.0) for one in PLAIN]
        fast = [trace("E1", key, 50.0, modelled_ms=60.0) for key in "ab"]
        got = row([*plain, *fast], "E1")
        assert (got["modelled_speedup"], got["speedup"]) == (1.5, 4.0)
        assert math.isnan(
            row([*plain, replace(fast[0], modelled_ms=None), fast[1]], "E1")["modelled_speedup"]
        )

    def test_acceptance(self) -> None:
        head = trace(
            "L4+E1",
            "a",
            80.0,
            token_ids=tuple(range(13)),
            num_free=6,
            gap_drafted=5,
            gap_accepted=3,
            cycle_drafted=(4, 4, 2),
            cycle_accepted=(4, 0, 2),
        )
        got = row([PLAIN[0], head], "L4+E1")
        assert got["tokens_accepted"] == 9 and got["gap_accepted"] == 3
        assert got["accept_rate"] == pytest.approx(9 / 15)
        # 3 drafts and their pass's own token, then 9 of the 13 tokens in 3 calls
        assert got["tau"] == pytest.approx(9 / 3)
        assert got["num_free"] == 6

    @pytest.mark.parametrize(
        ("changes", "early", "tau"),
        [
            # draft 0 missed: prefill's token stands alone
            ({"gap_drafted": 5, "gap_accepted": 0}, 1, 1.0),
            # it held and was the only one: no pass, plain steps
            ({"gap_drafted": 1, "gap_accepted": 1}, 1, 1.0),
            ({"gap_drafted": 5, "gap_accepted": 2}, 3, 1.0),
            # the end of the answer was accepted: no token after it
            ({"gap_drafted": 9, "gap_accepted": 8}, 8, math.nan),
            ({"cycle_drafted": (4, 4), "cycle_accepted": (4, 2)}, 1, 3.5),
            # one cycle, then plain steps where no draft had room
            ({"cycle_drafted": (4,), "cycle_accepted": (4,)}, 1, 7 / 3),
        ],
    )
    def test_tokens_a_verifier_call(
        self, changes: dict[str, object], early: int, tau: float
    ) -> None:
        made = trace("X1+E3", "a", 80.0, token_ids=tuple(range(8)), **changes)
        assert tokens_before_decode(made) == early
        assert row([PLAIN[0], made], "X1+E3")["tau"] == pytest.approx(tau, nan_ok=True)

    def test_samples_that_nobody_decoded_are_counted(self) -> None:
        assert measured(PLAIN, num_attempted=5)["num_failed"].tolist() == [3]

    @pytest.mark.parametrize(
        ("differences", "lossless", "num_different", "num_near_ties"),
        [
            ([(None, False), (None, False)], True, 0, 0),
            ([(2, True), (None, False)], True, 1, 1),
            ([(2, False), (3, True)], False, 2, 1),
        ],
    )
    def test_lossless(
        self,
        differences: list[tuple[int | None, bool]],
        lossless: bool,
        num_different: int,
        num_near_ties: int,
    ) -> None:
        rows = [
            trace("E1", key, 90.0, first_difference=first, near_tie=tie)
            for key, (first, tie) in zip("ab", differences, strict=True)
        ]
        got = row([*PLAIN, *rows], "E1")
        assert bool(got["lossless"]) is lossless
        assert (got["num_different"], got["num_near_ties"]) == (num_different, num_near_ties)

    def test_one_bad_repeat_is_not_excused_by_another(self) -> None:
        plain = [trace("vl_baseline", "a", 100.0, repeat=r) for r in (0, 1)]
        rows = [
            trace("E1", "a", 90.0, repeat=0, first_difference=1, near_tie=True),
            trace("E1", "a", 90.0, repeat=1, first_difference=1),
        ]
        assert not row([*plain, *rows], "E1")["lossless"]

    def test_a_difference_counts_though_the_sample_failed_in_another_repeat(self) -> None:
        plain = [trace("vl_baseline", key, 100.0, repeat=r) for key in "ab" for r in (0, 1)]
        same = [trace("E1", "a", 50.0, repeat=r) for r in (0, 1)]
        got = row([*plain, *same, trace("E1", "b", 50.0, first_difference=1)], "E1")
        assert (got["num_samples"], got["num_failed"], got["num_different"]) == (1, 1, 1)
        assert not got["lossless"] and got["lossless"] is not None
        near = trace("E1", "b", 50.0, first_difference=1, near_tie=True)
        got = row([*plain, *same, near], "E1")
        assert got["lossless"] and (got["num_different"], got["num_near_ties"]) == (1, 1)

    def test_of_no_sample_nothing_is_known_but_that_it_differed(self) -> None:
        plain = [trace("vl_baseline", "a", 100.0, repeat=r) for r in (0, 1)]
        got = row([*plain, trace("E1", "a", 50.0)], "E1")
        assert got["lossless"] is None and (got["num_samples"], got["num_failed"]) == (0, 1)
        assert all(math.isnan(float(str(got[name]))) for name in ("speedup", "total_ms", "tau"))
        got = row([*plain, trace("E1", "a", 50.0, first_difference=1)], "E1")
        assert got["lossless"] is not None and not got["lossless"]
        # One that failed every time has no trace.
        frame = measured(plain, strategies=["vl_baseline", "E2"])
        assert list(frame["strategy"]) == ["vl_baseline", "E2"]
        assert frame["lossless"].tolist() == [True, None] and list(frame["num_failed"]) == [0, 1]
        # Where plain decoding has no sample left, nobody has.
        frame = measured([plain[0], *(trace("E1", "b", 50.0, repeat=r) for r in (0, 1))])
        assert frame["lossless"].tolist() == [None, None]
        assert breakdown([plain[0], trace("E1", "b", 50.0, repeat=1)]).empty

    def test_without_baseline(self) -> None:
        with pytest.raises(XsdError, match="vl_baseline"):
            measured([trace("E1", "a", 50.0)])
        with pytest.raises(XsdError, match="vl_baseline"):
            per_sample([])

    @settings(max_examples=25)
    @given(st.lists(st.floats(41, 1000), min_size=1, max_size=8), st.floats(1.0, 5.0))
    def test_uniform_gain_is_every_statistic(self, totals: list[float], gain: float) -> None:
        plain = [trace("vl_baseline", str(i), t) for i, t in enumerate(totals)]
        fast = [trace("E1", str(i), t / gain) for i, t in enumerate(totals)]
        got = row([*plain, *fast], "E1")
        for name in ("speedup", "ratio_mean", "ratio_p5", "ratio_p95"):
            assert got[name] == pytest.approx(gain)


COSTS = Costs(
    step_ms=10.0,
    drafter_step_ms=6.0,
    adapter_ms=1.0,
    verifier_prefill_ms=300.0,
    drafter_prefill_ms=90.0,
    pass_ms={5: 12.0, 25: 22.0},
)
times = st.floats(0.1, 500.0)
costs = st.builds(
    Costs,
    step_ms=times,
    drafter_step_ms=times,
    adapter_ms=times,
    verifier_prefill_ms=times,
    drafter_prefill_ms=times,
    pass_ms=st.lists(times, min_size=1, max_size=3).map(
        lambda steps: dict(zip((4, 9, 30), np.cumsum(sorted(steps)).tolist(), strict=False))
    ),
    verifier_slowdown=st.floats(1, 3),
    drafter_slowdown=st.floats(1, 3),
    link_ms=st.floats(0, 50),
)


PARTS_MS = {"language prefill": 30.0, "verifier passes": 50.0, "rest": 15.0}


class TestBreakdown:
    def parts(self, traces: list[Trace], strategy: str) -> dict[str, float]:
        frame = breakdown(traces)
        rows = frame[frame["strategy"] == strategy]
        return dict(zip(rows["part"], rows["ms"], strict=True))

    def test_parts_add_up_to_the_mean_total_and_what_is_left_is_rest(self) -> None:
        plain = [
            trace("vl_baseline", "a", 100.0, parts=PARTS_MS),
            trace("vl_baseline", "b", 300.0, parts={**PARTS_MS, "drafting": 190.0}),
        ]
        found = self.parts(plain, "vl_baseline")
        assert sum(found.values()) == 200
        assert found["drafting"] == 95 and found["language prefill"] == 30
        assert found["rest"] == pytest.approx(25)

    def test_it_is_of_the_samples_that_the_measured_row_is_of(self) -> None:
        plain = [
            trace("vl_baseline", key, ms, repeat=r)
            for key, ms in (("a", 100.0), ("b", 900.0), ("c", 300.0))
            for r in (0, 1)
        ][:-1]
        fast = [
            trace("E1", key, ms, repeat=r)
            for key, ms in (("a", 50.0), ("c", 70.0), ("b", 500.0))
            for r in (0, 1)
        ][:-1]
        for name in ("vl_baseline", "E1"):
            found = self.parts([*plain, *fast], name)
            assert sum(found.values()) == row([*plain, *fast], name)["total_ms"]
        assert sum(self.parts([*plain, *fast], "E1").values()) == 50

    def test_of_a_batch_its_first_sample_speaks(self) -> None:
        both = [trace("vl_baseline", s, t, batch="a") for s, t in (("a", 100.0), ("b", 100.0))]
        assert self.parts(both, "vl_baseline") == {"prefill": 40, "decode": 60, "rest": 0}


class TestCosts:
    @pytest.mark.parametrize(
        ("num_rows", "expected"), [(1, 10), (3, 11), (5, 12), (15, 17), (25, 22), (90, 22)]
    )
    def test_pass_between_measured_rows(self, num_rows: int, expected: float) -> None:
        assert COSTS.verify_ms(num_rows) == pytest.approx(expected)

    def test_free_drafts_by_hand(self) -> None:
        assert COSTS.num_free(50) == 1 + 30  # (300 - 90) / 7
        assert COSTS.num_free(20) == 20  # the answer is no longer
        assert COSTS.num_free(50, coupled=False) == 1 + 34  # (300 - 90 - 1) / 6
        together = replace(COSTS, verifier_slowdown=1.2, drafter_slowdown=2.0, link_ms=5.0)
        assert together.num_free(50) == 1 + 12  # (360 - 180 - 5) / 14
        assert replace(COSTS, drafter_prefill_ms=301.0).num_free(50) == 0
        assert replace(COSTS, drafter_prefill_ms=300.0).num_free(50) == 1

    def test_gap_by_hand(self) -> None:
        assert COSTS.plain_ms(40) == 300 + 390
        assert COSTS.gap_ms(40, 25, 0) == 300 + 390
        # draft 0 and 7 more match: one pass of 25 rows, then 40 - 9 plain steps
        assert COSTS.gap_ms(40, 25, 8) == 300 + 22 + 31 * 10
        assert COSTS.gap_ms(40, 25, 8, decode_speedup=2.0) == 300 + 22 + 31 * 5
        assert COSTS.gap_ms(40, 1, 1) == 300 + 10 + 38 * 10  # a pass of one row is a step
        assert COSTS.gap_ms(5, 5, 5) == 300 + 12
        assert COSTS.gap_ms(1, 1, 1) == 300

    def test_decode_by_hand(self) -> None:
        assert COSTS.decode_speedup(3.2, 4) == pytest.approx(3.2 * 10 / (4 + 12))
        with_drafter = COSTS.decode_speedup(3.2, 4, with_drafter=True)
        assert with_drafter == pytest.approx(3.2 * 10 / (28 + 12))

    def test_chain_by_hand(self) -> None:
        assert chain_tau([]) == 1
        assert chain_tau([0.8, 0.6, 0.3]) == pytest.approx(2.7)
        with pytest.raises(XsdError, match="joint"):
            chain_tau([0.5, 0.6])
        with pytest.raises(XsdError, match="joint"):
            chain_tau([1.2])

    @pytest.mark.parametrize(
        "changes",
        [
            {"step_ms": 0.0},
            {"pass_ms": {4: -1.0}},
            {"adapter_ms": -1.0},
            {"verifier_slowdown": 0.5},
        ],
    )
    def test_impossible_costs(self, changes: dict[str, object]) -> None:
        with pytest.raises(XsdError, match="costs"):
            replace(COSTS, **changes)  # type: ignore[arg-type]

    @given(st.floats(0, 0.95), st.integers(1, 12))
    def test_chain_approaches_its_bound(self, alpha: float, gamma: int) -> None:
        tau = chain_tau([alpha**k for k in range(1, gamma + 1)])
        assert tau <= decode_bound(alpha) + 1e-9
        assert chain_tau([alpha**k for k in range(1, 400)]) == pytest.approx(decode_bound(alpha))
        free = Costs(10.0, 0.0, 0.0, 300.0, 90.0)
        assert free.decode_speedup(tau, gamma) == pytest.approx(tau)

    @given(costs, st.integers(1, 60))
    def test_free_drafts_are_bounded_and_fall_with_cost(self, c: Costs, n: int) -> None:
        free = c.num_free(n)
        assert 0 <= free <= n
        assert replace(c, drafter_prefill_ms=c.drafter_prefill_ms + 5).num_free(n) <= free
        assert replace(c, link_ms=c.link_ms + 5).num_free(n) <= free
        assert replace(c, verifier_prefill_ms=c.verifier_prefill_ms + 5).num_free(n) >= free
        assert c.num_free(n + 1) >= free

    @given(costs, st.integers(2, 60), st.integers(0, 60), st.floats(0.5, 4))
    def test_more_matches_never_cost_time(
        self, c: Costs, n: int, accepted: int, speed: float
    ) -> None:
        free = c.num_free(n)
        # from the first match on; whether that one pays is the break-even's question
        if 1 <= accepted < free:
            before, after = (c.gap_ms(n, free, k, speed) for k in (accepted, accepted + 1))
            assert after <= before

    @given(costs, st.integers(2, 60), st.integers(1, 60), st.floats(0.5, 4))
    def test_break_even_is_where_drafting_pays(
        self, c: Costs, n: int, accepted: int, speed: float
    ) -> None:
        free = c.num_free(n)
        if accepted > min(free, n - 1):
            return
        threshold = c.break_even(free, speed)
        plain = c.verifier_prefill_ms + (n - 1) * c.step_ms / speed
        if abs(accepted - threshold) > 1e-6:
            assert (c.gap_ms(n, free, accepted, speed) < plain) == (accepted > threshold)


class TestModelled:
    def test_head_by_hand(self) -> None:
        got = modelled(COSTS, np.array([40, 20]), tau=3.2, gamma=4)
        assert got["modelled.tau"] == pytest.approx(3.2)
        assert got["modelled.decode_speedup"] == pytest.approx(2.0)
        assert got["modelled.baseline_ms"] == pytest.approx((690 + 490) / 2)
        assert got["modelled.total_ms"] == pytest.approx((300 + 195 + 300 + 95) / 2)
        assert got["modelled.speedup_e2e"] == pytest.approx(1180 / 890)
        assert "modelled.num_free" not in got

    def test_gap_by_hand(self) -> None:
        got = modelled(COSTS, np.array([40, 20]), accepted_prefix=np.array([8, 0]))
        slow = replace(COSTS, pass_ms={31: 22.0})
        assert got["modelled.num_free"] == (31 + 20) / 2
        assert got["modelled.gap_accepted"] == 4
        assert got["modelled.total_ms"] == pytest.approx((300 + 22 + 310 + 490) / 2)
        assert got["modelled.bound_all_accepted"] == pytest.approx(1180 / (300 + 22 + 80 + 319.5))
        assert got["modelled.bound_free_decode"] == pytest.approx(1180 / 600)
        assert slow.break_even(31) == pytest.approx(2.2)

    def test_two_phases_multiply_in_decode_only(self) -> None:
        both = modelled(COSTS, np.array([40]), accepted_prefix=np.array([8]), tau=3.2, gamma=4)
        assert both["modelled.total_ms"] == pytest.approx(300 + 22 + 155)

    def test_no_answers(self) -> None:
        with pytest.raises(XsdError, match="no answers"):
            modelled(COSTS, np.array([], dtype=int))

    @given(
        costs, st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5)
    )
    def test_bounds_hold(self, c: Costs, answers: list[tuple[int, int]]) -> None:
        lengths, accepted = (np.array(column) for column in zip(*answers, strict=True))
        got = modelled(c, lengths, accepted_prefix=accepted)
        assert got["modelled.speedup_e2e"] <= got["modelled.bound_free_decode"] + 1e-9


def test_cycles_of_one_length_are_the_formula() -> None:
    costs = Costs(10.0, 2.0, 1.0, 100.0, 40.0, {4: 13.0})
    plain = 12 * costs.step_ms
    assert plain / costs.cycles_ms([3] * 4, 0) == pytest.approx(costs.decode_speedup(3.0, 3))
    assert costs.cycles_ms([], 12) == plain


class TestBatches:
    """Samples a and b were decoded together, c with nobody."""

    @staticmethod
    def traces(strategy: str, together_ms: float, single_ms: float) -> list[Trace]:
        pair = [
            trace(strategy, key, together_ms, batch="a", batch_size=2, alone_ms=alone_ms)
            for key, alone_ms in (("a", 100.0), ("b", 140.0))
        ]
        return [*pair, trace(strategy, "c", single_ms, batch="c", alone_ms=90.0)]

    def test_times_are_summed_over_batches_and_counts_over_samples(self) -> None:
        plain = self.traces("vl_baseline", 160.0, 80.0)
        fast = row([*plain, *self.traces("E1", 80.0, 80.0)], "E1")
        assert fast["speedup"] == pytest.approx(240 / 160)
        assert fast["speedup_alone"] == pytest.approx(330 / 160)
        assert fast["tokens_per_s"] == pytest.approx(12 / 0.160)
        assert fast["ratio_mean"] == pytest.approx(1.5)  # 2.0 and 1.0
        assert fast["total_ms"] == pytest.approx(80.0)
        assert (fast["num_samples"], fast["batch_size"], fast["num_tokens"]) == (3, 2, 4)

    def test_without_batches_there_is_nothing_to_hold_them_against(self) -> None:
        found = row(PLAIN, "vl_baseline")
        assert math.isnan(float(str(found["speedup_alone"]))) and found["batch_size"] == 1
        assert found["tokens_per_s"] == pytest.approx(8 / 0.400)
