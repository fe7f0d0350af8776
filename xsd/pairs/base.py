"""What a pair is made of: two multimodal decoders with one interface.

A third pair is one module that builds two ``Decoder`` objects: everything after this room works
with the names below and knows no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from xsd.pairs.cache import KVCache
from xsd.pairs.choose import Chooser
from xsd.pairs.config import PairConfig
from xsd.pairs.device import to_device


@dataclass(frozen=True, slots=True)
class Media:
    """A scene in host memory: where the clock of every measurement starts."""

    event_images: Sequence[UInt8[np.ndarray, "_H _W 3"]]
    """The events, rendered in equal shares; sizes may differ from part to part."""
    frames: UInt8[np.ndarray, "N H W 3"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids around one visual placeholder: ``before``, the visual tokens, ``after``."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a decoder makes of some rows; what nobody asks for is not computed."""

    states: Float[Tensor, "R D"]
    """After the final norm."""
    best: Callable[[], Int[Tensor, " R"]]
    """The likeliest ids, where they are found."""
    logits: Callable[[], Float[Tensor, "R V"]]

    def choose(self) -> list[int]:
        """The likeliest ids; waits for a GPU."""
        ids: list[int] = self.best().tolist()
        return ids


@runtime_checkable
class Stack(Protocol):
    """A cached language model: its layers and its final norm, between embedding and LM head."""

    width: int
    max_positions: int
    """Positions the model was made for: prompt, visual tokens and answer."""
    device: torch.device
    dtype: torch.dtype

    def new_cache(self, batch: int, max_length: int) -> KVCache: ...

    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        """R rows behind what ``cache`` holds: append them, return states after the final norm."""
        ...


