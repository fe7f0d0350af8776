"""Costs that a modelled speedup assumes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from xsd.errors import XsdError


@dataclass(frozen=True)
class CostsConfig:
    """Times in milliseconds; the defaults are the published trace (RTX 4090, 4-bit)."""

    gamma: int = 5
    """Drafts a verifier call of decode."""
    drafter_prefill_ms: float = 130.0
    """Drafter's vision and prefill."""
    verifier_prefill_ms: float = 310.0
    """Verifier's vision and prefill."""
    drafter_step_ms: float = 10.0
    """One drafter step."""
    verifier_step_ms: float = 14.6
    """One verifier step of one row."""
    adapter_ms: float = 1.5
    """Adapter and LM head for one token."""
    pass_ms: str = ""
    """Verifier passes of several rows, as rows:ms (6:52,22:68); empty: each costs one step."""

    verifier_slowdown: float = 1.0
    """How much longer the verifier's prefill takes while the drafter works (kappa)."""
    drafter_slowdown: float = 1.0
    """How much longer the drafter takes while the verifier prefills."""

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise XsdError(f"gamma={self.gamma}: must be at least 1")
        for side in ("verifier", "drafter"):
            if not (slowdown := getattr(self, f"{side}_slowdown")) >= 1:
                raise XsdError(
                    f"{side}_slowdown={slowdown}: must be at least 1 (1: both at once cost nothing)"
                )
        self.passes()

    def passes(self) -> dict[int, float]:
        """``pass_ms`` by number of rows.

        Raises:
            XsdError: it does not read rows:ms, comma-separated.
        """
        try:
            pairs = (item.split(":") for item in self.pass_ms.split(",") if item.strip())
            return {int(rows): float(ms) for rows, ms in pairs}
        except ValueError as error:
            raise XsdError(
                f"pass_ms={self.pass_ms!r}: write rows:ms, such as 6:52,22:68"
            ) from error
