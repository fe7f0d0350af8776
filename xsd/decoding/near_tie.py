"""When two roundings of one model may disagree: the rule that excuses a difference.

In reduced precision a pass over many rows rounds differently from a pass over one. Where plain
decoding's best two tokens are nearer to each other than that, the rounding decides, not the draft.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.pairs.base import Decoder, Media


@torch.inference_mode()
def is_near_tie(
    verifier: Decoder,
    media: Media,
    question: str,
    plain: Sequence[int],
    position: int,
    rows: Collection[int],
) -> bool:
    """Whether rounding may decide token ``position`` of a plain answer.

    Plain decoding's top-1/top-2 gap there is compared with twice the largest difference of any
    logit, up to there, between passes of one row and of any number in ``rows``: the ones that were
    run. Never so in float32, where any difference is an error.
    """
    if verifier.stack.dtype == torch.float32 or not 0 < position < len(plain):
        return False
    embeds = verifier.prompt_embeddings(media, question)
    said = torch.tensor([plain[:position]], device=embeds.device)
    one = _logits(verifier, embeds, said, 1)
    best, second = one[-1].topk(2).values.tolist()
    return any(
        best - second < 2 * float((one - _logits(verifier, embeds, said, size)).abs().max())
        for size in sorted(set(rows) - {1})
    )


def _logits(
    verifier: Decoder, prompt: Float[Tensor, "1 P D"], said: Tensor, rows: int
) -> Float[Tensor, "positions V"]:
    """Of the tokens after the prompt and after each token of ``said``, ``rows`` of them a pass."""
    cache = verifier.new_cache(1, prompt.shape[1] + said.shape[1])
    states = [verifier.forward(prompt, cache)[0, -1:]]
    states += [verifier.forward(x, cache)[0] for x in verifier.embed(said).split(rows, dim=1)]
    return verifier.logits(torch.cat(states)).float()
