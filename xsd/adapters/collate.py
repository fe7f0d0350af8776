"""Stored answers -> the packed batches that adapters read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.adapters.base import Streams
from xsd.adapters.catalog import Level
from xsd.adapters.layout import Layout
from xsd.errors import XsdError
from xsd.hidden.sample import ClipVisual, HiddenSample


class Answers:
    """Some answers' streams, one behind the other, as stored and wherever they were put.

    Free-running pairs differ in length and are cut to the shorter, as the seed did.
    """

    def __init__(
        self,
        samples: Sequence[HiddenSample],
        row: Level,
        *,
        embedding: Float[Tensor, "ids Dv"] | None = None,
        visuals: Mapping[str, ClipVisual] | None = None,
    ) -> None:
        """Args:
            samples: the answers, in order.
            row: the level that will read them; streams that it does not read are left out.
            embedding: the verifier's input embeddings, for levels that read tokens.
            visuals: by scene key, for levels that attend to visual states.

        Raises:
            XsdError: the level reads what was not given.
        """
        self.lengths = [min(len(s.drafter_ids), len(s.verifier_ids)) for s in samples]
        pairs = list(zip(samples, self.lengths, strict=True))
        self._starts = [0]
        for length in self.lengths:
            self._starts.append(self._starts[-1] + length)
        self._drafter = self._embedding = None
        if "drafter" in row.streams:
            self._drafter = torch.cat([s.drafter_hidden[:n] for s, n in pairs])
        if "token" in row.streams:
            if embedding is None:
                raise XsdError(
                    f"level {row.name} needs the verifier's embeddings; this data has none"
                )
            self._embedding = embedding
        self._verifier = torch.cat([s.verifier_hidden[:n] for s, n in pairs])
        self._ids = torch.cat([s.verifier_ids[:n] for s, n in pairs]).long()
        self._clips, self._visual = _visual(samples, row, visuals)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        held = (self._drafter, self._verifier, self._ids, self._visual)
        return sum(x.nbytes for x in held if x is not None)

    def to(self, device: torch.device | str) -> Answers:
        """Moved, in place."""
        for name in ("_drafter", "_embedding", "_verifier", "_ids", "_visual"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.to(device))
        return self

    def batch(self, which: Sequence[int] | None = None) -> Streams:
        """Answers by their numbers here, or all: packed, in float32, where the answers are."""
        device = self._ids.device
        chosen = range(len(self)) if which is None else which
        layout = Layout([self.lengths[n] for n in chosen])

        def taken(x: Tensor) -> Tensor:
            return x[None] if which is None else x.index_select(0, rows)[None]

        if which is not None:
            starts = torch.tensor([self._starts[n] for n in chosen])
            sizes = torch.tensor(layout.lengths)
            rows = (torch.repeat_interleave(starts, sizes) + layout.positions).to(device)
        ids = taken(self._ids)
        visual = None
        if self._visual is not None:
            clips = torch.tensor([self._clips[n] for n in chosen])
            visual = self._visual.index_select(0, clips.to(device)).float()
        return Streams(
            drafter=None if self._drafter is None else taken(self._drafter).float(),
            verifier=taken(self._verifier).float(),
            token=None if self._embedding is None else self._embedding[ids].float(),
            visual=visual,
            ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            layout=layout.to(device),
        )


def collate(
    samples: Sequence[HiddenSample],
    row: Level,
    *,
    embedding: Float[Tensor, "ids Dv"] | None = None,
    visuals: Mapping[str, ClipVisual] | None = None,
) -> Streams:
    """One batch of all these answers (``Answers``)."""
    return Answers(samples, row, embedding=embedding, visuals=visuals).batch()


def _visual(
    samples: Sequence[HiddenSample], row: Level, visuals: Mapping[str, ClipVisual] | None
) -> tuple[list[int], Tensor | None]:
    """Of each answer the number of its clip, and the clips' states."""
    if row.visual is None:
        return [], None
    missing = [s.scene_key for s in samples if visuals is None or s.scene_key not in visuals]
    if visuals is None or missing:
        raise XsdError(
            f"level {row.name} needs the clips' {row.visual} visual states; extract them again "
            f"(missing for {missing[0]})"
        )
    numbers = {key: n for n, key in enumerate(dict.fromkeys(s.scene_key for s in samples))}
    states = [getattr(visuals[key], row.visual) for key in numbers]
    return [numbers[s.scene_key] for s in samples], torch.stack(states)
