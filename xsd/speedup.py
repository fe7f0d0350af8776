"""Traces become a measured speedup; costs and prefix hits become a modelled one.

Pure: no clock, no models, no files. Times are in milliseconds and a speedup is plain time over
speculative time. What is *measured* comes from traces alone, what is *modelled* from ``Costs``
and counts alone, and no number is ever both.

Measured. Both sides of a ratio are the same samples in the same repeats, and plain decoding's time
is that of its runs right before and after (``Trace.beside``). A sample that one side lacks in any
repeat (it failed there) leaves both sides and is counted; what was said of it in other repeats
still tells whether answers stayed the same. Repeats become a median per sample first: of times
where samples are pooled, of ratios where they are compared. The headline is the pooled ratio, sum
over sum: it is what a user waits for, whereas the mean of per-sample ratios weighs a short answer
as much as a long one. Of samples that were decoded together only their batch has a time: sums,
means and ratios are then over batches, counts over samples.

Modelled. Beside every measured speedup stands the one that costs measured before the benchmark and
the trace's own counts give (``Trace.modelled_ms``): where they differ, something takes time that
the model does not know. Where nothing was decoded, a chain of drafts yields
``1 + sum_k P(first k drafts all match)`` tokens a verifier pass (the expectation of Leviathan et
al., arXiv:2211.17192, without assuming independent drafts). Against plain decoding at ``t`` a
token, ``gamma`` drafts and one pass of ``gamma + 1`` rows give

    S = tau * t / (gamma * (t_d + a) + V(gamma + 1)).

While the verifier prefills, the drafter may work for nothing: see ``Costs.num_free`` and
``gap_ms``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Int

from xsd.decoding.config import BASELINE
from xsd.decoding.decoded import REST
from xsd.errors import XsdError
from xsd.types import Trace

_TIMES = ["prefill_ms", "decode_ms", "total_ms"]
_BASELINE_TIMES = [f"baseline_{name}" for name in (*_TIMES, "modelled_ms")]
_COUNTS = [
    "num_tokens",
    "num_free",
    "drafted",
    "gap_accepted",
    "accepted",
    "num_early",
    "num_calls",
    "has_drafts",
]


def per_sample(traces: Iterable[Trace], baseline: str = BASELINE) -> pd.DataFrame:
    """One row a strategy and sample that it shares with ``baseline``.

    Columns: strategy, sample_key, batch (its first sample's key; the same for all in it) and
    batch_size, times (of the batch; median over repeats), modelled_ms, ``baseline_`` times (of the
    runs beside it), alone_ms (plain decoding of this sample alone; NaN where it was not decoded in
    a batch), ratio (> 1: faster than plain decoding; median over repeats), counts (mean over
    repeats; ``accepted`` adds gap and decode, ``num_early`` tokens stood before decode began,
    ``num_calls`` verifier calls said the others, ``has_drafts``: any were verified at all), differs
    and excused (by a near tie).

    Raises:
        XsdError: no traces of ``baseline``.
    """
    frame = pd.DataFrame([_row(trace) for trace in traces])
    times = [*_TIMES, "modelled_ms"]
    if frame.empty or baseline not in set(frame["strategy"]):
        raise XsdError(f"no traces of {baseline!r}; add it to the configs, every ratio needs it")
    keys = ["sample_key", "repeat"]
    plain = frame.loc[frame["strategy"] == baseline, [*keys, *times]]
    # What ran beside a trace is in it; the baseline's trace stands in for where nothing did.
    own = plain.rename(columns=dict(zip(times, _BASELINE_TIMES, strict=True)))
    both = frame.merge(own, on=keys, suffixes=("_beside", ""))
    for name in _BASELINE_TIMES:
        both[name] = both[f"{name}_beside"].fillna(both[name])
    both["ratio"] = both["baseline_total_ms"] / both["total_ms"]
    one = both.groupby(["strategy", "sample_key"])["repeat"]
    both = both[one.transform("nunique") == frame["repeat"].nunique()]
    how: dict[str, str] = dict.fromkeys((*times, *_BASELINE_TIMES, "ratio"), "median")
    how |= dict.fromkeys(_COUNTS, "mean")
    how |= {"batch": "first", "batch_size": "first", "alone_ms": "median"}
    # A sample is excused only if every repeat that differs is.
    how |= {"differs": "max", "excused": "min"}
    return both.groupby(["strategy", "sample_key"], sort=False).agg(how).reset_index()


def measured(
    traces: Iterable[Trace],
    baseline: str = BASELINE,
    *,
    num_attempted: int | None = None,
    strategies: Iterable[str] | None = None,
) -> pd.DataFrame:
    """One row a strategy.

    Args:
        num_attempted: samples that the benchmark took up; None: those with any trace.
        strategies: their names, in order; None: those with any trace, in the order of the first.

    Columns: strategy, num_samples, num_failed, batch_size (the largest), prefill_ms, decode_ms,
    total_ms (means), tokens_per_s, speedup_alone (pooled, over plain decoding one by one; NaN
    without batches), num_tokens, tokens_accepted and gap_accepted (a sample), accept_rate (of what
    was drafted),
    tau (tokens a verifier call of decode), num_free, speedup and decode_speedup (pooled),
    ratio_mean, ratio_std, ratio_p5, ratio_p95, time_p95 (95th percentile of a sample's time over
    plain decoding's), share_slower, share_drafting (of answers in which any draft was verified: a
    policy may leave it off), modelled_speedup (see above), lossless (None: no sample is left that
    could tell), num_different (samples in any repeat, those that failed in another one too),
    num_near_ties. What a strategy does not have (drafts, decode calls, samples) is NaN.
    """
    kept = list(traces)
    rows = per_sample(kept, baseline)
    num_samples = num_attempted or len({trace.sample_key for trace in kept})
    names = dict.fromkeys(strategies or (trace.strategy for trace in kept))
    excused = _differences(kept)
    return pd.DataFrame(
        [
            _summary(name, rows[rows["strategy"] == name], num_samples, excused.get(name, []))
            for name in names
        ]
    )


def _differences(traces: Iterable[Trace]) -> dict[str, list[bool]]:
    """By strategy: of every sample that differs in any repeat, whether all that do are excused."""
    found: dict[str, dict[str, bool]] = {}
    for trace in traces:
        if trace.first_difference is not None:
            excused = found.setdefault(trace.strategy, {})
            excused[trace.sample_key] = excused.get(trace.sample_key, True) and trace.near_tie
    return {strategy: list(excused.values()) for strategy, excused in found.items()}


def breakdown(traces: Iterable[Trace], baseline: str = BASELINE) -> pd.DataFrame:
    """Where the time of an answer goes: strategy, part, ms, in the order of their first traces.

    Means over repeats and the same samples as in ``measured``, of the traces' parts, so that the
    parts of a strategy add up to its mean total (elsewhere a sample's time is a median). Traces
    without parts (batches) have prefill and decode; what is left of a total is its rest.
    """
    traces = list(traces)
    both = per_sample(traces, baseline)
    kept = set(zip(both["strategy"], both["sample_key"], strict=True))
    rows: list[dict[str, object]] = []
    for trace in traces:
        if (trace.strategy, trace.sample_key) not in kept:
            continue
        # What a batch took is told by each of its samples.
        if trace.batch not in ("", trace.sample_key):
            continue
        parts = trace.parts or {"prefill": trace.prefill_ms, "decode": trace.decode_ms}
        left_ms = trace.total_ms - sum(parts.values())
        for part, ms in {**parts, REST: parts.get(REST, 0.0) + left_ms}.items():
            rows.append({"strategy": trace.strategy, "part": part, "ms": ms})
    frame = pd.DataFrame(rows, columns=["strategy", "part", "ms"])
    counts = frame[frame["part"] == REST].groupby("strategy")["ms"].size()
    total = frame.groupby(["strategy", "part"], sort=False)["ms"].sum().reset_index()
    # A part that some answers do not have took no time in them.
    return total.assign(ms=total["ms"] / total["strategy"].map(counts))


def tokens_before_decode(trace: Trace) -> int:
    """Tokens that prefill and the check of the gap's drafts yielded.

    Prefill yields token 0 and so checks draft 0; if that one held and there are more, one pass
    checks them and adds a token of the verifier's own.
    """
    has_own = trace.gap_accepted == 0 or trace.gap_drafted > 1
    return min(len(trace.token_ids), trace.gap_accepted + has_own)


def _row(trace: Trace) -> dict[str, object]:
    num_early = tokens_before_decode(trace)
    num_late = len(trace.token_ids) - num_early
    # A last pass may accept the end of the answer, after which the verifier adds nothing.
    num_cycles = len(trace.cycle_accepted)
    num_steps = max(0, num_late - sum(trace.cycle_accepted) - num_cycles)
    return {
        "strategy": trace.strategy,
        "sample_key": trace.sample_key,
        "batch": trace.batch or trace.sample_key,
        "batch_size": trace.batch_size,
        "alone_ms": math.nan if trace.alone_ms is None else trace.alone_ms,
        "repeat": trace.repeat,
        "prefill_ms": trace.prefill_ms,
        "decode_ms": trace.decode_ms,
        "modelled_ms": math.nan if trace.modelled_ms is None else trace.modelled_ms,
        "total_ms": trace.total_ms,
        **{name: trace.beside.get(name[len("baseline_") :], math.nan) for name in _BASELINE_TIMES},
        "num_tokens": len(trace.token_ids),
        "num_free": trace.num_free,
        "drafted": trace.gap_drafted + sum(trace.cycle_drafted),
        "has_drafts": bool(trace.gap_drafted or trace.cycle_drafted),
        "gap_accepted": trace.gap_accepted,
        "accepted": trace.gap_accepted + sum(trace.cycle_accepted),
        "num_early": num_early,
        "num_calls": num_cycles + num_steps,
        "differs": trace.first_difference is not None,
        "excused": trace.lossless,
    }


def _summary(
    strategy: str, rows: pd.DataFrame, num_samples: int, excused: Sequence[bool]
) -> dict[str, object]:
    """``excused``: of every sample that differs (``_differences``)."""
    batches = rows.drop_duplicates("batch")
    total = rows[_COUNTS].sum()
    mean = rows[_COUNTS].mean()
    times = batches[[*_TIMES, "modelled_ms", *_BASELINE_TIMES]].sum(skipna=False)
    ratio = batches["ratio"]
    lossless = all(excused) if len(rows) or not all(excused) else None
    return {
        "strategy": strategy,
        "num_samples": len(rows),
        "num_failed": num_samples - len(rows),
        "batch_size": int(rows["batch_size"].max()) if len(rows) else 0,
        **{name: _ratio(times[name], len(batches)) for name in _TIMES},
        "tokens_per_s": 1e3 * _ratio(total["num_tokens"], times["total_ms"]),
        "num_tokens": mean["num_tokens"],
        "tokens_accepted": mean["accepted"],
        "gap_accepted": mean["gap_accepted"],
        "accept_rate": _ratio(total["accepted"], total["drafted"]),
        "tau": _ratio(total["num_tokens"] - total["num_early"], total["num_calls"]),
        "num_free": mean["num_free"],
        "speedup": _ratio(times["baseline_total_ms"], times["total_ms"]),
        "decode_speedup": _ratio(times["baseline_decode_ms"], times["decode_ms"]),
        "speedup_alone": _ratio(rows["alone_ms"].sum(min_count=1), times["total_ms"]),
        "modelled_speedup": _ratio(times["baseline_modelled_ms"], times["modelled_ms"]),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(ddof=0),
        "ratio_p5": ratio.quantile(0.05),
        "ratio_p95": ratio.quantile(0.95),
        "time_p95": (1 / ratio).quantile(0.95),
        "share_slower": (ratio < 1).mean(),
        "share_drafting": mean["has_drafts"],
        "lossless": lossless,
        "num_different": len(excused),
        "num_near_ties": sum(excused),
    }


def _ratio(over: float, under: float) -> float:
    return float(over) / float(under) if under else math.nan


@dataclass(frozen=True, slots=True)
class Costs:
    """What each piece of work costs on one machine, in milliseconds.

    Args:
        step_ms: ``t``, one verifier step of one row.
        drafter_step_ms: ``t_d``, one drafter step.
        adapter_ms: ``a``, adapter and LM head for one token.
        verifier_prefill_ms, drafter_prefill_ms: ``P_v`` and ``P_d``, vision towers included.
        pass_ms: ``V(r)`` for the row counts that were measured; empty means ``V(r) = t``.
        verifier_slowdown, drafter_slowdown: ``kappa >= 1``, each side's while both run.
        link_ms: to hand states or tokens from the drafter's place to the verifier's.
    """

    step_ms: float
    drafter_step_ms: float
    adapter_ms: float
    verifier_prefill_ms: float
    drafter_prefill_ms: float
    pass_ms: Mapping[int, float] = field(default_factory=dict)
    verifier_slowdown: float = 1.0
    drafter_slowdown: float = 1.0
    link_ms: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.step_ms, self.verifier_prefill_ms, *self.pass_ms.values())
        if not all(math.isfinite(x) and x > 0 for x in numbers):
            raise XsdError(f"costs: steps, prefill and passes must be positive, got {numbers}")
        waits = (self.drafter_step_ms, self.adapter_ms, self.drafter_prefill_ms, self.link_ms)
        if not all(math.isfinite(x) and x >= 0 for x in waits):
            raise XsdError(f"costs: times of drafting must not be negative, got {waits}")
        if min(self.verifier_slowdown, self.drafter_slowdown) < 1:
            raise XsdError("costs: a slowdown is at least 1 (1: running together costs nothing)")

    def verify_ms(self, num_rows: int) -> float:
        """``V(r)``: linear between measured row counts, flat beyond the last."""
        points = {1: self.step_ms, **self.pass_ms}
        rows = sorted(points)
        return float(np.interp(num_rows, rows, [points[r] for r in rows]))

    def plain_ms(self, num_tokens: int) -> float:
        """``T0 = P_v + (N - 1) t``: prefill yields the first token, every step one more."""
        return self.verifier_prefill_ms + max(0, num_tokens - 1) * self.step_ms

    def num_free(self, num_tokens: int, *, coupled: bool = True) -> int:
        """Drafts that are ready when the verifier's prefill ends.

        The drafter's prefill gives the first, and each further one takes ``kappa_d (t_d + a)`` of
        what is left of ``kappa_v P_v - kappa_d P_d - link``. Free-running drafting maps all its
        states at once and pays ``a`` once. Never more than the answer has tokens.
        """
        draft_ms = self.drafter_step_ms + (self.adapter_ms if coupled else 0.0)
        gap_ms = (
            self.verifier_slowdown * self.verifier_prefill_ms
            - self.drafter_slowdown
            * (self.drafter_prefill_ms + (0.0 if coupled else self.adapter_ms))
            - self.link_ms
        )
        if gap_ms < 0 or num_tokens < 1:
            # Not even the first draft is there; a floor of -1 or less says the same.
            return 0
        if draft_ms == 0:
            return num_tokens
        return min(num_tokens, 1 + math.floor(gap_ms / (self.drafter_slowdown * draft_ms)))

    def gap_ms(
        self, num_tokens: int, num_free: int, num_accepted: int, decode_speedup: float = 1.0
    ) -> float:
        """Time of a whole answer whose first ``num_free`` drafts were made during prefill.

        Prefill yields token 0 and so checks draft 0 for nothing. If that one missed, plain
        decoding follows (at ``decode_speedup``, if a head drafts there). If it held, the ``n``
        other drafts go into one pass of ``n + 1`` rows, which yields its ``K`` matches and one
        token more.

        Args:
            num_accepted: drafts that match before the first miss, draft 0 included.
        """
        prefill = self.verifier_slowdown * self.verifier_prefill_ms
        step = self.step_ms / decode_speedup
        accepted = min(num_accepted, num_free)
        if accepted == 0 or num_tokens <= 1:
            return prefill + max(0, num_tokens - 1) * step
        # accepted = K + 1 and n + 1 = num_free
        return prefill + self.verify_ms(num_free) + max(0, num_tokens - 1 - accepted) * step

    def break_even(self, num_free: int, decode_speedup: float = 1.0) -> float:
        """Matching drafts (``K + 1``) above which drafting in the gap pays.

        They must save more steps than the long pass and the slowed prefill cost.
        """
        lost = (self.verifier_slowdown - 1) * self.verifier_prefill_ms
        return (self.verify_ms(num_free) + lost) * decode_speedup / self.step_ms

    def cycles_ms(self, cycle_drafted: Sequence[int], num_steps: int) -> float:
        """Decode as it went: a head's drafts and one pass a cycle, and ``num_steps`` plain steps.

        With cycles of one length, over ``t`` a token, it is ``decode_speedup`` by other letters.
        """
        drafted_ms = sum(n * self.adapter_ms + self.verify_ms(n + 1) for n in cycle_drafted)
        return drafted_ms + num_steps * self.step_ms

    def decode_speedup(self, tau: float, gamma: int, *, with_drafter: bool = False) -> float:
        """``S``: a head drafts at ``a`` a token; a drafter model adds ``t_d`` to each."""
        draft_ms = self.adapter_ms + (self.drafter_step_ms if with_drafter else 0.0)
        return tau * self.step_ms / (gamma * draft_ms + self.verify_ms(gamma + 1))


def chain_tau(prefix_hits: Sequence[float]) -> float:
    """Tokens a verifier call: the bonus token and every draft whose predecessors matched too.

    Args:
        prefix_hits: element ``k - 1`` is the share of cycles whose first ``k`` drafts all matched.
            These are joint: a product of marginal rates is another number, and most often too low.

    Raises:
        XsdError: shares outside 0..1, or growing ones, which joint hits cannot be.
    """
    shares = [1.0, *prefix_hits]
    if any(not 0 <= after <= before + 1e-9 for before, after in pairwise(shares)):
        raise XsdError("prefix hits must be shares that never grow: they are joint, not marginal")
    return float(sum(shares))


def decode_bound(alpha: float) -> float:
    """Most that a chain can give at acceptance ``alpha`` when drafting is free and ``V = t``."""
    return math.inf if alpha >= 1 else 1 / (1 - alpha)


def modelled(
    costs: Costs,
    num_tokens: Int[np.ndarray, " S"],
    *,
    accepted_prefix: Int[np.ndarray, " S"] | None = None,
    tau: float | None = None,
    gamma: int = 0,
    coupled: bool = True,
    with_drafter: bool = False,
) -> dict[str, float]:
    """``modelled.*`` of an adapter in the gap, of one in decode, or of both together.

    Args:
        num_tokens: answer lengths.
        accepted_prefix: of each answer, drafts that match before the first miss; None: the gap is
            not used. Counted to a limit, it makes what lies beyond the limit a miss.
        tau: tokens a verifier call with ``gamma`` drafts, counted or from ``chain_tau``; None:
            plain decoding.
        with_drafter: the drafter model steps in decode as well (L5, L5F, E2).

    Returns:
        Pooled over answers: ``modelled.speedup_e2e``, ``total_ms``, ``baseline_ms``, and where they
        apply ``tau``, ``decode_speedup``, ``num_free``, ``gap_accepted``, ``break_even``,
        ``bound_all_accepted`` (every free draft matches), ``bound_free_decode`` (prefill is all).
    """
    if len(num_tokens) == 0:
        raise XsdError("no answers to model a speedup from; give a split that is not empty")
    lengths = [int(n) for n in num_tokens]
    plain_ms = sum(costs.plain_ms(n) for n in lengths)
    prefill_ms = len(lengths) * costs.verifier_prefill_ms
    values: dict[str, float] = {"bound_free_decode": plain_ms / prefill_ms}
    speed = 1.0
    if tau is not None:
        speed = costs.decode_speedup(tau, gamma, with_drafter=with_drafter)
        values |= {"tau": tau, "decode_speedup": speed}
    total_ms = prefill_ms + (plain_ms - prefill_ms) / speed
    if accepted_prefix is not None:
        free = [costs.num_free(n, coupled=coupled) for n in lengths]
        kept = [min(int(a), f) for a, f in zip(accepted_prefix, free, strict=True)]
        answers = list(zip(lengths, free, kept, strict=True))
        total_ms = sum(costs.gap_ms(n, f, k, speed) for n, f, k in answers)
        best_ms = sum(costs.gap_ms(n, f, f, speed) for n, f, _ in answers)
        values |= {
            "num_free": float(np.mean(free)),
            "gap_accepted": float(np.mean(kept)),
            "break_even": float(np.mean([costs.break_even(f, speed) for f in free])),
            "bound_all_accepted": plain_ms / best_ms,
        }
    values |= {
        "baseline_ms": plain_ms / len(lengths),
        "total_ms": total_ms / len(lengths),
        "speedup_e2e": plain_ms / total_ms,
    }
    return {f"modelled.{name}": value for name, value in values.items()}
