"""X1 and E3: adapters that look at the verifier's own visual states."""

from __future__ import annotations

from xsd.adapters.attention import AttentionAdapter
from xsd.adapters.eagle import TokenHead


class VisualAttentionAdapter(AttentionAdapter):
    """X1: causal L4 with cross-attention to the projected visual tokens.

    They are ready long before the verifier's prefill ends, so X1 can draft in the gap.
    """

    memory = "visual"


class VisualTokenHead(TokenHead):
    """E3: E1 with cross-attention to the prefilled visual states."""

    memory = "visual"
