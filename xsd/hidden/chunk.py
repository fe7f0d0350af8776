"""One chunk: the answers of some clips as ragged tensors, and the two file formats it may have."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd.errors import XsdError
from xsd.files import atomic_path
from xsd.hidden.precision import DTYPES, decode, encode
from xsd.hidden.sample import HiddenSample

UNKNOWN_ID = -1
"""Token id of chunks that hold none."""
_OPTIONAL = {"verifier_layers", "drafter_scale", "verifier_scale", "layers_scale"}
"""Tensors that a chunk may lack."""
_SEED_KEYS = ("egpt_hidden", "vl_hidden", "seq_lens")


@dataclass(frozen=True)
class Chunk:
    """Answers one behind the other; answer ``i`` is ``offsets[i]:offsets[i + 1]``.

    States are as they are stored; fp8 ones have a factor a position (``precision``).
    """

    drafter_hidden: Float[Tensor, "sumTd Dd"]
    verifier_hidden: Float[Tensor, "sumT Dv"]
    drafter_ids: Int[Tensor, " sumTd"]
    verifier_ids: Int[Tensor, " sumT"]
    drafter_offsets: Int[Tensor, " bounds"]
    verifier_offsets: Int[Tensor, " bounds"]
    verifier_layers: Float[Tensor, "sumT layers Dv"] | None = None
    drafter_scale: Float[Tensor, " sumTd"] | None = None
    verifier_scale: Float[Tensor, " sumT"] | None = None
    layers_scale: Float[Tensor, "sumT layers"] | None = None

    def __len__(self) -> int:
        return len(self.verifier_offsets) - 1

    def lengths(self) -> list[tuple[int, int]]:
        """The drafter's and the verifier's, of each answer."""
        sides = (self.drafter_offsets.diff().tolist(), self.verifier_offsets.diff().tolist())
        return list(zip(*sides, strict=True))

    def sample(self, row: int, key: str) -> HiddenSample:
        """Answer ``row``: views of what is stored, or (fp8) float32."""
        a, b = self.drafter_offsets[row : row + 2].tolist()
        c, d = self.verifier_offsets[row : row + 2].tolist()
        layers = self.verifier_layers
        return HiddenSample(
            key=key,
            drafter_hidden=_decoded(self.drafter_hidden, self.drafter_scale, a, b),
            verifier_hidden=_decoded(self.verifier_hidden, self.verifier_scale, c, d),
            drafter_ids=self.drafter_ids[a:b],
            verifier_ids=self.verifier_ids[c:d],
            verifier_layers=None if layers is None else _decoded(layers, self.layers_scale, c, d),
        )

    @classmethod
    def of(cls, samples: Sequence[HiddenSample], dtype: str) -> Chunk:
        """At least one answer, in order; states rounded to ``dtype`` (``precision.DTYPES``)."""
        layers = [s.verifier_layers for s in samples if s.verifier_layers is not None]
        exact = cls(
            torch.cat([s.drafter_hidden for s in samples]),
            torch.cat([s.verifier_hidden for s in samples]),
            torch.cat([s.drafter_ids for s in samples]).int(),
            torch.cat([s.verifier_ids for s in samples]).int(),
            _offsets([len(s.drafter_ids) for s in samples]),
            _offsets([len(s.verifier_ids) for s in samples]),
            torch.cat(layers) if len(layers) == len(samples) else None,
        )
        return exact.recoded(dtype)

    @classmethod
    def cat(cls, chunks: Sequence[Chunk]) -> Chunk:
        """One behind the other, as they are stored; all of one precision."""
        held = [chunk.tensors() for chunk in chunks]
        offsets = {"drafter_offsets", "verifier_offsets"}
        names = held[0].keys() - offsets
        joined = {name: torch.cat([tensors[name] for tensors in held]) for name in names}
        for name in offsets:
            lengths = torch.cat([tensors[name].diff() for tensors in held])
            joined[name] = _offsets(lengths.tolist())
        return cls(**joined)

    def recoded(self, dtype: str) -> Chunk:
        """The same answers, states rounded to another precision."""
        drafter, drafter_scale = encode(decode(self.drafter_hidden, self.drafter_scale), dtype)
        verifier, verifier_scale = encode(decode(self.verifier_hidden, self.verifier_scale), dtype)
        layers, layers_scale = self.verifier_layers, self.layers_scale
        if layers is not None:
            layers, layers_scale = encode(decode(layers, layers_scale), dtype)
        return replace(
            self,
            drafter_hidden=drafter,
            verifier_hidden=verifier,
            verifier_layers=layers,
            drafter_scale=drafter_scale,
            verifier_scale=verifier_scale,
            layers_scale=layers_scale,
        )

    def tensors(self) -> dict[str, Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Chunk:
        """Raises ValueError if they are not a chunk's."""
        names = [field.name for field in fields(cls)]
        if missing := [n for n in names if n not in tensors and n not in _OPTIONAL]:
            raise ValueError(f"it lacks {missing[0]}")
        chunk = cls(**{name: tensors[name] for name in names if name in tensors})
        _check_extras(chunk)
        for side in ("drafter", "verifier"):
            offsets = tensors[f"{side}_offsets"]
            ends = {int(offsets[-1]), *(len(tensors[f"{side}_{x}"]) for x in ("hidden", "ids"))}
            if len(ends) > 1 or int(offsets[0]) or bool((offsets.diff() < 1).any()):
                raise ValueError(f"its {side} offsets do not fit its rows")
        return chunk

    def padded(self) -> dict[str, Tensor]:
        """The published layout: float32, padded with zeros, pairs cut to the shorter one."""
        samples = [self.sample(row, "") for row in range(len(self))]
        lengths = [min(len(s.drafter_ids), len(s.verifier_ids)) for s in samples]
        sides = (
            pad_sequence(
                [getattr(s, side)[:n].float() for s, n in zip(samples, lengths, strict=True)],
                batch_first=True,
            )
            for side in ("drafter_hidden", "verifier_hidden")
        )
        return dict(zip(_SEED_KEYS, (*sides, torch.tensor(lengths)), strict=True))

    @classmethod
    def from_padded(cls, content: Mapping[str, Any]) -> Chunk:
        """Keys beyond the three of the published layout are ignored; raises ValueError."""
        if not all(isinstance(content.get(name), Tensor) for name in _SEED_KEYS):
            raise ValueError(f"it must hold the tensors {', '.join(_SEED_KEYS)}")
        drafter, verifier, lengths = (content[name] for name in _SEED_KEYS)
        shape = tuple(drafter.shape[:2])
        if drafter.ndim != 3 or verifier.ndim != 3 or tuple(verifier.shape[:2]) != shape:
            raise ValueError("its states are not [answers, positions, width] on both sides")
        if tuple(lengths.shape) != shape[:1]:
            raise ValueError(f"{tuple(lengths.shape)} seq_lens for {shape[0]} answers")
        if bool((lengths < 1).any()) or bool((lengths > shape[1]).any()):
            raise ValueError(f"its seq_lens leave the range 1 to {shape[1]}")
        real = torch.arange(shape[1]) < lengths[:, None]
        offsets = _offsets(lengths.tolist())
        ids = torch.full((int(offsets[-1]),), UNKNOWN_ID, dtype=torch.int32)
        # Files hold no tensor twice.
        return cls(drafter[real], verifier[real], ids, ids.clone(), offsets, offsets.clone())


