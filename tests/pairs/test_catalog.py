"""Names of pairs, where their files are looked for, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.hidden import miniature
from tests.pairs.tokenizers import llama_like
from xsd.errors import XsdError
from xsd.pairs import released, tiny
from xsd.pairs.catalog import load_folder, load_pair, precision, sources
from xsd.pairs.config import QUANTS, PairConfig
from xsd.pairs.device import choose_device, choose_devices
from xsd.pairs.quantise import DTYPES


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PairConfig:
    return miniature.save_pair(tmp_path_factory.mktemp("pair"))


def provenance(config: PairConfig) -> dict[str, str]:
    return {role: source.digest for role, source in sources(config).items()}


def test_a_released_pair_from_folders(config: PairConfig) -> None:
    pair = load_pair(config)
    assert (pair.name, pair.quant) == ("eventgpt-video-llava", "fp32")
    assert (pair.drafter.width, pair.verifier.width) == (24, 32)
    assert pair.provenance == provenance(config)
    x = torch.randn(1, 6, 32)
    ours = miniature.pair().verifier
    assert torch.equal(
        pair.verifier.forward(x, pair.verifier.new_cache(1, 6)),
        ours.forward(x, ours.new_cache(1, 6)),
    )


def test_precisions(config: PairConfig) -> None:
    assert precision(PairConfig()) == "fp32"
    assert precision(PairConfig(pair="eventgpt-video-llava")) == "bf16"
    assert load_pair(replace(config, quant="bf16")).verifier.stack.dtype == torch.bfloat16
    assert set(QUANTS) == set(DTYPES)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_stay_close(config: PairConfig) -> None:
    pair = load_pair(replace(config, quant="8bit"))
    linear = pair.verifier.model.model.language_model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.int8
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    rough = pair.verifier.forward(x.half(), pair.verifier.new_cache(1, 6)).float()
    ours = miniature.pair().verifier
    exact = ours.forward(x, ours.new_cache(1, 6))
    assert torch.cosine_similarity(rough, exact, dim=-1).min() > 0.98


def test_provenance_is_the_contents(config: PairConfig, tmp_path: Path) -> None:
    other = miniature.save_pair(tmp_path)
    before = provenance(config)
    assert provenance(other) == before
    weights = tmp_path / "verifier/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = provenance(other)
    assert after["drafter"] == before["drafter"] and after["verifier"] != before["verifier"]


def test_large_files_are_told_apart_by_size_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released, "_HASHED_BYTES", 10)
    monkeypatch.setattr(released, "_EDGE_BYTES", 4)
    digests = set()
    for content in (b"a" * 20, b"a" * 21, b"b" + b"a" * 19, b"a" * 19 + b"b"):
        (tmp_path / "x.bin").write_bytes(content)
        digests.add(released._digest(tmp_path))
    assert len(digests) == 4


def test_hub_checkpoints(
    config: PairConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.parent.mkdir()
    snapshot.symlink_to(Path(str(config.verifier)))

    def download(name: str) -> str:
        if name != "someone/verifier":
            raise OSError("404: no\n such repository")
        return str(snapshot)

    monkeypatch.setattr(released, "snapshot_download", download)
    found = sources(replace(config, verifier="someone/verifier"))
    assert found["verifier"].folder == snapshot
    (tmp_path / "real/snapshots/0123abcd").mkdir(parents=True)
    assert released._digest(tmp_path / "real/snapshots/0123abcd") == "hub:0123abcd"
    with pytest.raises(XsdError, match="neither a folder nor on the hub"):
        sources(replace(config, verifier="someone/else"))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        XsdError, match="unknown pair 'huge'; choose one of tiny, lab, eventgpt-video"
    ):
        load_pair(PairConfig(pair="huge"))
    with pytest.raises(XsdError, match="needs --drafter"):
        load_pair(PairConfig(pair="eventgpt-video-llava"))
    monkeypatch.setattr(tiny, "weights_folder", lambda: tmp_path / "none")
    with pytest.raises(XsdError, match="the tiny pair's weights are missing; install"):
        load_pair(PairConfig())
    with pytest.raises(XsdError, match="weights are missing"):
        load_folder(tmp_path)


def test_tokenizers_must_agree(config: PairConfig, tmp_path: Path) -> None:
    other = miniature.save_pair(tmp_path)
    llama_like("A", "<image>", "<video>").save_pretrained(tmp_path / "drafter")
    with pytest.raises(XsdError, match=r"tokenize differently: id .* a pair shares one vocabulary"):
        load_pair(other)
    (tmp_path / "drafter/tokenizer.json").write_text("{")
    with pytest.raises(XsdError, match="its tokenizer cannot be loaded"):
        load_pair(other)


def test_a_folder_of_pretraining(config: PairConfig, tmp_path: Path) -> None:
    for role in ("drafter", "verifier"):
        (tmp_path / role).symlink_to(Path(str(getattr(config, role))))
    miniature.TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    assert load_folder(tmp_path).verifier.width == 32


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(XsdError, match="--device abacus: not a device"):
        choose_device("abacus")
    with pytest.raises(XsdError, match="--device cuda:99: this machine has"):
        choose_device("cuda:99")


def test_a_device_for_each_half(config: PairConfig) -> None:
    devices = choose_devices(replace(config, device_map="drafter=cpu"))
    assert {role: device.type for role, device in devices.items()} == dict.fromkeys(
        ("drafter", "verifier"), "cpu"
    )
    assert load_pair(replace(config, device_map="drafter=cpu,verifier=cpu")).verifier.width == 32
    for given, message in (
        ("cpu", "'cpu' is not role=device; say drafter=cuda:1"),
        ("judge=cpu", "'judge=cpu' is not role=device"),
        ("drafter=cuda:99", "--device cuda:99: this machine has"),
    ):
        with pytest.raises(XsdError, match=message):
            load_pair(replace(config, device_map=given))


def test_the_number_of_event_images_is_an_option(config: PairConfig) -> None:
    assert load_pair(replace(config, num_event_images=1)).num_event_images == 1


def test_a_checkpoint_without_tokenizer_says_so(config: PairConfig, tmp_path: Path) -> None:
    other = miniature.save_pair(tmp_path)
    (tmp_path / "verifier/tokenizer.json").unlink()
    with pytest.raises(XsdError, match=r"holds no tokenizer \(tokenizer\.json or tokenizer\.model"):
        load_pair(other)
