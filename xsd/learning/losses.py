"""The losses of adapters: pure, over real positions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, pad

from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import Level
from xsd.learning.config import LossKind

STEP_DECAY = 0.8
"""Weight of each further unrolled step: an error deep in a chain is reached less often."""
ROWS = 256
"""Positions whose logits are held at once: a small vocabulary's then stay in a core's cache."""


def adapter_loss(
    adapter: Adapter,
    streams: Streams,
    *,
    loss: LossKind | None = None,
    unroll_steps: int = 1,
    lm_head: Float[Tensor, "V Dv"] | None = None,
) -> Float[Tensor, ""]:
    """The training loss of a batch; ``loss`` None takes the level's own.

    Heads that feed back are unrolled, but for the seed's feature loss of L5, B1 and L5F.
    """
    row: Level = adapter.row
    kind = loss or row.loss
    if kind == "feature" and row.same_position:
        return eagle_loss(adapter(streams), streams.verifier, streams.mask)
    chain = adapter.unroll(streams, unroll_steps if row.feedback else 1)
    if kind == "token":
        assert lm_head is not None, "the token loss needs the LM head"
        return token_loss(chain, streams.verifier, streams.mask, row.shift, lm_head)
    total = streams.verifier.new_zeros(())
    for k, out in enumerate(chain):
        total = total + STEP_DECAY**k * feature_loss(
            *shifted(out, streams.verifier, streams.mask, row.shift + k)
        )
    return total


def feature_loss(
    prediction: Float[Tensor, "B T D"], target: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """The seed's: masked MSE + 0.5 (1 - cosine), each a mean over real positions."""
    cosine = masked_mean(cosine_similarity(prediction, target, dim=-1), mask)
    return masked_mse(prediction, target, mask) + 0.5 * (1.0 - cosine)


def eagle_loss(
    prediction: Float[Tensor, "B T D"], target: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """The seed's for L5, B1 and L5F: half aligns position t, half predicts position t + 1."""
    align = feature_loss(prediction, target, mask)
    return 0.5 * align + 0.5 * masked_mse(*shifted(prediction, target, mask, 1))


def token_loss(
    chain: Sequence[Float[Tensor, "B T D"]],
    target: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"],
    shift: int,
    lm_head: Float[Tensor, "V D"],
) -> Float[Tensor, ""]:
    """``sum_k 0.8^k mean KL(verifier || adapter)`` in nats, through the frozen LM head.

    ``chain[k][:, t]`` is held against ``target[:, t + shift + k]``.
    """
    length = target.shape[1]
    offsets = [min(shift + k, length) for k in range(len(chain))]
    # Moved onto its target's position, a step shares the verifier's distribution with all others.
    onto = [pad(x[:, : length - o], (0, 0, o, 0)) for x, o in zip(chain, offsets, strict=True)]
    position = torch.arange(length, device=mask.device)
    valid = torch.stack([mask & (position >= o) for o in offsets]).to(target.dtype)
    decay = STEP_DECAY ** torch.arange(len(chain), device=mask.device, dtype=target.dtype)
    weights = valid * (decay / valid.sum(dim=(1, 2)).clamp(min=1.0))[:, None, None]
    students = torch.stack(onto)[:, mask]
    loss: Tensor = _HeadKL.apply(  # type: ignore[no-untyped-call]
        students, target[mask], weights[:, mask], lm_head
    )
    return loss


def masked_mse(
    prediction: Float[Tensor, "B T D"], target: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    return masked_mean((prediction - target).square().mean(dim=-1), mask)


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over real positions; 0 where there is none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def shifted(
    prediction: Float[Tensor, "B T D"],
    target: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"],
    offset: int,
) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
    """Pair ``prediction[t]`` with ``target[t + offset]``; the last real positions have none."""
    length = max(0, prediction.shape[1] - offset)
    return prediction[:, :length], target[:, offset:], mask[:, offset:]


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
        gradient = torch.empty_like(students)
        total = students.new_zeros(())
        for first in range(0, teacher.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            log_p = log_softmax(teacher[rows] @ lm_head.T, dim=-1)
            p = log_p.exp()
            mean, negentropy = p @ lm_head, log_p.mul_(p).sum(dim=-1)
            for step, student in enumerate(students[:, rows]):
                logits = student @ lm_head.T
                log_q = log_softmax(logits, dim=-1)
                normaliser = logits[:, 0] - log_q[:, 0]
                weight = weights[step, rows]
                total += weight @ (negentropy - (student * mean).sum(dim=-1) + normaliser)
                torch.mul(log_q.exp_() @ lm_head - mean, weight[:, None], out=gradient[step, rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None, None
