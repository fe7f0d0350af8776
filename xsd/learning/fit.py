"""Fit an adapter: a generator of epoch reports that knows neither MLflow nor Optuna.

While a report is out, the adapter holds that epoch's weights: the caller saves them if
``report.is_best``, and prunes by ceasing to pull.

Where ``accelerate launch`` started several processes, all of them fit: each holds a share of every
batch, gradients are summed, and so the weights are those of one process, up to rounding.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.base import Adapter
from xsd.clock import PartTimes
from xsd.errors import XsdError
from xsd.files import sha256_json
from xsd.learning.batches import TrainBatch
from xsd.learning.config import FitConfig
from xsd.learning.cpu import CpuOps
from xsd.learning.keeper import Keeper, wait_for_keeper
from xsd.learning.latest import Latest, settle
from xsd.learning.losses import adapter_loss
from xsd.learning.state import FitState, load_state, save_state, tensors_of
from xsd.types import EpochReport

_LOOK = 32
"""Steps between two looks at the losses, where a look makes a device or a process wait."""
_STATE_SECONDS, _STATE_SHARE = 5.0, 0.02
"""A state is written to disk no more often than that, and takes no more than this share of the
time."""


Batches = Callable[[int, int], Iterator[TrainBatch]]
"""Epoch and number of batches -> the epoch's batches after so many; always the same ones."""
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
    times: PartTimes | None = None,
) -> Iterator[EpochReport]:
    """Train in place with AdamW, a cosine over all steps, clipping and early stopping.

    Args:
        adapter: on the device to train on.
        batches: training data of an epoch, on that device; where their number is not known
            (``len``), the cosine has a value an epoch.
        config: hyperparameters.
        scorer: validation; ``is_best`` and early stopping go by the level's selection metric.
        lm_head: [V, Dv], for the token loss.
        state: a file written every few seconds. If it exists, training goes on from it, and on a
            CPU in float32 ends with the very weights of an uninterrupted run. Under Linux the state
            after every step is kept in memory too (``Latest``, ``Keeper``): a process that is
            killed loses the batch in hand, a machine that goes down those few seconds. Elsewhere a
            state is written after an epoch, too, unless that takes long.
        times: told what the parts of a step take, if somebody wants to know.

    Raises:
        XsdError: no batches, a loss that is not finite, or a state of another configuration.
    """
    training = _Training(adapter, config, lm_head, state)
    if hasattr(batches, "__len__"):
        training.num_batches = len(batches)
    if times is not None:
        training.part = times.part
    with closing(training):
        while not training.is_over:
            started = time.perf_counter()
            epoch = training.progress.epoch
            loss = training.run_epoch(batches)
            rate = training.learning_rate(training.progress.step - 1)
            adapter.eval()
            metrics = dict(scorer(adapter))
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise _diverged(f"validation {name}", value, f"epoch {epoch}")
            is_best = training.judge(metrics)
            yield EpochReport(
                epoch=epoch,
                step=training.progress.step,
                learning_rate=rate,
                train={"loss": loss},
                val=metrics,
                is_best=is_best,
                seconds=time.perf_counter() - started,
            )
            training.keep_epoch()
        training.end()


