from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.commands.conftest import World
from tests.hidden.test_store import seed_folder
from xsd.commands.adapter_data import open_head, open_store
from xsd.hidden import lm_head
from xsd.hidden.index import signed
from xsd.pairs.catalog import load_pair


def test_the_head_chooses_among_the_ids_that_decoding_chooses_among(
    world: World, tmp_path: Path
) -> None:
    pair = load_pair(world.pair)
    store = open_store(world.data, "train")
    assert store.vocab_size == pair.vocab_size
    assert torch.equal(open_head(world.head, store).lm_head, pair.verifier.lm_head.weight)

    # As if the drafter knew three ids fewer: the live verifier then has no others either.
    [folder] = world.data.glob("chunked_train*")
    shutil.copytree(folder, tmp_path / "fewer")
    path = tmp_path / "fewer/index.json"
    index = json.loads(path.read_text())
    index["config"]["vocab_size"] = pair.vocab_size - 3
    path.write_text(json.dumps(signed(index)))
    pair.verifier.limit_vocab(pair.vocab_size - 3)
    cut = open_head(world.head, open_store(path.parent, "train"))
    hidden = torch.randn(5, pair.verifier.width)
    assert torch.equal(hidden @ cut.lm_head.T, pair.verifier.logits(hidden))
    assert torch.equal(cut.embed_tokens, pair.verifier.embedding)


def test_published_chunks_name_no_vocabulary_and_keep_every_row(
    world: World, tmp_path: Path
) -> None:
    whole = lm_head.load(world.head)
    store = open_store(seed_folder(tmp_path / "seed", width=whole.lm_head.shape[1]), "train")
    assert store.vocab_size is None
    assert torch.equal(open_head(world.head, store).lm_head, whole.lm_head)
