"""The levels, a row each: what an adapter reads, what it predicts, and what selects it.

Torch is imported only when something is built, so that the rows can be listed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from xsd.adapters.config import AdapterConfig, AdapterSizes
from xsd.config import Level as LevelName
from xsd.errors import XsdError

if TYPE_CHECKING:
    from xsd.adapters.base import Adapter

Stream = Literal["drafter", "verifier", "token"]
VisualKind = Literal["projected", "prefilled"]
SelectionMetric = Literal["accepted_prefix_22", "tau_6"]


@dataclass(frozen=True, slots=True)
class Level:
    """One row: ``out[t]`` is compared with the verifier's state ``v[t + shift]``."""

    name: str
    number: int | None
    """``--level`` number of the seed document, where it had one."""
    description: str
    implementation: str
    """``module.Class`` in this package."""
    streams: tuple[Stream, ...]
    shift: Literal[0, 1]
    feedback: bool = False
    """Unrolled, it reads its own earlier predictions in place of the verifier's states."""
    visual: VisualKind | None = None
    same_position: bool = False
    """Its one output also serves the seed's same-position loss and figures."""
    loss: Literal["feature", "token"] = "feature"
    """The loss it was published with."""
    sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def phase(self) -> Literal["gap", "decode"]:
        """Where it drafts: while the verifier prefills, or between its decoding steps."""
        return "decode" if self.shift else "gap"

    @property
    def selection_metric(self) -> SelectionMetric:
        """The accept length that early stopping, sweeps and promotion go by (higher is better)."""
        return "tau_6" if self.shift else "accepted_prefix_22"

    @property
    def inputs(self) -> str:
        """For tables: ``drafter``, ``verifier + token + visual (prefilled)``."""
        visual = (f"visual ({self.visual})",) if self.visual else ()
        return " + ".join((*self.streams, *visual))


_ROWS = (
    Level(
        name="L1",
        number=1,
        description="bottleneck: one residual block through a narrow layer",
        implementation="bottleneck.Bottleneck",
        streams=("drafter",),
        shift=0,
        sizes={"bottleneck_dim": 256, "num_blocks": 1},
    ),
    Level(
        name="L2",
        number=2,
        description="three bottleneck blocks",
        implementation="bottleneck.Bottleneck",
        streams=("drafter",),
        shift=0,
        sizes={"bottleneck_dim": 256, "num_blocks": 3},
    ),
    Level(
        name="L3",
        number=3,
        description="three wide bottleneck blocks, normalised inside",
        implementation="wide.WideBottleneck",
        streams=("drafter",),
        shift=0,
        sizes={"bottleneck_dim": 1024, "num_blocks": 3},
    ),
    Level(
        name="L4",
        number=4,
        description="causal transformer block over the drafter's states",
        implementation="attention.AttentionAdapter",
        streams=("drafter",),
        shift=0,
    ),
    Level(
        name="L5",
        number=5,
        description="EAGLE core on drafter states: aligns and predicts with one output",
        implementation="eagle.EagleAdapter",
        streams=("drafter",),
        shift=1,
        same_position=True,
    ),
    Level(
        name="L5F",
        number=6,
        description="L5 on a gated fusion of drafter and verifier states",
        implementation="fused.FusedEagleAdapter",
        streams=("drafter", "verifier"),
        shift=1,
        feedback=True,
        same_position=True,
    ),
    Level(
        name="B1",
        number=None,
        description="L5 fed with the verifier's own states: no modality gap",
        implementation="eagle.VerifierEagleAdapter",
        streams=("verifier",),
        shift=1,
        feedback=True,
        same_position=True,
    ),
    Level(
        name="E1",
        number=None,
        description="EAGLE head: verifier state and embedding of the chosen token",
        implementation="eagle.TokenHead",
        streams=("verifier", "token"),
        shift=1,
        feedback=True,
        loss="token",
    ),
    Level(
        name="E2",
        number=None,
        description="E1 that also attends to coupled drafter states",
        implementation="eagle.DrafterTokenHead",
        streams=("verifier", "token", "drafter"),
        shift=1,
        feedback=True,
        loss="token",
    ),
    Level(
        name="E3",
        number=None,
        description="E1 that cross-attends to the verifier's prefilled visual states",
        implementation="bridge.VisualTokenHead",
        streams=("verifier", "token"),
        shift=1,
        feedback=True,
        visual="prefilled",
        loss="token",
    ),
    Level(
        name="X1",
        number=None,
        description="L4 that cross-attends to the verifier's projected visual tokens",
        implementation="bridge.VisualAttentionAdapter",
        streams=("drafter",),
        shift=0,
        visual="projected",
        loss="token",
    ),
    Level(
        name="text",
        number=None,
        description="control: E1 without the verifier's state, the tokens said so far alone",
        implementation="eagle.TextHead",
        streams=("token",),
        shift=1,
        loss="token",
    ),
)

LEVELS: Mapping[str, Level] = MappingProxyType({row.name: row for row in _ROWS})


def level(name: str | int) -> Level:
    """The row of a level by name (any case) or by the seed's number.

    Raises:
        XsdError: no such level; the message lists the valid ones.
    """
    return LEVELS[LevelName(name)]


def configure(
    name: str | int, d_drafter: int, d_verifier: int, sizes: AdapterSizes
) -> AdapterConfig:
    """Complete a user's sizes with a level's own and the widths of a pair."""
    row = level(name)
    chosen = {item.name: getattr(sizes, item.name) for item in fields(AdapterSizes)}
    return _resolve(
        AdapterConfig(level=row.name, d_drafter=d_drafter, d_verifier=d_verifier, **chosen)
    )


def build(config: AdapterConfig) -> Adapter:
    """A freshly initialised adapter, in training mode, on the current default device.

    Raises:
        XsdError: unknown level, or sizes that do not fit it.
    """
    row = level(config.level)
    module, _, name = row.implementation.rpartition(".")
    made: Adapter = getattr(import_module(f"xsd.adapters.{module}"), name)(_resolve(config))
    return made


def num_parameters(name: str | int, dim: int, sizes: AdapterSizes | None = None) -> int:
    """Parameters of a level at equal widths ``dim``; no memory is allocated."""
    import torch

    with torch.device("meta"):
        adapter = build(configure(name, dim, dim, sizes or AdapterSizes()))
    return sum(parameter.numel() for parameter in adapter.parameters())


def _resolve(config: AdapterConfig) -> AdapterConfig:
    row = level(config.level)
    if config.attention != "causal" and row.name != "L4":
        raise XsdError(f"level {row.name} has no --attention {config.attention}; only L4 has")
    missing: dict[str, Any] = {
        name: size for name, size in row.sizes.items() if getattr(config, name) is None
    }
    return replace(config, level=row.name, **missing)
