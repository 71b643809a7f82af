"""vggt-mv reconstruct --window: what it writes and says, stopping and going on, bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]  # see conftest.py


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """6 times x 2 views of 80x60 pixels."""
    rng = np.random.default_rng(0)
    for t in range(6):
        (tmp_path / "long" / f"time_{t}").mkdir(parents=True)
        for n in range(2):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(pixels).save(tmp_path / "long" / f"time_{t}" / f"view{n}.png")
    return tmp_path / "long"


@pytest.fixture
def seeing(tmp_path: Path, small_config: dict[str, Any]) -> Path:
    """A tiny model whose untrained fields of view are not 0: with init_values of 1 its blocks do something."""
    path = tmp_path / "seeing.json"
    path.write_text(json.dumps({**small_config, "init_values": 1.0}))
    return path


def command(long: Path, config: Path, out: Path, *more: object) -> list[object]:
    return ["reconstruct", long, "-o", out, "--random-weights", "--config", config, "--window", 4, "--stride", 2, *more]


def test_windows(vggt_mv: Run, long: Path, seeing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = vggt_mv(*command(long, seeing, out, "--sparse-global", "memory_bank"))
    assert result.code == 0, result.stderr
    assert "RANDOM WEIGHTS" in result.stderr
    assert "2 windows of 4 times, worst alignment" in result.stderr
    assert "memory: carried from window to window" in result.stderr
    assert f"{out / 'predictions'}/  (all arrays, one file each" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["config"] == str(seeing)
    assert report["windows"]["stride"] == 2
    assert [(w["start"], w["stop"]) for w in report["windows"]["windows"]] == [(0, 4), (2, 6)]
    depth = np.load(out / "predictions" / "depth.npy", mmap_mode="r")
    assert depth.shape == (6, 2, 42, 56)
    assert len(json.loads((out / "cameras.json").read_text())["cameras"]) == 12
    assert vggt_mv(*command(long, seeing, out)).code == 2
    again = vggt_mv(*command(long, seeing, out, "--overwrite", "--no-memory-carry", "--sparse-global", "memory_bank"))
    assert again.code == 0 and "memory: each window starts anew" in again.stderr
    assert sorted(os.listdir(tmp_path)) == ["long", "out", "seeing.json"]


def test_stopped_and_gone_on(
    vggt_mv: Run, long: Path, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vggt_mv.cli.console import Bars

    out = tmp_path / "out"
    shown = Bars.__call__

    def stop(self: Bars, stage: str, done: int, total: int) -> None:
        if stage == "windows":
            raise KeyboardInterrupt
        shown(self, stage, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(Bars, "__call__", stop)
        result = vggt_mv(*command(long, seeing, out))
    assert result.code == 130
    assert "stopped; the same command goes on after the last whole window" in result.stderr
    assert not out.exists()
    other = vggt_mv(*command(long, seeing, out, "--seed", 1))
    assert "an unfinished run for output folder" in other.error and "had another weights;" in other.error
    assert "--overwrite" in other.error
    result = vggt_mv(*command(long, seeing, out))
    assert result.code == 0 and "2 windows of 4 times (went on after 1)" in result.stderr
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", 1], "window (--window) must be a whole number of times of at least 2, got 1"),
        (["--window", 3, "--stride", 3], "stride (--stride) must be a whole number from 1 up to 2"),
        (["--window", 3, "--stride", 0], "stride (--stride) must be a whole number from 1 up to 2"),
        (["--stride", 2], "--stride is for --window; give that, too"),
        (["--no-memory-carry"], "--no-memory-carry is for --window; give that, too"),
    ],
)
def test_bad_options(
    vggt_mv: Run, long: Path, seeing: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    out = tmp_path / "out"
    result = vggt_mv("reconstruct", long, "-o", out, "--random-weights", "--config", seeing, *options)
    assert message in result.error
    assert sorted(os.listdir(tmp_path)) == ["long", "seeing.json"]
