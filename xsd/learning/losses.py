"""The losses of adapters: pure, over the rows of packed answers.

A mean is over all answers of a batch, of which a process may hold a share: every row carries its
weight in that mean, and shares add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import Level
from xsd.adapters.layout import Layout
from xsd.learning.config import LossKind
from xsd.learning.cpu import product

STEP_DECAY = 0.8
"""Weight of each further unrolled step: an error deep in a chain is reached less often."""
ROWS = 256
"""Positions whose logits a CPU holds at once: a small vocabulary's then stay in a core's cache."""
_GPU_LOGITS = 1 << 27
"""Logits that a GPU holds at once."""


def adapter_loss(
    adapter: Adapter,
    streams: Streams,
    *,
    loss: LossKind | None = None,
    unroll_steps: int = 1,
    lm_head: Float[Tensor, "V Dv"] | None = None,
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """The training loss of a batch; ``loss`` None takes the level's own.

    Heads that feed back are unrolled, but for the seed's feature loss of L5, B1 and L5F.

    Args:
        lengths: of all answers of the batch, if ``streams`` are a share of it.
    """
    packed, layout = streams.packed()
    num_steps = steps_of(adapter.row, loss, unroll_steps)
    # In mixed precision a level's output may come halved.
    chain = [out[0].to(packed.verifier.dtype) for out in adapter.unroll(packed, num_steps)]
    weights = Weights(layout, lengths or layout.lengths)
    return chain_loss(adapter.row, chain, packed.verifier[0], weights, loss=loss, lm_head=lm_head)


def steps_of(row: Level, loss: LossKind | None, unroll_steps: int) -> int:
    """Steps of the chain that a loss holds against the verifier."""
    is_seeds = (loss or row.loss) == "feature" and row.same_position
    return unroll_steps if row.feedback and not is_seeds else 1


def chain_loss(
    row: Level,
    chain: Sequence[Float[Tensor, "N D"]],
    target: Float[Tensor, "N D"],
    weights: Weights,
    *,
    loss: LossKind | None = None,
    lm_head: Float[Tensor, "V D"] | None = None,
) -> Float[Tensor, ""]:
    """``adapter_loss`` of a chain that was unrolled already."""
    kind = loss or row.loss
    if kind == "token":
        assert lm_head is not None, "the token loss needs the LM head"
        return token_loss(chain, target, weights, row.shift, lm_head)
    if row.same_position:
        return eagle_loss(chain[0], target, weights)
    total = target.new_zeros(())
    for k, out in enumerate(chain):
        total = total + STEP_DECAY**k * feature_loss(out, target, weights, row.shift + k)
    return total


class Weights:
    """Of each row, its weight in the mean over rows whose target lies within the answer."""

    def __init__(self, layout: Layout, lengths: Sequence[int]) -> None:
        self._remaining, self._lengths = layout.remaining, lengths

    def __call__(self, offset: int) -> Float[Tensor, " N"]:
        """Rows by the position of their output, where the target is ``offset`` on."""
        count = sum(max(0, length - offset) for length in self._lengths)
        return (self._remaining > offset) / max(1, count)


def feature_loss(
    prediction: Float[Tensor, "N D"], target: Float[Tensor, "N D"], weights: Weights, offset: int
) -> Float[Tensor, ""]:
    """The seed's: masked MSE + 0.5 (1 - cosine), each a mean over real positions."""
    distance = 1.0 - cosine_similarity(prediction, target.roll(-offset, dims=0), dim=-1)
    weight = weights(offset).to(distance.dtype)
    return squared_error(prediction, target, weights, offset) + 0.5 * weight @ distance


def eagle_loss(
    prediction: Float[Tensor, "N D"], target: Float[Tensor, "N D"], weights: Weights
) -> Float[Tensor, ""]:
    """The seed's for L5, B1 and L5F: half aligns position t, half predicts position t + 1."""
    align = feature_loss(prediction, target, weights, 0)
    return 0.5 * align + 0.5 * squared_error(prediction, target, weights, 1)


