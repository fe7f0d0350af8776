"""Stored answers -> the padded batch that adapters read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd.adapters.base import Streams
from xsd.adapters.catalog import Level
from xsd.errors import XsdError
from xsd.types import ClipVisual, HiddenSample


def collate(
    samples: Sequence[HiddenSample],
    row: Level,
    *,
    embedding: Float[Tensor, "V Dv"] | None = None,
    visuals: Mapping[str, ClipVisual] | None = None,
) -> Streams:
    """A float32 batch with the streams that ``row`` reads; the others are None.

    Free-running pairs differ in length and are cut to the shorter, as the seed did.

    Args:
        samples: the answers, in order.
        row: the level that will read them.
        embedding: the verifier's input embeddings, for levels that read tokens.
        visuals: by scene key, for levels that attend to visual states.

    Raises:
        XsdError: the level reads what was not given.
    """
    lengths = [min(len(s.drafter_ids), len(s.verifier_ids)) for s in samples]
    pairs = list(zip(samples, lengths, strict=True))
    ids = pad_sequence([s.verifier_ids[:n].long() for s, n in pairs], batch_first=True)
    drafter = token = None
    if "drafter" in row.streams:
        drafter = pad_sequence([s.drafter_hidden[:n] for s, n in pairs], batch_first=True).float()
    if "token" in row.streams:
        if embedding is None:
            raise XsdError(f"level {row.name} needs the verifier's embeddings; this data has none")
        token = embedding[ids].float()
    return Streams(
        drafter=drafter,
        verifier=pad_sequence([s.verifier_hidden[:n] for s, n in pairs], batch_first=True).float(),
        token=token,
        visual=_visual(samples, row, visuals),
        ids=ids,
        mask=torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None],
    )


def _visual(
    samples: Sequence[HiddenSample], row: Level, visuals: Mapping[str, ClipVisual] | None
) -> Tensor | None:
    if row.visual is None:
        return None
    missing = [s.scene_key for s in samples if visuals is None or s.scene_key not in visuals]
    if visuals is None or missing:
        raise XsdError(
            f"level {row.name} needs the clips' {row.visual} visual states; extract them again "
            f"(missing for {missing[0]})"
        )
    return torch.stack([getattr(visuals[s.scene_key], row.visual).float() for s in samples])
