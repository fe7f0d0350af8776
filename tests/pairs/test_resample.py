"""Resizing as a product against Pillow, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xsd.pairs.processing import ImageProcessing
from xsd.pairs.resample import resize

CPU = torch.device("cpu")


@settings(max_examples=25)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60), st.integers(0)
)
def test_bytes_are_pillows(
    height: int, width: int, new_height: int, new_width: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((new_width, new_height), 3))
    found = resize(torch.from_numpy(image).movedim(-1, 0)[None], new_height, new_width)
    assert found is not None and np.array_equal(found[0].movedim(0, -1).byte().numpy(), expected)


@pytest.mark.parametrize("sizes", [[(48, 64)] * 3, [(48, 64), (64, 40)], [(20, 90)]])
def test_a_devices_pixels_are_the_hosts(sizes: list[tuple[int, int]]) -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    for processing in (
        ImageProcessing.square(32),
        ImageProcessing(shortest_edge=20, crop=(32, 32)),
    ):
        assert torch.equal(processing.on(CPU, images), processing(images))
