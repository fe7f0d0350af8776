from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.conftest import D_VERIFIER, make_adapter, make_streams
from tests.adapters.test_levels import live_rows
from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import LEVELS, Level
from xsd.counts import Counts
from xsd.decoding.accept import Draft, verify
from xsd.metrics import count_drafts, score, score_batch

LM_HEAD = torch.randn(3, D_VERIFIER, generator=torch.Generator().manual_seed(3))
HEADS = [row for row in LEVELS.values() if row.shift]
every_level = pytest.mark.parametrize("row", LEVELS.values(), ids=list(LEVELS))


def batch(batch_size: int = 5, length: int = 14) -> Streams:
    """Answers that the states really lead to, over three tokens so that drafts often match."""
    streams = make_streams(batch_size, length)
    return replace(streams, ids=(streams.verifier @ LM_HEAD.T).argmax(dim=-1))


def one(streams: Streams, index: int) -> Streams:
    """An answer on its own, unpadded."""
    n = int(streams.mask[index].sum())
    names = ("drafter", "verifier", "token", "ids", "mask")
    cut = {name: getattr(streams, name)[index : index + 1, :n] for name in names}
    return Streams(**cut, visual=streams.visual[index : index + 1])


class Map(Adapter):
    """Not a level: a fixed function of the streams, to see what the metrics make of it."""

    def __init__(self, row: Level, outputs) -> None:  # type: ignore[no-untyped-def]
        nn.Module.__init__(self)
        self.row, self.outputs = row, outputs

    def embed(self, rows, start):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def unroll(self, streams: Streams, num_steps: int) -> list[Tensor]:
        return self.outputs(streams, num_steps)  # type: ignore[no-any-return]


def measure(stub: Adapter, streams: Streams, max_gamma: int = 8) -> dict[str, float]:
    return score_batch(stub, streams, LM_HEAD, max_gamma).counts.rates()


@pytest.mark.parametrize("row", HEADS, ids=[row.name for row in HEADS])
def test_copying_an_input_is_no_prediction(row: Level) -> None:
    """The seed's leak: an identity map scored 1.0 where the target was among the inputs."""
    rates = measure(Map(row, lambda s, n: [s.verifier] * n), batch())
    assert rates["accept_90"] == 0 and rates["token_top1_match"] < 0.6
    if row.same_position:
        assert rates["same_position.accept_90"] == 1
        assert rates["same_position.cos_sim_mean"] == pytest.approx(1)
        assert rates["same_position.token_top1_match"] == 1
    else:
        assert not any(key.startswith("same_position") for key in rates)


