"""What an adapter's stages share: stored states, the verifier's head, and validation on them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from xsd.commands import stage
from xsd.errors import XsdError

if TYPE_CHECKING:
    from pathlib import Path

    from xsd.adapters import catalog
    from xsd.adapters.base import Adapter
    from xsd.hidden.index import Half
    from xsd.hidden.lm_head import VerifierHead
    from xsd.hidden.store import HiddenStore
    from xsd.learning.config import FitConfig
    from xsd.learning.fit import Scorer
    from xsd.tracking.products import Product

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

    def scorer(self, row: catalog.Level, config: FitConfig) -> Scorer:
        """Validation of an epoch: the rates of ``metrics`` and the loss that training minimises."""
        import torch

        from xsd.learning.batches import OrderedBatches
        from xsd.learning.losses import adapter_loss
        from xsd.metrics import score

        batches = OrderedBatches(
            self.val_store, row, self.val_keys, batch_size=config.batch_size, head=self.head
        )

        @torch.no_grad()
        def run(adapter: Adapter) -> Mapping[str, float]:
            device = next(adapter.parameters()).device
            lm_head = self.head.lm_head.to(device)
            counts = score(adapter, batches, lm_head, max_gamma=SELECTION_GAMMA)
            losses = [
                adapter_loss(
                    adapter,
                    streams.to(device),
                    loss=config.loss,
                    unroll_steps=config.unroll_steps,
                    lm_head=lm_head,
                ).item()
                for streams in batches
            ]
            return {**counts.rates(), "loss": sum(losses) / len(losses)}

        return run
