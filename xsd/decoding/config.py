"""Decoding options and the names of strategies. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.errors import XsdError

GAP_LEVELS = ("L1", "L2", "L3", "L4", "X1")
HEAD_LEVELS = ("L5", "B1", "L5F", "E1", "E2", "E3")
CONTROL_HEADS = ("text", "ngram", "oracle", "synthetic")
"""Heads that never look at the scene: a level that reads tokens alone, rote, the answer in hand."""
GOING_ON = "drafter"
"""The head of a strategy whose gap does not end with the prefill."""
TREE_HEADS = ("E1", "E3", "text")
"""Those that read tokens, without which all branches would be one, and no drafter, which would have
to read every branch."""
MAX_GAMMA, MAX_TREE_NODES = 16, 63
BASELINE = "vl_baseline"
AGAIN = f"{BASELINE}:again"
"""Plain decoding under another name, an A/A test: what its ratios to the baseline show is noise of
the clock."""
ALL_CONFIGS = (
    BASELINE,
    AGAIN,
    *(f"{level}+VL" for level in GAP_LEVELS),
    "L4+VL:free",
    *(f"{level}_decode" for level in HEAD_LEVELS),
    "L4+L5F",
    "X1+E3",
    f"X1+{GOING_ON}",
    "drafter+VL",
    "template+VL",
    "E1_tree",
    "E3_tree",
    "text",
    "ngram",
    "oracle",
)


@dataclass(frozen=True)
class DecodingConfig:
    """How drafts are made and checked."""

    max_new_tokens: int = 50
    """Longest answer."""
    gamma: int = 8
    """Drafts per verifier call in decode, at most (the seed's benchmark: 1)."""
    policy: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: draft and verify only what pays by measured costs and the drafter's confidence, and
    leave off a drafter that does not; fixed: gamma drafts, always (as batches do)."""
    tree_width: int = 3
    """Branches a node, and nodes that branch a level, in draft trees."""
    tree_nodes: int = 10
    """Largest draft tree that is verified."""
    temperature: float = 0.0
    """0: greedy; above: tokens are drawn, and follow the same distribution as by plain decoding."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this much of the probability."""
    seed: int = 0
    """Seed of the draws."""
    last_chunk: int = 0
    """Prompt rows of the last pass of a speculative prefill, which drafts that are ready join; 0:
    the prefill is one pass, and drafts are verified in another."""
    strict: bool = False
    """Every pass of decoding, plain or speculative, has one row shape, so that reduced precision
    rounds both alike; then no difference is excused as a near tie."""
    overlap: Literal["auto", "process", "stream", "inline"] = "auto"
    """process: the drafter runs beside the verifier's prefill in a process of its own (a CPU);
    stream: in a thread, on a stream of its own (one GPU or two); inline: it runs before the prefill
    in the same process, and its time counts in full; auto: stream if it is on a GPU, else
    process."""
    max_gap_drafts: int = 22
    """No more drafts than this in the prefill gap (inline: exactly so many)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "gamma", "tree_width", "tree_nodes"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_gap_drafts < 0:
            raise XsdError(f"max_gap_drafts={self.max_gap_drafts}: must not be negative")
        if self.gamma > MAX_GAMMA:
            raise XsdError(f"gamma={self.gamma}: at most {MAX_GAMMA} drafts a cycle")
        if self.temperature < 0:
            raise XsdError(f"temperature={self.temperature}: 0 is greedy, below is nothing")
        if not 0.0 < self.top_p <= 1.0:
            raise XsdError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.last_chunk < 0:
            raise XsdError(f"last_chunk={self.last_chunk}: must not be negative")
        if self.strict and self.last_chunk:
            raise XsdError(
                f"strict: last_chunk={self.last_chunk} gives the speculative prefill another shape "
                "than the plain one; leave one of them out"
            )
        if self.strict and self.temperature > 0:
            raise XsdError(
                f"strict: temperature={self.temperature} draws tokens, and no two answers need be "
                "equal; leave one of them out"
            )
        if self.tree_nodes > MAX_TREE_NODES:
            raise XsdError(f"tree_nodes={self.tree_nodes}: at most {MAX_TREE_NODES}")