class Decoder(ABC):
    """A multimodal decoder: media and a question in, hidden states and logits out.

    Attributes:
        stack: the cached language model.
        width: size of its hidden states.
        vocab_size: ids it chooses among: rows of its LM head, or fewer (``limit_vocab``).
        eos_ids: ids that end an answer.
    """

    stack: Stack
    tokenizer: Any
    width: int
    vocab_size: int
    eos_ids: frozenset[int]
    embedding: Float[Tensor, "V D"]
    lm_head: Any
    """Module from states to logits of the ids that are chosen among."""

    def __init__(
        self,
        stack: Stack,
        embedding: Float[Tensor, "V D"],
        lm_head: Any,
        tokenizer: Any,
        eos_ids: frozenset[int],
    ) -> None:
        self.stack = stack
        self.width = stack.width
        self.embedding = embedding
        self.lm_head = lm_head
        self.vocab_size = int(lm_head.out_features)
        self._choose: Chooser | None = None
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids

    @abstractmethod
    def prompt(self, question: str) -> Prompt:
        """The one place where a question becomes this model's prompt."""

    @abstractmethod
    def pixels(self, media: Media) -> Float[Tensor, "N 3 H W"]:
        """The model's image processor on its own half of the media (host work)."""

    @abstractmethod
    def visual_tokens(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "visual D"]:
        """Vision tower and projector: the embeddings that replace the placeholder."""

    def embed(self, ids: Int[Tensor, "B R"]) -> Float[Tensor, "B R D"]:
        return self.embedding[ids]

    def embed_prompt(
        self, prompt: Prompt, visual: Float[Tensor, "visual D"]
    ) -> Float[Tensor, "1 P D"]:
        before, after = (self._embed_ids(ids) for ids in (prompt.before, prompt.after))
        return torch.cat([before, visual.to(before.dtype), after])[None]

    def prompt_embeddings(self, media: Media, question: str) -> Float[Tensor, "1 P D"]:
        """Media and question to the language model's input rows (everything before prefill)."""
        return self.embed_prompt(self.prompt(question), self.visual_tokens(self.pixels(media)))

    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        """R rows behind the cache; states after the final norm."""
        return self.stack.forward(x, cache)

    def prefill(
        self, x: Float[Tensor, "B R D"], cache: KVCache, num_states: int
    ) -> Float[Tensor, "B n D"]:
        """``forward`` where only the last ``num_states`` rows' states are asked for: a stack that
        need not make the others overrides this."""
        return self.forward(x, cache)[:, x.shape[1] - num_states :]

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        logits: Tensor = self.lm_head(hidden)
        return logits

    def choose(self, hidden: Float[Tensor, "*rows D"]) -> list[int]:
        """The likeliest token of every row, all rows in one list."""
        return self.chooser(hidden)

    @property
    def chooser(self) -> Chooser:
        if self._choose is None:
            self._choose = Chooser(self.lm_head)
        return self._choose

    def read(self, ids: Sequence[int] | Int[Tensor, " R"], cache: KVCache) -> Scored:
        """R tokens behind the cache: one pass of decoding, token ids in, choices out.

        Logits and choices hold until the next pass, states for good. Nothing waits for a GPU.
        """
        rows = to_device([ids], self.stack.device) if not isinstance(ids, Tensor) else ids[None]
        return self.score(self.forward(self.embed(rows), cache)[0])

    def score(self, states: Float[Tensor, "R D"]) -> Scored:
        return Scored(states, partial(self.chooser.best, states), partial(self.logits, states))

    def on_device(self, ids: Sequence[int] | Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        return ids if isinstance(ids, Tensor) else to_device(ids, self.stack.device)

    def use_cores(self, num_cores: int) -> None:
        """Let this process's models compute on so many of a CPU's cores."""
        torch.set_num_threads(num_cores)

    def prepare(self, cache: KVCache, max_rows: int) -> None:  # noqa: B027
        """Do now what the first ``read`` of up to so many tokens would otherwise do."""

    def set_row_sizes(self, sizes: Sequence[int]) -> None:  # noqa: B027
        """Let ``read`` run passes of r rows as ones of ``sizes[r - 1]`` where it can."""

    def limit_vocab(self, num_rows: int) -> None:
        """Choose among the first ``num_rows`` ids only: those that both models of a pair have."""
        if num_rows >= self.vocab_size:
            return
        self.vocab_size = num_rows
        is_matrix = type(self.lm_head) is nn.Linear and len([*self.lm_head.parameters()]) == 1
        if is_matrix:
            cut = nn.Linear(self.width, num_rows, bias=False, device="meta")
            cut.weight = nn.Parameter(self.lm_head.weight.detach()[:num_rows], requires_grad=False)
            self.lm_head = cut
        else:
            self.lm_head = _FirstRows(self.lm_head, num_rows)
        self._choose = None

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return self.stack.new_cache(batch, max_length)

    def decode_text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode([i for i in ids if i not in self.eos_ids])
        return str(text).strip()

    def _embed_ids(self, ids: tuple[int, ...]) -> Float[Tensor, "R D"]:
        return self.embedding[torch.tensor(ids, dtype=torch.long, device=self.embedding.device)]


class _FirstRows(nn.Module):
    """An LM head that is no plain matrix, and whose last ids are not chosen."""

    def __init__(self, lm_head: nn.Module, num_rows: int) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.num_rows = num_rows

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        logits: Tensor = self.lm_head(hidden)
        return logits[..., : self.num_rows]


@dataclass(frozen=True)
class ModelPair:
    """A drafter and a verifier that share a tokenizer."""

    name: str
    drafter: Decoder
    verifier: Decoder
    num_event_images: int
    num_frames: int
    quant: str
    provenance: dict[str, str]
    """Digest or hub revision of each model's weights: part of every stage's key."""

    def __post_init__(self) -> None:
        # A draft that one of the two cannot read would be no draft; checkpoints pad their heads.
        for decoder in (self.drafter, self.verifier):
            decoder.limit_vocab(self.vocab_size)

    @contextmanager
    def on_all_cores(self) -> Iterator[None]:
        """Both models compute on as many cores as PyTorch has threads (``Decoder.use_cores``)."""
        num_cores = torch.get_num_threads()
        try:
            for decoder in (self.drafter, self.verifier):
                decoder.use_cores(num_cores)
            yield
        finally:
            torch.set_num_threads(num_cores)

    @property
    def vocab_size(self) -> int:
        """Ids that both models know."""
        return min(self.drafter.vocab_size, self.verifier.vocab_size)


@dataclass(frozen=True, slots=True)
class Source:
    """What one half of a pair is made of."""

    uri: str
    """Its folder, or how else it came about."""
    digest: str
    """Of its weights and configuration, or a hub revision: part of every stage's key."""
    folder: Path | None = None
    """Of its checkpoint; None: there are no files, the weights are drawn."""


@dataclass(frozen=True, slots=True)
class PairSpec:
    """A row of the catalog."""

    default_quant: str
    sources: Callable[[PairConfig], Mapping[str, Source]]
    """``drafter`` and ``verifier``; nothing is loaded."""
    drafter: Callable[[PairConfig, str], Decoder]
    """In a precision (one of ``QUANTS``), in eval mode on its device."""
    verifier: Callable[[PairConfig, str], Decoder]
    num_frames: int
    """Frames of a clip that the verifier is shown."""
