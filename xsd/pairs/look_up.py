"""NF4 codes to bfloat16 as PTX, without memory: a table of 16 in the bits of eight constants."""

from __future__ import annotations

import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The format's values (QLoRA, arXiv:2305.14314, appendix E)."""


def nf4_look_up() -> str:
    """PTX from four bytes (``$4``) to the values of their upper codes, two a register (``$0``,
    ``$1``), and of their lower ones (``$2``, ``$3``).

    ``prmt`` chooses four of eight bytes by three bits each. So two of them look up four codes'
    lower (or upper) bytes in either half of the table, and a code's fourth bit says which counts.
    """
    lines = [".reg .b32 code, half, mask, a, b, low, high;"]
    for part, (first, second) in enumerate((("$0", "$2"), ("$1", "$3"))):
        lines += [
            f"shr.b32 code, $4, {16 * part};",
            "shr.b32 half, code, 3;",
            "and.b32 half, half, 0x1111;",
            # Byte 0 of this constant is empty, byte 1 full.
            "prmt.b32 mask, 0xff00, 0, half;",
            "and.b32 code, code, 0x7777;",
        ]
        for name, table in (("low", _bytes_of(0)), ("high", _bytes_of(1))):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, code;",
                f"prmt.b32 b, {table[2]}, {table[3]}, code;",
                # Where the mask is set b, else a.
                f"lop3.b32 {name}, a, b, mask, 0xd8;",
            ]
        lines += [
            f"prmt.b32 {first}, low, high, 0x7351;",
            f"prmt.b32 {second}, low, high, 0x6240;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


def _bytes_of(which: int) -> list[str]:
    """The lower (0) or upper (1) bytes of all values, four a register."""
    bits = torch.tensor(NF4).bfloat16().view(torch.int16).tolist()
    found = [(value >> (8 * which)) & 0xFF for value in bits]
    return [
        hex(sum(byte << (8 * place) for place, byte in enumerate(found[start : start + 4])))
        for start in range(0, 16, 4)
    ]
