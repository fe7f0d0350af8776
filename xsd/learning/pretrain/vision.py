"""Facts first: an attribute head teaches the visual tokens what is in the scene, and is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import Slots, normalise

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


def teach_facts(
    visual: Visual,
    parameters: Sequence[nn.Parameter],
    images: UInt8[Tensor, "clips N H W 3"],
    labels: Int[Tensor, "clips slots"],
    slots: Slots,
    config: PretrainConfig,
    name: str,
) -> Iterator[PretrainReport]:
    """Train the visual path until a small head can read the facts off its tokens.

    A report an epoch; its metrics are shares right on the first twentieth, kept out of training.
    """
    generator = torch.Generator().manual_seed(config.seed)
    num_val, batch = max(1, len(images) // 20), config.facts_batch
    with torch.no_grad():
        tokens = visual(normalise(images[:1]))
    head = AttributeHead(tokens.shape[1], tokens.shape[2], slots).to(tokens.device)
    trained = [*parameters, *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    steps = config.facts_epochs * ((len(images) - num_val) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.facts_learning_rate, total_steps=steps
    )
    step = 0
    for _ in range(config.facts_epochs):
        order = num_val + torch.randperm(len(images) - num_val, generator=generator)
        total = torch.zeros((), device=tokens.device)
        for chosen in order.to(tokens.device).split(batch):
            if len(chosen) < batch:
                break
            with products_in(config, tokens.device):
                outputs = head(visual(normalise(images[chosen])))
                losses = [
                    functional.cross_entropy(out, labels[chosen, i])
                    for i, out in enumerate(outputs)
                ]
                loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            total += loss.detach()
        right = _share_right(head, visual_table(visual, images[:num_val]), labels[:num_val], slots)
        yield PretrainReport(
            f"{name}.facts", step, steps, float(total) / (len(order) // batch), right
        )


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