def _decoded(
    states: Tensor, scale: Tensor | None, start: int, end: int
) -> Float[Tensor, "rows *size D"]:
    return decode(states[start:end], None if scale is None else scale[start:end])


def _check_extras(chunk: Chunk) -> None:
    layers = chunk.verifier_layers
    if layers is not None and len(layers) != len(chunk.verifier_ids):
        raise ValueError("its verifier_layers do not fit its rows")
    for states, scale in (
        (chunk.drafter_hidden, chunk.drafter_scale),
        (chunk.verifier_hidden, chunk.verifier_scale),
        (layers, chunk.layers_scale),
    ):
        is_scaled = states is not None and states.dtype == DTYPES["fp8"]
        if is_scaled != (scale is not None):
            raise ValueError("fp8 states and their factors do not come together")
        if states is not None and scale is not None and scale.shape != states.shape[:-1]:
            raise ValueError("its factors do not fit its rows")


def _offsets(lengths: Sequence[int]) -> Int[Tensor, " bounds"]:
    return torch.tensor([0, *lengths]).cumsum(0)


def write_chunk(chunk: Chunk, path: Path) -> None:
    """Write (atomic) in the format that the suffix names."""
    with atomic_path(path) as temporary:
        if path.suffix != ".pt":
            save_file(chunk.tensors(), temporary)
            return
        # A handle, because torch would put the temporary file's name into the archive.
        with temporary.open("wb") as handle:
            torch.save(chunk.padded(), handle)


def read_chunk(path: Path) -> Chunk:
    """Read a chunk: mapped, not loaded, where the format allows.

    Raises:
        XsdError: it cannot be read, or is not a chunk. No pickled code is ever run.
    """
    try:
        if path.suffix != ".pt":
            return Chunk.from_tensors(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, Mapping):
            raise ValueError("it does not hold a dict")
        return Chunk.from_padded(content)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise XsdError(f"{path}: not a chunk of hidden states ({reason}); extract again") from error


_UNREADABLE = (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError)
