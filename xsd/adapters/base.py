"""What every adapter is: rows in, verifier-space states out, in parallel or step by step.

One definition serves three uses that must agree to rounding (tests/adapters hold it):

- ``forward``: all positions of a padded batch at once, teacher-forced;
- ``unroll``: from every position at once, several steps on the adapter's own predictions
  (the training-time test of EAGLE-3, arXiv:2503.01840);
- ``step``: live, a few rows at a time into a preallocated cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from xsd.adapters.block import Block
from xsd.adapters.cache import AdapterCache, Chain, Past
from xsd.adapters.catalog import Level, level
from xsd.adapters.compiled import CompiledCache, CompiledHead
from xsd.adapters.config import AdapterConfig
from xsd.adapters.layout import Layout
from xsd.adapters.live import bind
from xsd.adapters.rows import Positions, Ragged, Siblings, StepInputs
from xsd.errors import XsdError


@dataclass(frozen=True)
class Streams:
    """What an adapter may look at, teacher-forced.

    Padded, a row an answer, real positions first; whatever stands at padded ones is ignored. Or
    packed: B is 1, and ``layout`` tells where in the one row the answers lie.
    """

    drafter: Float[Tensor, "B T Dd"] | None
    """e: the drafter's states, having read the verifier's answer."""
    verifier: Float[Tensor, "B T Dv"]
    """v: the verifier's states; the target too."""
    token: Float[Tensor, "B T Dv"] | None
    """The verifier's input embeddings of ``ids``."""
    visual: Float[Tensor, "answers K Dv"] | None
    """The clip's visual vectors, projected or prefilled, as the level's row says."""
    ids: Int[Tensor, "B T"]
    """y: the verifier's answer."""
    mask: Bool[Tensor, "B T"]
    """Real positions."""
    layout: Layout | None = None
    """None: padded."""

    def packed(self) -> tuple[Streams, Layout]:
        """Real positions only, and where they lie."""
        if self.layout is not None:
            return self, self.layout
        layout = Layout(self.mask.sum(dim=1).tolist(), self.mask.shape[1]).to(self.mask.device)
        rows = {name: getattr(self, name) for name in (*_BY_POSITION, "mask")}
        real = {name: x[self.mask][None] for name, x in rows.items() if x is not None}
        return replace(self, **real, layout=layout), layout

    def to(self, device: torch.device | str) -> Streams:
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        moved = {n: x.to(device, non_blocking=True) for n, x in held.items() if x is not None}
        layout = None if self.layout is None else self.layout.to(device)
        return replace(self, **moved, layout=layout)

    def require(self, row: Level) -> None:
        """Raise XsdError unless every stream that ``row`` reads is here."""
        needed = (*row.streams, *(("visual",) if row.visual else ()))
        for name in needed:
            if getattr(self, name) is None:
                raise XsdError(f"level {row.name} reads the {name} stream, which this data lacks")


_BY_POSITION = ("drafter", "verifier", "token", "ids")


