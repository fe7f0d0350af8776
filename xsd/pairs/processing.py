"""What models ask of pictures and prompts before the first matrix multiplication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from xsd import kernels
from xsd.errors import XsdError
from xsd.files import read_json, write_json
from xsd.pairs.base import Prompt
from xsd.pairs.crew import Crew
from xsd.pairs.resample import BICUBIC, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessing:
    """CLIP's image processor: resize the shortest edge, crop the centre, rescale, normalise.

    Equal to transformers' PIL processor bit by bit, at a fraction of its overhead: it is inside
    the measured path. A bicubic resize is compiled. What happens to a byte then depends on the byte
    and its channel alone, so the arithmetic is a table of 3 x 256 floats.
    """

    shortest_edge: int = 224
    crop: tuple[int, int] = (224, 224)
    """Height and width of the result."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = BICUBIC

    @classmethod
    def square(cls, size: int) -> ImageProcessing:
        """CLIP's constants for a tower of ``size`` x ``size`` pixels."""
        return cls(shortest_edge=size, crop=(size, size))

    @classmethod
    def load(cls, folder: Path) -> ImageProcessing:
        """Read ``preprocessor_config.json``; else transformers 5's ``processor_config.json``.

        Raises:
            XsdError: the file is missing, or asks for steps other than CLIP's.
        """
        path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
        if not path.is_file() and newer.is_file():
            path = newer
        config = read_json(path)
        config = config.get("image_processor", config)
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        skipped = [step for step in steps if not config.get(step, True)]
        if skipped:
            raise XsdError(f"{path}: {skipped[0]} is off; only CLIP's four steps are supported")
        try:
            edge = config["size"]
            return cls(
                shortest_edge=int(edge["shortest_edge"] if isinstance(edge, dict) else edge),
                crop=_height_width(config.get("crop_size", edge)),
                mean=_per_channel(config["image_mean"]),
                std=_per_channel(config["image_std"]),
                rescale_factor=float(config.get("rescale_factor", 1 / 255)),
                resample=int(config.get("resample", BICUBIC)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise XsdError(f"{path}: not a CLIP image processor ({error!r})") from error

    def save(self, folder: Path) -> None:
        height, width = self.crop
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge},
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        write_json(folder / "preprocessor_config.json", config)

    def __call__(
        self,
        images: Iterable[UInt8[np.ndarray, "_h _w 3"]],
        device: torch.device | None = None,
        crew: Crew | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """RGB bytes to a model's ``pixel_values``; sizes may differ from image to image.

        Args:
            device: where they are wanted; a GPU computes them itself, to the same bits.
            crew: shares out the images; None: one core.
        """
        given = [*images]
        if device is not None and device.type == "cuda":
            return self.on(device, given)
        pixels = np.empty((len(given), 3, *self.crop), np.float32)
        found = [self._taps(*image.shape[:2]) for image in given]
        table = self._table

        def process(share: slice) -> None:
            for image, taps, out in zip(given[share], found[share], pixels[share], strict=True):
                if taps is None:
                    self._by_pillow(image, out)
                else:
                    kernels.normalise_image(np.ascontiguousarray(image), *taps, table, out)

        (crew or Crew()).share_out(len(given), process)
        return torch.from_numpy(pixels)

    def on(
        self, device: torch.device, images: Sequence[UInt8[np.ndarray, "_h _w 3"]]
    ) -> Float[Tensor, "N 3 H W"]:
        """The same, computed on a device, all images of one size together."""
        same = len({image.shape for image in images}) == 1
        parts = [np.stack(images)] if same else [image[None] for image in images]
        return torch.cat([self._together(torch.from_numpy(part).to(device)) for part in parts])

    def _together(self, images: UInt8[Tensor, "N h w 3"]) -> Float[Tensor, "N 3 H W"]:
        height, width = self._resized(*images.shape[1:3])
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        resized = None
        if self.resample == BICUBIC and min(top, left) >= 0:
            resized = resize(images.movedim(-1, 1), height, width)
        if resized is None:
            return self(images.cpu().numpy()).to(images.device)
        cropped = resized[:, :, top : top + self.crop[0], left : left + self.crop[1]].long()
        table = torch.from_numpy(self._table).to(images.device)
        return torch.stack([table[c][cropped[:, c]] for c in range(3)], dim=1)

    def _by_pillow(self, image: UInt8[np.ndarray, "_h _w 3"], out: np.ndarray) -> None:
        cropped = self.resize_and_crop(image)
        for channel in range(3):
            np.take(self._table[channel], cropped[:, :, channel], out=out[channel], mode="clip")

    @lru_cache(maxsize=64)  # noqa: B019 (there are few of these, and they stay)
    def _taps(self, height: int, width: int) -> tuple[np.ndarray, ...] | None:
        """Which old pixels make the new columns and rows; None: that is left to Pillow."""
        size = self._resized(height, width)
        starts = [(have - want) // 2 for have, want in zip(size, self.crop, strict=True)]
        if self.resample != BICUBIC or min(starts) < 0:
            return None
        lines = zip((height, width), size, starts, self.crop, strict=True)
        rows, columns = (
            kernels.bicubic(old, new, start, start + want) for old, new, start, want in lines
        )
        # Pillow narrows or shortens first, whichever is cheaper by rules of its own, and rounds
        # between the two. Noise tells whether it goes our way.
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours, pillows = np.empty((2, 3, *self.crop), np.float32)
        kernels.normalise_image(noise, *columns, *rows, self._table, ours)
        self._by_pillow(noise, pillows)
        return (*columns, *rows) if np.array_equal(ours, pillows) else None

    @cached_property
    def _table(self) -> Float[np.ndarray, "3 256"]:
        # Rescaled in double, rounded, then normalised in single precision: transformers' order.
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        table: np.ndarray = (scaled[None] - mean[:, None]) / std[:, None]
        return table

    def resize_and_crop(self, image: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The geometric half, still bytes: shortest edge resized, centre cropped."""
        height, width = self._resized(*image.shape[:2])
        resized = np.asarray(Image.fromarray(image).resize((width, height), self.resample))
        top, left = (
            (have - want) // 2 for have, want in zip(resized.shape, self.crop, strict=False)
        )
        if top < 0 or left < 0:
            return self._pad(resized)
        return resized[top : top + self.crop[0], left : left + self.crop[1]]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width when the shortest edge is as long as wanted."""
        edge = self.shortest_edge
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)

    def _pad(self, image: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """A crop larger than the image: black around it, cropped where it is the larger one."""
        wanted = np.array(self.crop)
        have = np.array(image.shape[:2])
        canvas_size = np.maximum(wanted, have)
        canvas = np.zeros((*canvas_size, 3), np.uint8)
        top, left = -(-(canvas_size - have) // 2)
        canvas[top : top + have[0], left : left + have[1]] = image
        top, left = np.maximum(0, (have - wanted) // 2 + (top, left))
        return canvas[top : top + wanted[0], left : left + wanted[1]]


def prompt_around(tokenizer: Any, before: str, after: str) -> Prompt:
    """Token ids of the text on both sides of a placeholder that no vocabulary holds.

    Each side is tokenised on its own and one BOS leads, as LLaVA's tools do: a Llama tokenizer
    puts its word-start mark in front of the second side too.
    """
    first = tokenizer.encode(before, add_special_tokens=False)
    second = tokenizer.encode(after, add_special_tokens=False)
    return Prompt((_bos(tokenizer), *first), tuple(second))


def prompt_split(tokenizer: Any, text: str, placeholder_id: int) -> Prompt:
    """Token ids of ``text`` around a placeholder that is a token of the vocabulary.

    Raises:
        XsdError: the placeholder is not in the text exactly once.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids.count(placeholder_id) != 1:
        raise XsdError(
            f"prompt {text!r}: {ids.count(placeholder_id)} visual placeholders, 1 expected; "
            "take placeholders out of the question and check the tokenizer"
        )
    at = ids.index(placeholder_id)
    return Prompt((_bos(tokenizer), *ids[:at]), tuple(ids[at + 1 :]))


def _bos(tokenizer: Any) -> int:
    bos = tokenizer.bos_token_id
    if bos is None:
        raise XsdError("the tokenizer has no BOS token; both models of a pair need one")
    return int(bos)


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
