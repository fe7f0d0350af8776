"""Weights in 4 and 8 bits, drawn at random, and without a second copy of anything."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.hidden import miniature
from tests.pairs.test_eventgpt import config as small_config
from xsd.errors import XsdError
from xsd.pairs import checkpoint, eventgpt, quantise, video_llava
from xsd.pairs.base import Media
from xsd.pairs.catalog import load_pair
from xsd.pairs.checkpoint import Placement, draw_weights, load_weights
from xsd.pairs.config import PairConfig
from xsd.pairs.eventgpt import EventGPT
from xsd.pairs.processing import ImageProcessing

MIB = 1 << 20
QUESTION = "What is this scene about?"


def media(num_events: int = 5) -> Media:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (num_events, 64, 64, 3), dtype=np.uint8)
    return Media(list(images), random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_the_tiny_pair_really_loads_rounded(quant: str) -> None:
    pair, precise = (load_pair(PairConfig(quant=q, device="cpu")) for q in (quant, "fp32"))
    for model, exact in ((pair.drafter, precise.drafter), (pair.verifier, precise.verifier)):
        for name, module in model.model.get_decoder().layers.named_modules():  # type: ignore[attr-defined]
            if not isinstance(module, nn.Linear):
                continue
            weight: Any = module.weight
            if quant == "4bit":
                assert type(module).__name__ == "Linear4bit", name
                assert weight.dtype == torch.uint8
                assert weight.numel() == module.in_features * module.out_features // 2
                assert weight.quant_type == "nf4" and weight.quant_state.nested
                assert weight.quant_state.dtype.is_floating_point
            else:
                assert type(module).__name__ == "Linear8bitLt", name
                assert weight.dtype == torch.int8 and not module.state.has_fp16_weights
        # What sees, what embeds and what chooses stay as they were.
        assert type(model.lm_head) is nn.Linear
        assert model.embedding.dtype == quantise.DTYPES[quant]
        rough, ids = (
            m.logits(m.forward(m.prompt_embeddings(media(), QUESTION), m.new_cache(1, 400)))[0, -1]
            for m in (model, exact)
        )
        # On noise, where nothing is certain: close, and no closer than that.
        assert (
            torch.cosine_similarity(rough.float(), ids, dim=0) > {"4bit": 0.8, "8bit": 0.98}[quant]
        )


def test_rotary_angles_stay_precise() -> None:
    pair = load_pair(PairConfig(quant="4bit", device="cpu"))
    model = pair.verifier.model  # type: ignore[attr-defined]
    assert {buffer.dtype for buffer in model.buffers()} <= {torch.float32, torch.int64}


def test_rounding_keeps_no_precise_weight_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is being rounded, all earlier linears are gone."""
    seen: list[weakref.ref[nn.Module]] = []
    original = quantise.quantised

    def watched(library: Any, linear: nn.Linear, *rest: Any) -> Any:
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(linear))
        return original(library, linear, *rest)

    for module in (quantise, checkpoint):
        monkeypatch.setattr(module, "quantised", watched)
    quantise.quantise(EventGPT(small_config()).model, "8bit", torch.device("cpu"))
    assert len(seen) == 14
    seen.clear()
    draw_weights(EventGPT, small_config(hidden_size=64, intermediate_size=128), Placement("4bit"))
    assert len(seen) == 14


def peak_anonymous_bytes(work: Callable[[], Any]) -> int:
    """The largest growth of this process's own memory (mapped files left out) during ``work``."""

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    done, peak, before = threading.Event(), [0], own()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], own() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("weights", ["safetensors", "bin", "random"])
def test_a_load_takes_no_second_copy(tmp_path: Path, weights: str) -> None:
    config = small_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=5)
    with torch.device("meta"):
        num_bytes = quantise.num_bytes(EventGPT(config), EventGPT(config).model, "bf16")
    assert num_bytes > 150 * MIB
    model = draw_weights(EventGPT, config, Placement("fp16"))
    eventgpt.save(model, ImageProcessing.square(16), tmp_path)
    if weights == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model

    def load() -> None:
        if weights == "random":
            draw_weights(EventGPT, config, Placement("bf16"))
        else:
            load_weights(EventGPT, config, tmp_path, Placement("bf16"))

    assert peak_anonymous_bytes(load) < 1.3 * num_bytes


