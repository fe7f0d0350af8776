"""Luminance to events: an idealised event camera with the faults of a real one.

A pixel remembers the log intensity of its last event and fires again whenever the difference
reaches its contrast threshold, several times between two sub-frames if need be, at times
interpolated linearly: the model of ESIM (Rebecq, Gehrig, Scaramuzza: ESIM, an Open Event Camera
Simulator, CoRL 2018). Thresholds that vary over pixels, a refractory period, background activity
and hot pixels follow v2e (Hu, Liu, Delbruck: v2e, From Video Frames to Realistic DVS Events, CVPR
Workshops 2021).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from xsd.scenes.camera import DURATION_US
from xsd.scenes.config import EventCameraConfig
from xsd.scenes.events import Events

_DARK = 0.02
"""Luminance of the sensor's own dark current: keeps the logarithm finite and the night quiet."""
_MIN_THRESHOLD = 0.05
_HOT_RATE_HZ = 60.0


def simulate_events(
    luma: Float[np.ndarray, "S H W"],
    times_us: Float[np.ndarray, " S"],
    config: EventCameraConfig,
    rng: np.random.Generator,
) -> Events:
    """Events of a sequence of linear luminance images, sorted by time.

    Between sub-frames the log intensity is taken to be linear in time.
    """
    _, height, width = luma.shape
    spread = rng.normal(config.contrast_threshold, config.threshold_spread, (height, width))
    threshold = np.maximum(spread, _MIN_THRESHOLD).astype(np.float32)
    # In units of its threshold a pixel fires at every whole step away from its reference.
    level = np.log(luma + np.float32(_DARK)) / threshold
    step, pixel, time, polarity = _crossings(level.reshape(len(level), -1))
    t = times_us[step] + time * (times_us[step + 1] - times_us[step])
    noise_pixel, noise_t = _noise(height * width, config, rng)
    pixel = np.concatenate([pixel, noise_pixel])
    t = np.concatenate([t, noise_t]).astype(np.int64)
    polarity = np.concatenate([polarity, rng.integers(0, 2, len(noise_pixel))])
    keep = _outside_refractory(pixel, t, config.refractory_us)
    pixel, t, polarity = pixel[keep], t[keep], polarity[keep]
    order = np.argsort(t, kind="stable")
    y, x = np.divmod(pixel[order], width)
    return Events(
        x.astype(np.uint16),
        y.astype(np.uint16),
        t[order],
        polarity[order].astype(np.uint8),
    )


def _crossings(
    level: Float[np.ndarray, "S n"],
) -> tuple[
    Int[np.ndarray, " e"], Int[np.ndarray, " e"], Float[np.ndarray, " e"], Int[np.ndarray, " e"]
]:
    """Step, pixel, fraction of the step gone by, and polarity of every threshold crossing."""
    reference = level[0].copy()
    count = np.empty((len(level) - 1, level.shape[1]), np.float32)
    before = np.empty_like(count)
    for k in range(len(count)):
        before[k] = reference
        np.trunc(level[k + 1] - reference, out=count[k])
        reference += count[k]
    step, pixel = np.nonzero(count)
    moved = count[step, pixel]
    number = np.abs(moved).astype(np.intp)
    start = np.cumsum(number) - number
    nth = np.arange(int(number.sum())) - np.repeat(start, number) + 1
    first, last = level[step, pixel], level[step + 1, pixel]
    sign = np.sign(moved)
    offset, slope = before[step, pixel] - first, last - first
    crossed = np.repeat(offset, number) + nth * np.repeat(sign, number)
    fraction = np.clip(crossed / np.repeat(slope, number), 0, 1)
    return (
        np.repeat(step, number),
        np.repeat(pixel, number),
        fraction,
        np.repeat((sign > 0).astype(np.intp), number),
    )


def _noise(
    num_pixels: int, config: EventCameraConfig, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " e"], Float[np.ndarray, " e"]]:
    """Pixel and time of events that nothing in the scene caused."""
    seconds = DURATION_US / 1e6
    background = rng.poisson(config.noise_rate_hz * num_pixels * seconds)
    hot = rng.integers(0, num_pixels, config.num_hot_pixels)
    shots = rng.poisson(_HOT_RATE_HZ * seconds, len(hot))
    pixel = np.concatenate([rng.integers(0, num_pixels, background), np.repeat(hot, shots)])
    return pixel, rng.uniform(0, DURATION_US, len(pixel))


def _outside_refractory(
    pixel: Int[np.ndarray, " e"], t: Int[np.ndarray, " e"], refractory_us: int
) -> Int[np.ndarray, " k"]:
    """Events at least a refractory period after the last kept event of their pixel."""
    kept = np.argsort(pixel * (2 * DURATION_US) + t)
    while True:
        close = np.diff(t[kept]) < refractory_us
        close &= pixel[kept][1:] == pixel[kept][:-1]
        late = np.concatenate([[False], close])
        # Only the first of a burst is surely dropped; without it the next may be far enough.
        first = late & ~np.concatenate([[False], late[:-1]])
        if not first.any():
            return kept
        kept = kept[~first]
