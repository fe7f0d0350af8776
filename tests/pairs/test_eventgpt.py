"""EventGPT: its visual tokens, its prompt, and what its loader accepts and refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from tests.pairs.tokenizers import llama_like
from xsd.errors import XsdError
from xsd.pairs import eventgpt
from xsd.pairs.base import Media, Prompt
from xsd.pairs.checkpoint import Placement
from xsd.pairs.eventgpt import EventGPT, EventGPTConfig, EventGPTDecoder
from xsd.pairs.processing import ImageProcessing

IMAGE, PATCH, WIDTH = 16, 8, 32
TOKENS = (IMAGE // PATCH) ** 2 + 1


@pytest.fixture(scope="module")
def model() -> EventGPT:
    torch.manual_seed(0)
    return EventGPT(config()).eval()


def config(**changes: object) -> EventGPTConfig:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE,
        patch_size=PATCH,
    )
    values = {
        "vision_config": vision,
        "event_feature_adaptor": True,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 120,
    }
    return EventGPTConfig(**(values | changes))


@pytest.fixture
def folder(model: EventGPT, tmp_path: Path) -> Path:
    eventgpt.save(model, ImageProcessing.square(IMAGE), tmp_path / "model")
    return tmp_path / "model"


def same_weights(one: EventGPT, other: EventGPT) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_visual_tokens_pool_after_projector_and_adaptor(model: EventGPT, num_images: int) -> None:
    pixels = torch.randn(num_images, 3, IMAGE, IMAGE)
    parts = model.model
    features = parts.visual_tower["visual_tower"](pixels).last_hidden_state
    full = parts.feature_adaptor(parts.visual_projector(features))
    expected = torch.cat([full.mean(1), full.mean(0)])
    actual = model.visual_tokens(pixels)
    assert actual.shape == (num_images + TOKENS, WIDTH)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_visual_tokens_of_a_batch_are_those_of_its_clips(model: EventGPT) -> None:
    pixels = torch.randn(2, 3, 3, IMAGE, IMAGE)
    expected = torch.stack([model.visual_tokens(clip) for clip in pixels])
    torch.testing.assert_close(model.visual_tokens(pixels), expected, rtol=1e-5, atol=1e-5)


def test_an_adaptor_exists_where_the_configuration_names_one() -> None:
    with torch.device("meta"):
        names = set(EventGPT(config(event_feature_adaptor=None)).state_dict())
        assert not any("feature_adaptor" in name for name in names)
        names = set(EventGPT(config(event_feature_adaptor="linear")).state_dict())
        assert "model.feature_adaptor.weight" in names


def test_a_model_without_adaptor_says_so_on_disk(tmp_path: Path) -> None:
    plain = EventGPT(config(event_feature_adaptor=None)).eval()
    eventgpt.save(plain, ImageProcessing.square(IMAGE), tmp_path / "plain")
    assert "event_feature_adaptor" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert same_weights(plain, eventgpt.load(tmp_path / "plain")[0])


def test_the_published_shape_is_the_default() -> None:
    with torch.device("meta"):
        model = EventGPT(EventGPTConfig(event_feature_adaptor=True))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["model.visual_projector.0.weight"] == (4096, 1024)
    assert shapes["model.feature_adaptor.weight"] == (4096, 4096)
    tower = "model.visual_tower.visual_tower.embeddings"
    assert shapes[f"{tower}.position_embedding.weight"] == (577, 1024)


def test_prompt_and_decoder(model: EventGPT) -> None:
    tokenizer = llama_like()
    decoder = EventGPTDecoder(model, tokenizer, ImageProcessing.square(IMAGE))
    prompt = decoder.prompt("What moves?")
    text = "".join(tokenizer.convert_ids_to_tokens([*prompt.before, *prompt.after]))
    assert text.startswith("<s>▁A▁chat▁between▁a▁curious▁user▁and▁an▁artificial▁intelligence")
    assert text.endswith("▁USER:▁<ev_start>▁<ev_end>\nWhat▁moves?▁ASSISTANT:")
    images = [np.full((20, width, 3), 255, np.uint8) for width in (18, 25, 30)]
    media = Media(images, np.zeros((0, 8, 8, 3), np.uint8))
    embeds = decoder.prompt_embeddings(media, "What moves?")
    assert embeds.shape == (1, len(prompt.before) + 3 + TOKENS + len(prompt.after), WIDTH)
    assert decoder.eos_ids == {2}
    assert decoder.vocab_size == 120
    with pytest.raises(XsdError, match="must not hold <event>"):
        decoder.prompt("What is <event>?")


def test_a_long_prompt_is_cut(model: EventGPT) -> None:
    decoder = EventGPTDecoder(model, llama_like(), ImageProcessing.square(IMAGE))
    long = Prompt(tuple([5] * 2000), tuple([6] * 100))
    assert decoder.embed_prompt(long, torch.zeros(20, WIDTH)).shape[1] == 2048


def test_save_and_load(model: EventGPT, folder: Path) -> None:
    again, processing = eventgpt.load(folder)
    assert same_weights(model, again)
    assert not again.training
    assert processing == ImageProcessing.square(IMAGE)
    half, _ = eventgpt.load(folder, Placement("fp16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_a_fused_model_saves_the_same(model: EventGPT, folder: Path, tmp_path: Path) -> None:
    fused, processing = eventgpt.load(folder)
    EventGPTDecoder(fused, llama_like(), processing)
    eventgpt.save(fused, processing, tmp_path / "fused")
    again, _ = eventgpt.load(tmp_path / "fused")
    assert same_weights(model, again)


def test_shards_and_pickled_weights(model: EventGPT, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for suffix, write in ((".safetensors", save_file), (".bin", torch.save)):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        halves = {f"{stem}-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
        for file, part in halves.items():
            write({name: tensors[name] for name in part}, folder / file)
        index = {name: file for file, part in halves.items() for name in part}
        (folder / f"{stem}{suffix}.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
        )
        assert same_weights(model, eventgpt.load(folder)[0]), suffix
        for path in folder.glob(f"{stem}*"):
            path.unlink()


def test_derived_buffers_of_old_checkpoints_are_ignored(model: EventGPT, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tower = "model.visual_tower.visual_tower.vision_model.embeddings"
    tensors[f"{tower}.position_ids"] = torch.zeros(1, TOKENS, dtype=torch.long)
    save_file(tensors, folder / "model.safetensors")
    assert same_weights(model, eventgpt.load(folder)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"tensors missing: .*model\.norm\.weight"),
        ("unused", r"tensors not the model's: .*model\.extra"),
        ("misshapen", r"tensors of another shape: .*model\.norm\.weight"),
    ],
)
def test_foreign_tensors_are_named(folder: Path, change: str, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "unused":
        tensors["model.extra"] = torch.zeros(2)
    else:
        tensors["model.norm.weight"] = torch.zeros(WIDTH + 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(XsdError, match=message):
        eventgpt.load(folder)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_with_code_is_not_run(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as handle:
        pickle.dump({"model.norm.weight": _Hostile()}, handle, protocol=2)
    with pytest.raises(XsdError, match="weights cannot be loaded"):
        eventgpt.load(folder)


@pytest.mark.parametrize("damage", ["no config", "other model", "no weights", "truncated", "bad"])
def test_unusable_folders_are_one_line(folder: Path, damage: str) -> None:
    config_path, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config_path.read_text())
    if damage == "no config":
        config_path.unlink()
    elif damage == "other model":
        config_path.write_text(json.dumps(values | {"model_type": "llama"}))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config_path.write_text(json.dumps(values | {"hidden_size": "wide"}))
    with pytest.raises(XsdError) as error:
        eventgpt.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_towers_configuration_is_found_or_asked_for(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tower"
    (folder / "clip").rename(elsewhere)
    with pytest.raises(XsdError, match=r"no config\.json of the CLIP tower"):
        eventgpt.load(folder)
    model, _ = eventgpt.load(folder, tower=elsewhere)
    # The hub's CLIP repository describes both towers in one file.
    vision = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": vision})
    )
    assert same_weights(model, eventgpt.load(folder, tower=elsewhere)[0])
    with pytest.raises(XsdError, match=r"no config\.json of the CLIP tower"):
        eventgpt.load(folder, tower=tmp_path / "nowhere")


def test_the_published_tower_needs_no_files(tmp_path: Path) -> None:
    named = config(mm_visual_tower="somewhere/clip-vit-large-patch14-336")
    vision, processing = eventgpt._tower(tmp_path, named, None)
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (336, 14, 1024)
    assert processing == ImageProcessing.square(336)
