"""A decoder whose language model is transformers' ``LlamaModel``: both halves of both pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.pairs.base import Decoder, Scored
from xsd.pairs.cache import KVCache
from xsd.pairs.crew import Crew
from xsd.pairs.step import DecoderStack
from xsd.pairs.vision import Features

if TYPE_CHECKING:
    from xsd.pairs.graphs import GraphedLayers


class LlamaDecoder(Decoder):
    """Takes the language model over: its projections are fused."""

    stack: DecoderStack
    features: Features
    """Of the vision tower."""
    crew: Crew
    """Shares out a clip's images."""

    def __init__(self, language_model: Any, lm_head: Any, tokenizer: Any, generation: Any) -> None:
        """``language_model``: a transformers ``LlamaModel``, in eval mode and on its device.

        ``generation``: its ``GenerationConfig``, for the ids that end an answer.
        """
        eos = generation.eos_token_id
        if eos is None:
            eos = language_model.config.eos_token_id
        self.crew = Crew()
        super().__init__(
            DecoderStack(language_model),
            language_model.embed_tokens.weight.detach(),
            lm_head,
            tokenizer,
            frozenset(eos if isinstance(eos, list) else [eos]),
        )

    def prefill(
        self, x: Float[Tensor, "B R D"], cache: KVCache, num_states: int
    ) -> Float[Tensor, "B n D"]:
        return self.stack.forward(x, cache, num_states)

    def read(self, ids: Sequence[int] | Int[Tensor, " R"], cache: KVCache) -> Scored:
        """Where passes are compiled or captured, embedding, LM head and choice are part of it."""
        compiled, graphs = self.stack.compiled, self.stack.graphs
        if compiled is not None and self.stack.tap is None and compiled.takes(len(ids), cache):
            panels = self.chooser.panels
            if panels is not None:
                table = self.embedding.numpy()
                states, chosen = compiled.read(ids, table, panels, self.vocab_size, cache)
                return Scored(
                    states, partial(torch.from_numpy, chosen), partial(self.logits, states)
                )
        if graphs is None or not graphs.takes(len(ids), cache):
            return super().read(ids, cache)
        return self._replay(graphs, self.on_device(ids), cache)

    @torch.inference_mode()
    def _replay(self, graphs: GraphedLayers, ids: Int[Tensor, " R"], cache: KVCache) -> Scored:
        # The head may have been cut since: that makes another kind of pass.
        kind = f"ids to {self.vocab_size}"
        found = graphs.replay(kind, ids, cache, self._begin, self._finish)
        cache.length += len(ids)
        states, logits, best = (rows[: len(ids)] for rows in found)
        return Scored(states.clone(), lambda: best, lambda: logits)

    def use_cores(self, num_cores: int) -> None:
        """Compiled passes share out their layers and images; PyTorch's threads, which wait for
        work by spinning, would only keep them from the cores."""
        self.crew.num_cores = num_cores
        if self.stack.compiled is None:
            super().use_cores(num_cores)
            return
        self.stack.compiled.num_cores = num_cores
        torch.set_num_threads(1)

    def prepare(self, cache: KVCache, max_rows: int) -> None:
        length = cache.length
        for num_rows in range(1, max_rows + 1):
            if self.stack.graphs is not None and length + num_rows <= cache.max_length:
                self.read([0] * num_rows, cache)
                cache.length = length

    def set_row_sizes(self, sizes: Sequence[int]) -> None:
        if self.stack.graphs is not None:
            self.stack.graphs.row_sizes = sizes

    def _begin(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        return self.embed(ids[None])[0]

    def _finish(
        self, states: Float[Tensor, "R D"]
    ) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R V"], Int[Tensor, " R"]]:
        logits = self.logits(states)
        return states, logits, logits.argmax(-1)
