"""Facts first: an attribute head teaches the visual tokens what is in the scene, and is dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import Slots, normalise
from xsd.learning.pretrain.state import Progress

Visual = Callable[[Float[Tensor, "B N 3 H W"]], Float[Tensor, "B visual D"]]


@dataclass(frozen=True)
class PretrainReport:
    """What pretraining yields as it goes."""

    phase: str
    step: int
    num_steps: int
    loss: float
    metrics: dict[str, float]


def products_in(config: PretrainConfig, device: torch.device) -> torch.autocast:
    """A training pass in the precision that is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


class AttributeHead(nn.Module):
    """A small encoder over the visual tokens with one query a fact. Training aid only."""

    def __init__(self, num_tokens: int, width: int, slots: Slots) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(slots), width) * 0.02)
        self.positions = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList([nn.Linear(width, len(values)) for values in slots.values()])

    def forward(self, tokens: Float[Tensor, "B visual D"]) -> list[Float[Tensor, "B _size"]]:
        queries = self.queries.expand(len(tokens), -1, -1)
        states = self.encoder(torch.cat([queries, self.norm(tokens) + self.positions], dim=1))
        return [output(states[:, index]) for index, output in enumerate(self.outputs)]


def drawn_batches(
    first: int, stop: int, size: int, num_epochs: int, seed: int, done: int
) -> Iterator[tuple[int, Int[Tensor, " size"]]]:
    """Full batches of the items ``first`` to ``stop``, in a new order each epoch.

    Yields the number of the step and its items, from step ``done`` on.
    """
    generator = torch.Generator().manual_seed(seed)
    num_batches = (stop - first) // size
    for epoch in range(num_epochs):
        order = first + torch.randperm(stop - first, generator=generator)
        for index in range(num_batches):
            step = epoch * num_batches + index
            if step >= done:
                yield step, order[index * size : (index + 1) * size]


def teach_facts(
    visual: Visual,
    parameters: Sequence[nn.Parameter],
    images: UInt8[Tensor, "clips N H W 3"],
    labels: Int[Tensor, "clips slots"],
    slots: Slots,
    config: PretrainConfig,
    name: str,
    progress: Progress,
) -> Iterator[PretrainReport]:
    """Train the visual path until a small head can read the facts off its tokens.

    A report an epoch; its metrics are shares right on the first twentieth, kept out of training.
    """
    num_val, batch = max(1, len(images) // 20), config.facts_batch
    with torch.no_grad():
        tokens = visual(normalise(images[:1]))
    head = AttributeHead(tokens.shape[1], tokens.shape[2], slots).to(tokens.device)
    trained = [*parameters, *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    num_batches = (len(images) - num_val) // batch
    steps = config.facts_epochs * num_batches
    total = torch.zeros((), device=tokens.device)
    done = progress.begin("facts", head, [optimizer], total)
    schedule = _schedule(optimizer, config, steps, done)
    for step, chosen in drawn_batches(
        num_val, len(images), batch, config.facts_epochs, config.seed, done
    ):
        if step % num_batches == 0:
            total.zero_()
        chosen = chosen.to(tokens.device)
        with products_in(config, tokens.device):
            outputs = head(visual(normalise(images[chosen])))
            losses = [
                functional.cross_entropy(out, labels[chosen, i]) for i, out in enumerate(outputs)
            ]
            loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if (step + 1) % num_batches == 0:
            right = _share_right(
                head, visual_table(visual, images[:num_val]), labels[:num_val], slots
            )
            yield PretrainReport(
                f"{name}.facts", step + 1, steps, float(total) / num_batches, right
            )
        progress.stepped()
    progress.save()


def _schedule(
    optimizer: torch.optim.Optimizer, config: PretrainConfig, num_steps: int, done: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """The facts' rates, from step ``done`` on."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.facts_learning_rate, total_steps=num_steps
    )
    with warnings.catch_warnings():
        # These steps were taken before.
        warnings.simplefilter("ignore")
        for _ in range(done):
            schedule.step()
    return schedule


def _share_right(
    head: AttributeHead,
    tokens: Float[Tensor, "clips visual D"],
    labels: Int[Tensor, "clips slots"],
    slots: Slots,
) -> dict[str, float]:
    with torch.no_grad():
        outputs = head(tokens)
    return {
        slot: float((out.argmax(-1) == labels[:, i]).float().mean())
        for i, (slot, out) in enumerate(zip(slots, outputs, strict=True))
    }


def visual_table(
    visual: Visual, images: UInt8[Tensor, "clips N H W 3"]
) -> Float[Tensor, "clips visual D"]:
    """The frozen visual tokens of every clip, computed once."""
    with torch.no_grad():
        return torch.cat([visual(normalise(part)) for part in images.split(64)])
