"""Position maps inside the page: small PNG images as data addresses, encoded here."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from posenc.config import Config, read_config
from posenc.display.viz import sample_map
from posenc.plan import PositionPlan

SIDE = 120
SCALE = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
"""Anchors of viridis, whose lightness grows evenly and which the colour-blind can read."""
BEYOND, NOTHING = (176, 176, 176), (255, 255, 255)


def colours(share: NDArray[np.float64] | float) -> NDArray[np.uint8]:
    """Colours of values from 0 to 1: uint8 [..., 3]."""
    anchors = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(share, anchors, [colour[c] for colour in SCALE]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def map_address(plan: PositionPlan, highest: float) -> str:
    """A plan's map as the address of a PNG image: white for pairs that are not attended, grey beyond `highest`."""
    _, relative = sample_map(plan, SIDE)
    pixels = colours(np.clip(np.nan_to_num(relative) / max(highest, 1.0), 0, 1))
    pixels[np.nan_to_num(relative) >= highest + (highest == 0)] = BEYOND
    pixels[np.isnan(relative)] = NOTHING
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W, 3] pixels."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def config_of(strategy: dict[str, object]) -> Config:
    """The configuration that the strategy of a cell's identity describes."""
    config: dict[str, object] = {"strategy": {key: value for key, value in strategy.items() if key != "frequencies"}}
    if "frequencies" in strategy:
        config["frequencies"] = strategy["frequencies"]
    return read_config(config, source="result")


def is_beyond(plan: PositionPlan) -> bool:
    """True if the plan has a relative distance that the model was not trained on."""
    return plan.max_relative >= (plan.window or math.inf)