@every_level
def test_an_oracle_is_perfect(row: Level) -> None:
    def oracle(streams: Streams, num_steps: int) -> list[Tensor]:
        return [streams.verifier.roll(-row.shift - k, dims=1) for k in range(num_steps)]

    streams = batch()
    rates = measure(Map(row, oracle), streams)
    lengths = streams.mask.sum(dim=1)
    assert rates["cos_sim_mean"] == pytest.approx(1)
    for key in ("accept_80", "accept_95", "token_top1_match", "token_top5_match"):
        assert rates[key] == 1, key
    assert rates["consecutive_mean_90"] == pytest.approx((lengths - row.shift).float().mean())
    for gamma in range(1, 9):
        cycles = sum(-(-(n - 1) // (gamma + 1)) for n in lengths.tolist())
        assert rates[f"tau_{gamma}"] == pytest.approx((lengths - 1).sum().item() / cycles)
    assert rates.get("accepted_prefix_22", lengths.float().mean()) == lengths.float().mean()


@every_level
def test_batches_add_up(row: Level) -> None:
    adapter, streams = make_adapter(row.name), batch()
    whole = score(adapter, [streams], LM_HEAD)
    parts = sum((score(adapter, [one(streams, i)], LM_HEAD) for i in range(5)), Counts())
    assert parts.rates() == pytest.approx(whole.rates(), rel=1e-6, abs=1e-6)
    for ours, theirs in ((whole.target, parts.target), (whole.same_position, parts.same_position)):
        assert ours.matched == theirs.matched and ours.reached == theirs.reached
        assert ours.scored == theirs.scored and ours.cos_histogram == theirs.cos_histogram
    assert whole.cycles == parts.cycles and whole.chain_matched == parts.chain_matched


def live_cycles(adapter: Adapter, answer: Streams, gamma: int) -> tuple[int, int]:
    """Decode one answer as an engine does: draft, verify, roll back, feed the true rows."""
    ids = answer.ids[0].tolist()
    cache = adapter.new_cache(1, len(ids) + gamma, visual=answer.visual)
    cycles, known, accepted_in_all = 0, 1, 0
    while known < len(ids):
        # A level of shift 0 drafts token t from row t; a head drafts it from row t - 1.
        first, last = cache.length, known - adapter.row.shift
        out = adapter.step(live_rows(adapter, answer, first, last), cache)
        drafts = [int((out[0, -1] @ LM_HEAD.T).argmax())]
        for position in range(last + 1, last + gamma):
            if position + adapter.row.shift >= len(ids):
                break
            rows = live_rows(adapter, answer, position, position)
            if adapter.row.feedback:
                rows = replace(rows, verifier=out[:, -1:])
            out = adapter.step(rows, cache)
            drafts.append(int((out[0, -1] @ LM_HEAD.T).argmax()))
        cache.length = last + 1
        choices = ids[known : known + len(drafts)]
        path, _ = verify(Draft(drafts), [*choices, -1])
        accepted = len(path)
        known += accepted + 1
        accepted_in_all += accepted
        cycles += 1
    return cycles, accepted_in_all


@every_level
@pytest.mark.parametrize("gamma", [1, 3])
def test_tau_equals_the_live_count(row: Level, gamma: int) -> None:
    adapter, streams = make_adapter(row.name), batch()
    for index in range(5):
        answer = one(streams, index)
        counts = score(adapter, [answer], LM_HEAD, max_gamma=gamma)
        cycles, accepted = live_cycles(adapter, answer, gamma)
        assert counts.cycles[gamma - 1] == cycles
        assert counts.emitted[gamma - 1] == answer.ids.shape[1] - 1
        assert accepted <= counts.emitted[gamma - 1]


def test_drafts_by_hand() -> None:
    """Two answers of 4 and 2 tokens; chains of two drafts."""
    first = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    second = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    counts = count_drafts(torch.stack([first, second]), (4, 2), shift=0)
    assert counts.prefix_histogram[:4] == (0, 1, 1, 0)
    # Knowing token 0, the chain of anchor 1 drafts token 1 (hit) and 2 (miss): 3 tokens known;
    # then token 3 (hit): the end. The second answer: one miss, one cycle.
    assert counts.cycles == (3, 3) and counts.emitted == (4, 4)
    assert counts.chain_scored == (4, 2) and counts.chain_matched == (2, 0)


def test_positions_are_marginal_and_conditional() -> None:
    streams = batch(2, 5)
    wrong = (streams.verifier @ LM_HEAD.T).argmin(dim=-1)

    def misses_at_one(s: Streams, n: int) -> list[Tensor]:
        out = s.verifier.clone()
        out[0, 1] = LM_HEAD[wrong[0, 1]]
        return [out] * n

    stub = Map(LEVELS["L4"], misses_at_one)
    rows = score_batch(stub, streams, LM_HEAD, 2).counts.target.positions()
    assert [r["position"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["num"] for r in rows] == [2, 2, 2, 1, 1]
    assert [r["match"] for r in rows] == [1, 0.5, 1, 1, 1]
    assert [r["num_reached"] for r in rows] == [2, 2, 1, 1, 1]
    assert [r["match_given_prefix"] for r in rows] == [1, 0.5, 1, 1, 1]


def test_answers_of_one_token() -> None:
    streams = one(batch(1, 1), 0)
    for name in ("L4", "E1", "B1"):
        rates = score(make_adapter(name), [streams], LM_HEAD).rates()
        assert rates["tau_6"] == 0 and all(value == value for value in rates.values())


def test_scoring_leaves_the_mode_alone() -> None:
    adapter = make_adapter("E1").train()
    score(adapter, [batch()], LM_HEAD, max_gamma=2)
    assert adapter.training


def test_selection_metric_is_among_the_rates() -> None:
    for row in LEVELS.values():
        assert row.selection_metric in score(make_adapter(row.name), [batch()], LM_HEAD).rates()
