"""transformers' own ``generate`` on the verifier: the peer that our decoding is held against."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.errors import XsdError
from xsd.pairs.base import Decoder


class Peer:
    """Greedy answers by the library's own loop, cache and visual path, on the same weights.

    Raises:
        XsdError: the verifier is no model that the library could run by itself.
    """

    def __init__(self, verifier: Decoder) -> None:
        model: Any = getattr(verifier, "model", None)
        token = getattr(getattr(model, "config", None), "video_token_index", None)
        if token is None or not hasattr(model, "generate"):
            raise XsdError(f"{type(verifier).__name__} is no video model that transformers can run")
        self._verifier, self._model, self._token = verifier, model, int(token)

    @torch.inference_mode()
    def answer(
        self,
        pixels: Float[Tensor, "N 3 H W"],
        question: str,
        max_new_tokens: int,
        **options: Any,
    ) -> list[int]:
        """Token ids, EOS included. ``options`` go to ``generate``: an ``assistant_model``, say."""
        verifier, device = self._verifier, self._verifier.stack.device
        prompt = verifier.prompt(question)
        visual = [self._token] * self._num_visual(pixels)
        ids = torch.tensor([[*prompt.before, *visual, *prompt.after]], device=device)
        eos = sorted(verifier.eos_ids)
        said = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels[None].to(device, verifier.stack.dtype),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
            **options,
        )
        found: list[int] = said[0, ids.shape[1] :].tolist()
        return found

    def _num_visual(self, pixels: Float[Tensor, "N 3 H W"]) -> int:
        side = int(self._model.config.vision_config.patch_size)
        patches = (pixels.shape[2] // side) * (pixels.shape[3] // side)
        return len(pixels) * (patches + 1)