class Adapter(nn.Module, ABC):
    """Base of all levels: ``embed`` rows, run the blocks over them, ``finish``.

    Subclasses without attention leave ``blocks`` empty.
    """

    memory: ClassVar[Literal["visual", "drafter"] | None] = None
    """What cross-attention looks at."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.row: Level = level(config.level)
        # Widths are bridged once, at the entrance; equal widths need nothing.
        bridged = "drafter" in self.row.streams and config.d_drafter != config.d_verifier
        self.enter: nn.Module = (
            nn.Linear(config.d_drafter, config.d_verifier, bias=False) if bridged else nn.Identity()
        )
        self.blocks: Sequence[Block] = ()
        self._made: tuple[Any, tuple[Any, CompiledHead | None]] | None = None

    @abstractmethod
    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        """Input of the first block, and what ``finish`` mixes back in; ``at`` are the rows' answer
        positions (a slice of one position: all rows stand there)."""

    def read_tokens(self, token: Float[Tensor, "*rows Dv"]) -> Float[Tensor, "*rows Dv"]:
        """What ``embed`` needs of a token: computed before its state is known, so that live
        decoding can look it up."""
        return token

    def finish(
        self, x: Float[Tensor, "B R Dv"], residual: Float[Tensor, "B R Dv"]
    ) -> Float[Tensor, "B R Dv"]:
        return x

    @property
    def deployable(self) -> bool:
        """False where training looked at what live drafting cannot know."""
        return self.config.attention == "causal"

    def forward(self, streams: Streams) -> Float[Tensor, "B T Dv"]:
        """``out[:, t]`` predicts ``v[:, t + shift]``; rows at padded positions mean nothing."""
        return self.unroll(streams, 1)[0]

    def unroll(self, streams: Streams, num_steps: int) -> list[Float[Tensor, "B T Dv"]]:
        """Draft ``num_steps`` states from every position at once; packed if ``streams`` are.

        Element ``k`` at ``[:, t]`` predicts ``v[:, t + shift + k]`` from true inputs up to ``t``
        and, after ``t``, the true tokens and drafter states but the adapter's own predictions in
        place of the verifier's states. Where ``t + shift + k`` passes the end it means nothing.
        """
        streams.require(self.row)
        packed, layout = streams.packed()
        self.check_length(layout.length + num_steps - 1)
        chain = self._chain(packed, layout)
        if packed.token is not None and "token" in self.row.streams:
            packed = replace(packed, token=self.read_tokens(packed.token))
        positions = layout.positions[None]
        outputs: list[Tensor] = []
        for k in range(num_steps if self.row.feedback else 1):
            chain.begin(k)
            states = outputs[-1] if outputs else packed.verifier
            outputs.append(self._run(_rows(packed, states, k), positions + k, chain))
        if not self.row.feedback:
            outputs = [outputs[0].roll(-k, dims=1) for k in range(num_steps)]
        return outputs if streams.layout else [layout.pad(out[0]) for out in outputs]

    @torch.no_grad()
    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        visual: Float[Tensor, "clips K Dv"] | None = None,
    ) -> AdapterCache | CompiledCache:
        """Room for ``max_length`` rows, with the weights as they are now.

        Visual vectors, of one clip or of each batch row's, are projected here, once.

        Raises:
            XsdError: bidirectional attention, no visual vectors where the level attends to them,
                or more rows than learned positions.
        """
        if not self.deployable:
            raise XsdError("bidirectional attention sees the future: it cannot draft live")
        if self.memory == "visual" and visual is None:
            raise XsdError(
                f"level {self.row.name} needs the clip's {self.row.visual} visual states"
            )
        self.check_length(max_length)
        twin, compiled = self._live()
        cache: AdapterCache | CompiledCache
        if compiled is not None:
            cache = CompiledCache(compiled, batch_size, max_length)
            cache.begin_sample(visual)
            return cache
        cache = AdapterCache(
            twin,
            num_layers=len(self.blocks),
            batch_size=batch_size,
            num_heads=self.config.num_heads,
            head_dim=self.config.d_verifier // self.config.num_heads,
            max_length=max_length,
            like=next(self.parameters()),
        )
        cache.begin_sample(visual)
        return cache

    def step(
        self,
        rows: StepInputs,
        cache: AdapterCache | CompiledCache,
        where: Siblings | Ragged | None = None,
    ) -> Float[Tensor, "B R Dv"]:
        """Append rows to the cache and return their outputs.

        Rolling back is ``cache.length = n``: the next rows overwrite what was beyond. Rows that are
        ``Siblings`` do not follow each other but stand at one answer position of a draft tree.
        ``Ragged`` rows are rolled back by naming earlier positions; ``length`` does not count them.
        """
        if isinstance(cache, CompiledCache):
            return cache.step(rows, where)
        twin: Adapter = cache.twin
        if isinstance(where, Ragged):
            assert self.memory != "drafter", "drafter states are cached for one answer at a time"
            cache.begin_ragged(where.positions, where.end)
            return twin._run(rows, where.positions, cache)
        start = cache.length
        given = (rows.verifier, rows.drafter, rows.token)
        num_rows = next(x.shape[1] for x in given if x is not None)
        visible = None if where is None else where.visible
        cache.begin(num_rows, ahead=self.memory == "drafter", visible=visible)
        at = slice(start, start + num_rows)
        if where is not None:
            at = slice(where.position, where.position + 1)
        if self.memory == "drafter":
            states = twin.enter(rows.drafter)
            for layer, block in enumerate(twin.blocks):
                cache.extend_memory(layer, block.project_memory(states))
        out = twin._run(rows, at, cache)
        cache.length = start + num_rows
        return out

    def step_at(
        self, rows: StepInputs, at: Int[Tensor, " R"], past: Past
    ) -> Float[Tensor, "B R Dv"]:
        """A step whose rows, and what they may look at, are given on the device."""
        return self._run(rows, at, past)

    def compiled(self) -> CompiledHead | None:
        """The weights as a compiled step takes them, for levels that have one."""
        return None

    def _live(self) -> tuple[Any, CompiledHead | None]:
        """A twin (``live.bind``), and a compiled one where there is one; made anew only when the
        weights have changed."""
        parameters = list(self.parameters())
        stamp = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in parameters)
        if self._made is None or self._made[0] != stamp:
            compiles = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in parameters)
            # Not set as an attribute: a module would take the twin for a part of itself.
            self.__dict__["_made"] = stamp, (bind(self), self.compiled() if compiles else None)
        assert self._made is not None
        return self._made[1]

    def _run(self, rows: StepInputs, at: Positions, past: Past) -> Tensor:
        x, residual = self.embed(rows, at)
        for layer, block in enumerate(self.blocks):
            x = block.run(x, past, layer)
        return self.finish(x, residual)

    def _chain(self, packed: Streams, layout: Layout) -> Chain:
        source = packed.visual if self.memory == "visual" else None
        if self.memory == "drafter":
            source = self.enter(packed.drafter)
        memory = [] if source is None else [block.project_memory(source) for block in self.blocks]
        return Chain(
            layout,
            memory,
            ahead=self.memory == "drafter",
            bidirectional=self.config.attention == "bidirectional",
        )

    def check_length(self, length: int) -> None:
        """Raise XsdError where there are more rows than learned positions."""
        if length > self.config.max_positions:
            raise XsdError(
                f"{length} answer positions exceed max_positions={self.config.max_positions}; "
                "raise it and train again"
            )


def advance(x: Shaped[Tensor, "B T *rest"], k: int) -> Shaped[Tensor, "B T *rest"]:
    """``out[:, t] = x[:, t + k]``, zero beyond the end."""
    return pad(x[:, k:], (0, 0) * (x.ndim - 2) + (0, min(k, x.shape[1]))) if k else x


def _rows(packed: Streams, verifier: Tensor, k: int) -> StepInputs:
    """Inputs of step ``k``; what comes round the end of an answer belongs to no target."""
    ahead = (x if x is None else x.roll(-k, dims=1) for x in (packed.drafter, packed.token))
    drafter, token = ahead
    return StepInputs(drafter, verifier, token)
