"""Small image and video files for the tests of scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Paint = Callable[..., Path]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture (codecs keep it) whose mean colour tells the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def paint(tmp_path: Path) -> Paint:
    """``paint("a/b.png", width, height, seed)`` writes a picture below tmp_path and returns its path."""

    def paint(name: str, width: int = 40, height: int = 30, seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height, seed).save(path)
        return path

    return paint


@pytest.fixture
def grid(paint: Paint, tmp_path: Path) -> Path:
    """time_1, time_2, time_10 x view0, view1; seeds 10 t + n."""
    for t, time in enumerate((1, 2, 10)):
        for n in range(2):
            paint(f"grid/time_{time}/view{n}.png", seed=10 * t + n)
    return tmp_path / "grid"


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Path]:
    """``film("a.mp4", levels, rate)`` writes a video whose frame i is grey of ``levels[i]``, its upper left quarter
    red."""
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")

    def film(
        name: str,
        levels: Sequence[int],
        rate: int = 30,
        width: int = 64,
        height: int = 48,
        options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for level in levels:
                pixels = np.full((height, width, 3), level, dtype=np.uint8)
                pixels[: height // 2, : width // 2] = (200, 20, 20)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
        return path

    return film