def learning_rate(config: FitConfig, epoch: float, step: int) -> float:
    """Cosine from ``learning_rate`` to ``eta_min`` over the epochs that have gone by, times a
    linear warm-up over steps."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * epoch / config.num_epochs))
    rate = config.eta_min + (config.learning_rate - config.eta_min) * cosine
    return rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


class _Objective(nn.Module):
    """A batch's loss as a module's output: what accelerate can spread over processes."""

    def __init__(self, adapter: Adapter, config: FitConfig, lm_head: Tensor | None) -> None:
        super().__init__()
        self.adapter, self.config = adapter, config
        # Not a buffer: it is frozen, and every process has its own.
        self.__dict__["lm_head"] = lm_head

    def forward(self, batch: TrainBatch) -> Tensor:
        loss = adapter_loss(
            self.adapter,
            batch.streams,
            loss=self.config.loss,
            unroll_steps=self.config.unroll_steps,
            lm_head=self.__dict__["lm_head"],
            lengths=batch.lengths,
        )
        return loss * 0.0 if batch.is_idle else loss


class _Training:
    """One run of ``fit``: what is trained, and how far it has come."""

    def __init__(
        self, adapter: Adapter, config: FitConfig, lm_head: Tensor | None, state: Path | None
    ) -> None:
        self.adapter, self.config, self.state = adapter, config, state
        self.device = next(adapter.parameters()).device
        self.optimizer = torch.optim.AdamW(
            adapter.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._key = sha256_json([asdict(config), asdict(adapter.config)])
        self.num_batches: int | None = None
        """Of an epoch, where that is known."""
        self.progress = FitState()
        self._accelerator = _accelerator(self.device, config)
        if state is not None:
            if self._accelerator.is_main_process:
                wait_for_keeper(state)
                settle(state, self._key)
            self._accelerator.wait_for_everyone()
            if state.exists():
                self.progress = load_state(state, adapter, self.optimizer, self._key)
        if config.compile:
            _compile(adapter)
        self._objective = self._accelerator.prepare_model(
            _Objective(adapter, config, lm_head), device_placement=False
        )
        self._is_prompt = self.device.type == "cpu"
        self._saved, self._took = time.monotonic(), 0.0
        self._keeps = state is not None and self._accelerator.is_main_process
        self._latest: Latest | None = None
        self._keeper: Keeper | None = None
        if state is not None and self._keeps:
            if self._is_prompt and Latest.is_possible():
                self._latest = Latest(state, self._key)
            elif self.device.type == "cuda" and Keeper.is_possible():
                self._keeper = Keeper(state, self._key, self.device)
        self.part: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()

    @property
    def is_over(self) -> bool:
        progress, patience = self.progress, self.config.early_stopping
        return progress.epoch >= self.config.num_epochs or (
            0 < patience <= progress.epochs_since_best
        )

    def run_epoch(self, batches: Batches) -> float:
        """What is left of the epoch; returns its mean loss. The caller's random numbers are left
        as they were."""
        epoch, done = self.progress.epoch, self.progress.num_batches
        self.adapter.train()
        losses: list[Tensor] = []
        if self._keeper is not None:
            self._keeper.begin(self.progress)
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu):
            for batch in self._timed(batches(epoch, done)):
                losses.append(self._step(batch, self.progress.step + len(losses)))
                if self._keeper is not None:
                    self._keeper.count(losses[-1])
                    self._keep_on_gpu()
                if self._is_prompt or len(losses) == _LOOK:
                    self._take_in(losses)
                    self._keep()
            self._take_in(losses)
        if not self.progress.num_batches:
            raise XsdError(f"epoch {epoch} has no training batches; check the training data")
        return self.progress.loss_sum / self.progress.num_batches

    def learning_rate(self, step: int) -> float:
        """Of a step of the epoch in hand."""
        epoch = float(self.progress.epoch)
        if self.num_batches:
            done = self.progress.num_batches + step - self.progress.step
            epoch += done / self.num_batches
        return learning_rate(self.config, epoch, step)

    def _step(self, batch: TrainBatch, step: int) -> Tensor:
        accelerator, config = self._accelerator, self.config
        # Dropout depends on seed, step and share alone: no generator's state need be kept.
        seeds = np.random.SeedSequence([config.seed, step, accelerator.process_index])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        with self.part("forward, loss"), nullcontext() if config.compile else CpuOps():
            loss = self._objective(batch)
        self.optimizer.zero_grad()
        with self.part("backward"):
            # Shares of a mean add up, but processes average their gradients.
            accelerator.backward(loss * accelerator.num_processes)
        with self.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), config.max_norm)
            if self._keeper is not None:
                self._keeper.hold()
            self.optimizer.step()
        # Every share counts; what reads the sum makes nobody wait.
        taken: Tensor = accelerator.reduce(loss.detach().double(), "sum")
        return taken

    def _timed(self, batches: Iterator[TrainBatch]) -> Iterator[TrainBatch]:
        while True:
            with self.part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _take_in(self, losses: list[Tensor]) -> None:
        """Count steps whose losses are finite; empties the list."""
        if not losses:
            return
        progress = self.progress
        values = torch.stack(losses).tolist()
        for number, value in enumerate(values):
            if not math.isfinite(value):
                where = f"epoch {progress.epoch}, step {progress.step + number}"
                raise _diverged("loss", value, where)
        loss_sum = progress.loss_sum
        for value in values:
            loss_sum += value
        self.progress = replace(
            progress,
            step=progress.step + len(values),
            num_batches=progress.num_batches + len(values),
            loss_sum=loss_sum,
        )
        losses.clear()

    def judge(self, metrics: Mapping[str, float]) -> bool:
        """End the epoch; whether it is the best so far."""
        metric, progress = self.adapter.row.selection_metric, self.progress
        assert metric in metrics, f"the scorer does not give {metric}"
        value = metrics[metric]
        is_best = progress.best is None or value > progress.best
        self.progress = FitState(
            epoch=progress.epoch + 1,
            step=progress.step,
            best=value if is_best else progress.best,
            epochs_since_best=0 if is_best else progress.epochs_since_best + 1,
        )
        return is_best

    def keep_epoch(self) -> None:
        """The caller has taken the epoch in."""
        if self._keeper is not None:
            self._keeper.begin(self.progress)
            self._keep_on_gpu()
        self._keep(after_epoch=self._latest is None and self._keeper is None)

    def end(self) -> None:
        """Leave the state on disk, and nothing beside it."""
        if self.state is not None and self._latest is not None:
            settle(self.state, self._key)
        if self._keeper is not None:
            self._save()
            self._keeper.forget()

    def close(self) -> None:
        """What was not ended may go on later."""
        if self._keeper is not None:
            self._keeper.leave()

    def _keep_on_gpu(self) -> None:
        assert self._keeper is not None
        try:
            with self.part("state"):
                self._keeper.put(self._tensors)
        except XsdError as error:
            warnings.warn(f"{error}; if it is killed, some seconds are lost", stacklevel=2)
            self._keeper.forget()
            self._keeper = None

    def _keep(self, *, after_epoch: bool = False) -> None:
        """Keep the state; after an epoch it need not wait for its seconds, but for its share."""
        if not self._keeps:
            return
        if self._latest is not None:
            with self.part("state"):
                self._latest.put(self.progress, self._tensors)
        wait = max(0.0 if after_epoch else _STATE_SECONDS, self._took / _STATE_SHARE)
        if time.monotonic() - self._saved > wait:
            self._save()

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Of the state, always the same ones: a step changes them in place."""
        return tensors_of(self.adapter, [self.optimizer])

    def _save(self) -> None:
        assert self.state is not None
        started = time.monotonic()
        save_state(self.state, self.progress, self.adapter, self.optimizer, self._key)
        self._saved = time.monotonic()
        self._took = self._saved - started


def _compile(adapter: Adapter) -> None:
    """
    Raises:
        XsdError: the machine has nothing to compile with.
    """
    device = next(adapter.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise XsdError("--compile true: no C++ compiler is here; install one, or leave it out")
    for block in adapter.blocks:
        block.compile_rows()


def _accelerator(device: torch.device, config: FitConfig) -> Any:
    # One a training, whatever an earlier one in this process asked for; processes stay joined.
    is_alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=is_alone)
    chosen = config.mixed_precision or ("bf16" if device.type == "cuda" else "no")
    return Accelerator(cpu=device.type == "cpu", mixed_precision=chosen)


def _diverged(what: str, value: float, where: str) -> XsdError:
    return XsdError(
        f"the {what} became {value} in {where}; lower --learning_rate or check the data"
    )
