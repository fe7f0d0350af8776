"""What an adapter's stages share: stored states, the verifier's head, and validation on them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from xsd.commands import stage
from xsd.commands.processes import Processes
from xsd.errors import XsdError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from xsd.adapters import catalog
    from xsd.adapters.base import Adapter, Streams
    from xsd.counts import Counts
    from xsd.hidden.index import Half
    from xsd.hidden.lm_head import VerifierHead
    from xsd.hidden.store import HiddenStore
    from xsd.learning.config import FitConfig
    from xsd.learning.fit import Scorer
    from xsd.tracking.products import Product

T = TypeVar("T")

SELECTION_GAMMA = 6
"""Drafts a cycle of ``tau_6``."""


@dataclass(frozen=True)
class DataConfig:
    """Where training finds its data; each of them a path or a URI."""

    data: str | None = None
    """Extraction; null: the newest of the pair and conditioning, made if there is none."""
    val_data: str | None = None
    """Other data to validate on; null: the val recordings of data."""
    lm_head: str | None = None
    """The verifier's LM head; null: the newest of the pair, made if there is none."""
    conditioning: Literal["teacher_forced", "free_running"] = "teacher_forced"
    """Which extraction to look for."""


def find_inputs(config: Any, half: Half, conditioning: str) -> dict[str, Product]:
    """Extraction (with the given half of the data) and LM head."""
    filters = {"conditioning": conditioning, f"has_{half}": "true"}
    if config.quant is not None:
        filters["quant"] = config.quant
    data = stage.upstream("extract", config.data, config, filters, conditioning=conditioning)
    return {"data": data, "lm_head": stage.upstream("lm_head", config.lm_head, config)}


def open_store(path: Path, half: Half) -> HiddenStore:
    from xsd.hidden.store import HiddenStore, find_folder

    return HiddenStore.open(find_folder(path, half))


def test_keys(store: HiddenStore) -> tuple[str, ...]:
    """Answers to score on: the test half, or all of published chunks, which name no halves.

    Raises:
        XsdError: the store holds training answers only.
    """
    keys = store.keys("test")
    if not keys and not store.approximate_split:
        raise XsdError(f"{store.path}: its test split is empty; give --data with test answers")
    return keys or store.keys()


def open_head(path: Path, store: HiddenStore) -> VerifierHead:
    """The LM head that belongs to stored states, cut to the ids that the pair chose among.

    A checkpoint's head may have rows that no tokenizer knows. Decoding never chooses them
    (``Decoder.limit_vocab``), so what is scored with this head is what would happen live.

    Raises:
        XsdError: it was taken from another verifier.
    """
    from xsd.hidden.lm_head import load

    head = load(path)
    width, made_by = head.lm_head.shape[1], store.header.provenance.get("verifier")
    if width != store.d_verifier:
        raise XsdError(
            f"{path}: LM head of width {width} for states of width {store.d_verifier}; "
            "give the --lm_head of the verifier that the data was extracted with"
        )
    if made_by not in (None, head.provenance):
        raise XsdError(
            f"{path}: LM head of another checkpoint than the verifier of {store.path}; "
            "run 'xsd lm_head' or extract again"
        )
    return replace(head, lm_head=head.lm_head[: store.vocab_size])


@dataclass(frozen=True)
class TrainingData:
    """Stores, head, and the answers that validate."""

    store: HiddenStore
    val_store: HiddenStore
    val_keys: tuple[str, ...]
    head: VerifierHead

    @classmethod
    def open(cls, inputs: Mapping[str, Product]) -> TrainingData:
        """From inputs ``data``, ``lm_head`` and perhaps ``val_data``; warns about test data.

        Raises:
            XsdError: data, head and validation data do not fit together, or a split is empty.
        """
        from xsd.learning.batches import held_out_keys

        store = open_store(inputs["data"].path, "train")
        val_store, keys = store, store.keys("val")
        if "val_data" in inputs:
            val_store = open_store(inputs["val_data"].path, "test")
            keys = held_out_keys(val_store)
            if val_store.digest == store.digest and store.approximate_split:
                raise XsdError("--val_data is the training data itself; leave it out or give other")
            if (val_store.d_drafter, val_store.d_verifier) != (store.d_drafter, store.d_verifier):
                raise XsdError(f"{val_store.path}: states of other widths than {store.path}'s")
        if not keys:
            raise XsdError(f"{store.path}: its val split is empty; give --val_data")
        made = cls(store, val_store, keys, open_head(inputs["lm_head"].path, store))
        if made.is_selected_on_test:
            print(
                f"warning: {val_store.path} is test data: weights chosen on it cannot be promoted",
                file=sys.stderr,
            )
        return made

    @property
    def is_selected_on_test(self) -> bool:
        return not self.val_store.keys("val")

    @property
    def tags(self) -> dict[str, str]:
        """What bars promotion or must be known of every number that comes of this data."""
        tags = {
            "conditioning": self.store.header.conditioning,
            "quant": str(self.store.header.config.get("quant", "unknown")),
            "data_digest": self.store.digest,
            "val_digest": self.val_store.digest,
        }
        if self.is_selected_on_test:
            tags["selected_on_test"] = "true"
        if self.store.approximate_split and self.val_store is self.store:
            tags["approximate_split"] = "true"
        return tags

    def scorer(
        self, row: catalog.Level, config: FitConfig, processes: Processes | None = None
    ) -> Scorer:
        """Validation of an epoch: the rates of ``metrics`` and the loss that training minimises,
        from one pass; every process scores a share, and all get the whole."""
        import torch

        from xsd.counts import Counts
        from xsd.learning.batches import OrderedBatches
        from xsd.learning.cpu import CpuOps
        from xsd.learning.losses import Weights, chain_loss, steps_of
        from xsd.metrics import score_chain

        together = processes or Processes()
        batches = OrderedBatches(
            self.val_store,
            row,
            self.val_keys,
            batch_size=config.batch_size,
            head=self.head,
            share=(together.rank, together.count),
        )
        num_trained = steps_of(row, config.loss, config.unroll_steps)
        num_steps = max(SELECTION_GAMMA, num_trained) if row.feedback else 1

        def one(adapter: Adapter, streams: Streams, lm_head: Tensor) -> tuple[Counts, float]:
            packed, layout = streams.packed()
            with CpuOps():
                chain = adapter.unroll(packed, num_steps)
            scored = score_chain(row, chain[:SELECTION_GAMMA], packed, lm_head, SELECTION_GAMMA)
            loss = chain_loss(
                row,
                [out[0] for out in chain[:num_trained]],
                packed.verifier[0],
                Weights(layout, layout.lengths),
                loss=config.loss,
                lm_head=lm_head,
            )
            return scored.counts, loss.item() * len(layout.lengths)

        @torch.no_grad()
        def run(adapter: Adapter) -> Mapping[str, float]:
            device = next(adapter.parameters()).device
            lm_head = self.head.lm_head.to(device)
            parts = [one(adapter, streams.to(device), lm_head) for streams in batches]
            scored = in_order(together.gather(parts))
            counts = sum((part for part, _ in scored), Counts())
            return {**counts.rates(), "loss": sum(x for _, x in scored) / len(self.val_keys)}

        return run


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """What processes made of the items they shared, as one process would have made it."""
    longest = max(len(share) for share in shares)
    return [share[n] for n in range(longest) for share in shares if n < len(share)]