def test_memory_that_is_short_is_told_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = miniature.save_pair(tmp_path)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 1000)
    with pytest.raises(
        XsdError, match=r"EventGPT needs .* GiB in fp32, cpu has 0\.0 GiB free; say"
    ):
        load_pair(config)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(XsdError, match=r"--quant 4bit needs bitsandbytes.*pip install bitsand"):
        load_pair(PairConfig(quant="4bit", device="cpu"))


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_widths_that_four_bits_cannot_have_on_a_cpu_are_told(tmp_path: Path, weights: str) -> None:
    saved = miniature.save_pair(tmp_path)
    config = PairConfig(**{**vars(saved), "weights": weights, "quant": "4bit"})
    with pytest.raises(XsdError) as refusal:
        load_pair(config)
    told = str(refusal.value)
    assert "EventGPT: layer 0.self_attn.q_proj has 24 inputs and 24 outputs" in told
    assert "takes multiples of 64 and 32 only: say --quant 8bit or bf16, or use a GPU" in told
    # Neither 8 bits nor another device have such blocks.
    assert load_pair(replace(config, quant="8bit")).quant == "8bit"
    shape = EventGPT(small_config(hidden_size=24))
    quantise.refuse_widths(shape, "4bit", torch.device("cuda"))


def test_the_published_sizes() -> None:
    for model_class, (config, processing), billions, edge in (
        (EventGPT, eventgpt.published_config(), 7.08, 336),
        (video_llava.VideoLlava, video_llava.published_config(), 7.37, 224),
    ):
        with torch.device("meta"):
            model = model_class(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert processing == ImageProcessing.square(edge)
        gib = {
            q: quantise.num_bytes(model, model.get_decoder(), q) / (1 << 30)
            for q in ("bf16", "4bit")
        }
        assert 13 < gib["bf16"] < 14 and 3.5 < gib["4bit"] < 5


@pytest.mark.parametrize("quant", ["fp32", "bf16", "8bit"])
def test_random_weights_at_a_scaled_down_configuration(tmp_path: Path, quant: str) -> None:
    """Configurations alone, without weights or tokenizers beside them."""
    config = miniature.save_pair(tmp_path)
    for role in ("drafter", "verifier"):
        for path in (tmp_path / role).iterdir():
            if "token" in path.name or path.suffix == ".safetensors":
                path.unlink()
        values = json.loads((tmp_path / role / "config.json").read_text())
        values.get("text_config", values)["vocab_size"] = 1032
        (tmp_path / role / "config.json").write_text(json.dumps(values))
    config = replace(config, weights="random", quant=quant)
    pair, again = load_pair(config), load_pair(config)
    embeds = pair.verifier.prompt_embeddings(media(), QUESTION)
    assert torch.equal(embeds, again.verifier.prompt_embeddings(media(), QUESTION))
    states = pair.verifier.forward(embeds, pair.verifier.new_cache(1, 400))
    assert states.isfinite().all() and states.dtype == quantise.DTYPES[quant]
    assert pair.drafter.prompt_embeddings(media(), QUESTION).isfinite().all()
    assert pair.provenance["verifier"].startswith("random:")


def test_random_weights_may_be_rounded() -> None:
    """At the tiny pair's widths: bitsandbytes' CPU kernels want multiples of 64."""
    pair = load_pair(PairConfig(weights="random", quant="4bit", device="cpu"))
    assert type(pair.drafter.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # type: ignore[attr-defined]
    embeds = pair.drafter.prompt_embeddings(media(), QUESTION)
    states = pair.drafter.forward(embeds, pair.drafter.new_cache(1, 400))
    assert states.isfinite().all() and states.dtype == torch.bfloat16


def test_random_weights_need_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    small = EventGPT, small_config(vocab_size=1032), ImageProcessing.square(16)
    settings = deepcopy(miniature.models()[1].config)
    settings.text_config.vocab_size = 1032
    monkeypatch.setattr(eventgpt, "published_config", lambda: small[1:])
    monkeypatch.setattr(
        video_llava, "published_config", lambda: (settings, ImageProcessing.square(16))
    )
    pair = load_pair(PairConfig("eventgpt-video-llava", weights="random", device="cpu"))
    assert pair.quant == "bf16" and pair.vocab_size == 1032
    assert pair.verifier.prompt(QUESTION).after
