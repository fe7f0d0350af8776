"""``lm_head``: the verifier's LM head and embeddings, taken out of its checkpoint once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xsd.cli import main
from xsd.commands import stage
from xsd.pairs.config import PairConfig

if TYPE_CHECKING:
    from torch import Tensor

    from xsd.tracking.products import Product
    from xsd.tracking.run import Run

HELP = "take the verifier's LM head and embeddings out of its checkpoint"


@dataclass(frozen=True)
class Config(PairConfig, stage.StageConfig):
    """Options of the lm_head stage."""

    output_path: Path | None = None
    """The head's file (.safetensors); null: lm_head.safetensors in a folder of its own."""


def perform(config: Config) -> Product:
    """Rows and dtype stay as in the checkpoint; its other tensors are never loaded."""

    def resolve() -> dict[str, Product]:
        return {"verifier": pair_inputs(config)["verifier"]}

    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        from xsd.hidden import lm_head

        path = config.output_path or Path("outputs/lm_head") / run.work_name / "lm_head.safetensors"
        tensors = _tensors(config)
        files = lm_head.save(
            tensors, path.with_suffix(".safetensors"), provenance=inputs["verifier"].digest
        )
        for file in files:
            run.artifact(file)
        rows, width = tensors[lm_head.HEAD].shape
        run.log({"num_rows": rows, "width": width})
        run.say(f"lm_head: {rows} x {width}, {tensors[lm_head.HEAD].dtype}: {files[0]}")

    return stage.perform("lm_head", config, resolve=resolve, rooms=["hidden/lm_head"], work=work)


def pair_inputs(config: PairConfig) -> dict[str, Product]:
    """Both models as inputs of a stage; their digests are the pair's provenance."""
    from xsd.pairs.catalog import sources
    from xsd.tracking.products import Product

    return {
        role: Product(source.uri, source.folder or Path(source.uri), source.digest)
        for role, source in sources(config).items()
    }


def _tensors(config: PairConfig) -> dict[str, Tensor]:
    """Out of the verifier's checkpoint; of a verifier without files, out of the model itself."""
    from xsd.hidden import lm_head
    from xsd.pairs.catalog import load_pair, sources

    folder = sources(config)["verifier"].folder
    if folder is not None:
        return lm_head.read_tensors(folder)
    verifier = load_pair(config).verifier
    return {
        lm_head.HEAD: verifier.lm_head.weight.detach().cpu(),
        lm_head.EMBEDDINGS: verifier.embedding.cpu(),
    }


def run(config: Config) -> None:
    perform(config)


if __name__ == "__main__":
    raise SystemExit(main(command="lm_head"))