def squared_error(
    prediction: Float[Tensor, "N D"], target: Float[Tensor, "N D"], weights: Weights, offset: int
) -> Float[Tensor, ""]:
    """Mean over positions and widths of ``(prediction[t] - target[t + offset])^2``."""
    error = (prediction - target.roll(-offset, dims=0)).square().mean(dim=-1)
    return weights(offset).to(error.dtype) @ error


def token_loss(
    chain: Sequence[Float[Tensor, "N D"]],
    target: Float[Tensor, "N D"],
    weights: Weights,
    shift: int,
    lm_head: Float[Tensor, "V D"],
) -> Float[Tensor, ""]:
    """``sum_k 0.8^k mean KL(verifier || adapter)`` in nats, through the frozen LM head.

    ``chain[k][t]`` is held against ``target[t + shift + k]``.
    """
    # Moved onto its target's position, a step shares the verifier's distribution with all others.
    offsets = [shift + k for k in range(len(chain))]
    students = torch.stack([x.roll(o, dims=0) for x, o in zip(chain, offsets, strict=True)])
    decayed = torch.stack([STEP_DECAY**k * weights(o).roll(o) for k, o in enumerate(offsets)])
    loss: Tensor = _HeadKL.apply(  # type: ignore[no-untyped-call]
        students, target, decayed.to(target.dtype), lm_head
    )
    return loss


class _HeadKL(torch.autograd.Function):
    """Weighted KL divergence through a frozen linear head, in chunks of rows.

    With ``m = sum_v p_v W_v``, the head's mean row under the teacher, a student state ``s`` has
    ``KL = sum_v p_v log p_v - s.m + logsumexp(W s)`` and the gradient ``sum_v q_v W_v - m``: so
    the teacher is weighed once for all steps, and no logits outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, students: Tensor, teacher: Tensor, weights: Tensor, lm_head: Tensor
    ) -> Tensor:
        """students [S,N,D], teacher [N,D], weights [S,N], lm_head [V,D] -> scalar"""
        head = _Head(lm_head, students.device)
        gradient = torch.empty_like(students) if ctx.needs_input_grad[0] else None
        total = teacher.new_zeros(())
        for first in range(0, teacher.shape[0], head.num_rows):
            rows = slice(first, first + head.num_rows)
            log_p = log_softmax(head.logits(teacher[rows]), dim=-1)
            p = log_p.exp()
            mean, negentropy = head.mean(p), log_p.mul_(p).sum(dim=-1)
            for step, student in enumerate(students[:, rows]):
                logits, weight = head.logits(student), weights[step, rows]
                log_q = log_softmax(logits, dim=-1)
                normaliser = logits[:, 0] - log_q[:, 0]
                total += weight @ (negentropy - (student * mean).sum(dim=-1) + normaliser)
                if gradient is not None:
                    away = head.mean(log_q.exp_()) - mean
                    gradient[step, rows] = away.mul_(weight[:, None])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None


class _Head:
    """The LM head's two products: halved in precision, but for their sums, where training is."""

    def __init__(self, lm_head: Float[Tensor, "V D"], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.num_rows = max(ROWS, _GPU_LOGITS // len(lm_head)) if is_cuda else ROWS
        is_mixed = is_cuda and torch.is_autocast_enabled("cuda")
        self._weight = lm_head.to(torch.get_autocast_dtype("cuda")) if is_mixed else lm_head
        self._is_mixed = is_mixed

    def logits(self, states: Float[Tensor, "rows D"]) -> Float[Tensor, "rows V"]:
        return self._product(states, self._weight)

    def mean(self, probabilities: Float[Tensor, "rows V"]) -> Float[Tensor, "rows D"]:
        """The head's mean row under each distribution."""
        return self._product(probabilities, self._weight.mT)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._is_mixed:
            return product(x, weight)
        with torch.autocast("cuda", enabled=False):
            return torch.mm(x.to(weight.dtype), weight.mT, out_dtype=torch.float32)
