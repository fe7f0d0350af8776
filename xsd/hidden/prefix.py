"""The prefix that all questions of a clip share, computed once and lent to every answer.

``SharedPrefix`` is a view of a decoder: what is decoded through it needs only the question, yet
has the whole prompt behind it. So the one decoding loop (``pairs.generate``) serves as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.errors import XsdError
from xsd.pairs.base import Decoder, Media, Prompt
from xsd.pairs.cache import KVCache


class SharedPrefix(Decoder):
    """A decoder whose batches begin with the prefixes of some clips, clip after clip.

    Row ``i`` of a batch of B questions belongs to clip ``i * num_clips // B``: as many questions a
    clip, in clip order.

    Attributes:
        prefixes: their embeddings; the visual tokens come last.
        states: their states after the final norm.
    """

    def __init__(self, decoder: Decoder, prefixes: Float[Tensor, "clips L D"]) -> None:
        # A view: weights, tokenizer and everything else are the decoder's own.
        self.__dict__.update(decoder.__dict__)
        self._decoder = decoder
        self.prefixes = prefixes
        num_clips, self._length, _ = prefixes.shape
        self._prefix_cache = decoder.new_cache(num_clips, self._length)
        self.states: Float[Tensor, "clips L D"] = decoder.forward(prefixes, self._prefix_cache)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return self._decoder.new_cache(batch, self._length + max_length)

    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        if cache.length == 0:
            cache.expand_from(self._prefix_cache)
        return self._decoder.forward(x, cache)

    def prompt(self, question: str) -> Prompt:
        return self._decoder.prompt(question)

    def pixels(self, media: Media) -> Float[Tensor, "N 3 H W"]:
        return self._decoder.pixels(media)

    def visual_tokens(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "visual D"]:
        return self._decoder.visual_tokens(pixels)


def share_prefix(
    decoder: Decoder,
    visuals: Sequence[Float[Tensor, "visual D"]],
    questions: Sequence[str],
    max_new_tokens: int,
) -> tuple[SharedPrefix, list[Float[Tensor, "_R D"]]]:
    """Prefill what the questions of some clips have in common.

    Returns:
        The view, and for every clip and question (clip after clip) the rest of its prompt.

    Raises:
        XsdError: prompt and answer need more positions than the model has.
    """
    prompts = [decoder.prompt(question) for question in questions]
    before = prompts[0].before
    assert all(prompt.before == before for prompt in prompts), "prompts differ before the question"
    length = len(before) + len(visuals[0])
    whole = [decoder.embed_prompt(prompts[0], visual)[0] for visual in visuals]
    rests = [decoder.embed_prompt(prompt, visuals[0])[0, length:] for prompt in prompts]
    needed = length + max(len(rest) for rest in rests) + max_new_tokens
    if needed > decoder.stack.max_positions:
        raise XsdError(
            f"prompt and {max_new_tokens} new tokens take {needed} positions, the model has "
            f"{decoder.stack.max_positions}; lower --max_new_tokens"
        )
    return SharedPrefix(decoder, torch.stack([x[:length] for x in whole])), rests * len(visuals)
