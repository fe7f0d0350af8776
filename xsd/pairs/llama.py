"""A decoder whose language model is transformers' ``LlamaModel``: both halves of both pairs."""

from __future__ import annotations

from typing import Any

from xsd.pairs.base import Decoder
from xsd.pairs.step import DecoderStack


class LlamaDecoder(Decoder):
    """Takes the language model over: its projections are fused."""

    stack: DecoderStack

    def __init__(self, language_model: Any, lm_head: Any, tokenizer: Any, generation: Any) -> None:
        """``language_model``: a transformers ``LlamaModel``, in eval mode and on its device.

        ``generation``: its ``GenerationConfig``, for the ids that end an answer.
        """
        eos = generation.eos_token_id
        if eos is None:
            eos = language_model.config.eos_token_id
        super().__init__(
            DecoderStack(language_model),
            language_model.embed_tokens.weight.detach(),
            lm_head,
            tokenizer,
            frozenset(eos if isinstance(eos, list) else [eos]),
        )
