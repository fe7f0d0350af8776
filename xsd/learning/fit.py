"""Fit an adapter: a generator of epoch reports that knows neither MLflow nor Optuna.

While a report is out, the adapter holds that epoch's weights: the caller saves them if
``report.is_best``, and prunes by ceasing to pull.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.adapters.base import Adapter, Streams
from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.learning.config import FitConfig
from xsd.learning.losses import adapter_loss
from xsd.learning.state import FitState, load_state, save_state
from xsd.types import EpochReport

Batches = Callable[[int], Iterator[Streams]]
"""Epoch -> its batches; the same epoch always gives the same ones."""
Scorer = Callable[[Adapter], Mapping[str, float]]
"""Adapter in eval mode -> validation metrics, the level's selection metric among them."""


def fit(
    adapter: Adapter,
    batches: Batches,
    config: FitConfig,
    scorer: Scorer,
    *,
    lm_head: Float[Tensor, "V Dv"] | None = None,
    state: Path | None = None,
) -> Iterator[EpochReport]:
    """Train in place with AdamW, a cosine over epochs, clipping and early stopping.

    Args:
        adapter: on the device to train on.
        batches: training data of an epoch; moved to the adapter's device here.
        config: hyperparameters.
        scorer: validation; ``is_best`` and early stopping go by the level's selection metric.
        lm_head: [V, Dv], for the token loss.
        state: a file written after every epoch that the caller has taken in. If it exists,
            training goes on from it, and on a CPU ends with the very weights of an
            uninterrupted run.

    Raises:
        XsdError: no batches, a loss that is not finite, or a state of another configuration.
    """
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    made_by = sha256_json([asdict(config), asdict(adapter.config)])
    progress = FitState()
    if state is not None and state.exists():
        progress = load_state(state, adapter, optimizer, made_by)
    while progress.epoch < config.num_epochs and not _is_patience_over(progress, config):
        started = time.perf_counter()
        epoch = progress.epoch
        with _own_random_numbers(config.seed, epoch, adapter):
            step, loss = _train_epoch(adapter, batches, config, optimizer, progress, lm_head)
        adapter.eval()
        metrics = dict(scorer(adapter))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise _diverged(f"validation {name}", value, f"epoch {epoch}")
        progress, is_best = _judge(progress, adapter.row.selection_metric, metrics, step)
        yield EpochReport(
            epoch=epoch,
            step=step,
            learning_rate=optimizer.param_groups[0]["lr"],
            train={"loss": loss},
            val=metrics,
            is_best=is_best,
            seconds=time.perf_counter() - started,
        )
        if state is not None:
            save_state(state, progress, adapter, optimizer, made_by)


def learning_rate(config: FitConfig, epoch: int, step: int) -> float:
    """Cosine from ``learning_rate`` to ``eta_min``, a value an epoch, times a linear warm-up."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * epoch / config.num_epochs))
    rate = config.eta_min + (config.learning_rate - config.eta_min) * cosine
    return rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def _train_epoch(
    adapter: Adapter,
    batches: Batches,
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
    progress: FitState,
    lm_head: Tensor | None,
) -> tuple[int, float]:
    """One pass over the data; returns optimizer steps so far and the mean loss."""
    adapter.train()
    device = next(adapter.parameters()).device
    step, total = progress.step, 0.0
    for streams in batches(progress.epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress.epoch, step)
        loss = adapter_loss(
            adapter,
            streams.to(device),
            loss=config.loss,
            unroll_steps=config.unroll_steps,
            lm_head=lm_head,
        )
        if not math.isfinite(value := loss.item()):
            raise _diverged("loss", value, f"epoch {progress.epoch}, step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.max_norm)
        optimizer.step()
        step += 1
        total += value
    if step == progress.step:
        raise XsdError(f"epoch {progress.epoch} has no training batches; check the training data")
    return step, total / (step - progress.step)


def _diverged(what: str, value: float, where: str) -> XsdError:
    return XsdError(
        f"the {what} became {value} in {where}; lower --learning_rate or check the data"
    )


def _judge(
    progress: FitState, metric: str, metrics: Mapping[str, float], step: int
) -> tuple[FitState, bool]:
    assert metric in metrics, f"the scorer does not give {metric}"
    value = metrics[metric]
    is_best = progress.best is None or value > progress.best
    after = replace(progress, epoch=progress.epoch + 1, step=step)
    if is_best:
        return replace(after, best=value, epochs_since_best=0), True
    return replace(after, epochs_since_best=progress.epochs_since_best + 1), False


def _is_patience_over(progress: FitState, config: FitConfig) -> bool:
    return 0 < config.early_stopping <= progress.epochs_since_best


@contextmanager
def _own_random_numbers(seed: int, epoch: int, adapter: Adapter) -> Iterator[None]:
    """Dropout depends on seed and epoch alone, and the caller's generators are left as they were:
    so a resumed run needs no generator state."""
    cuda = {x.device for x in adapter.parameters() if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed((seed << 20) + epoch)
        yield
