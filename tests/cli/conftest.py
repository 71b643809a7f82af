"""The command line, run in this process as the entry point runs it, and small things for it to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.cli.main import main

SMALL = {
    "class": "VGGT_MV",
    "img_size": 56,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mask_layer": 0,
    "patch_embed": "conv",
    "camera_head_options": {"trunk_depth": 1, "num_heads": 2},
    "dpt_head_options": {"features": 8, "out_channels": [8, 8, 8, 8], "intermediate_layer_idx": [0, 0, 1, 1]},
    "enable_track": False,
}


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that bad input is."""
        assert self.code == 2, (self.code, self.stderr)
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("vggt-mv: error: "), lines[0]
        assert self.stdout == ""
        return lines[0]


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other cost more than they bring, fifty times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vggt_mv(capfd: pytest.CaptureFixture[str]) -> Run:
    """``vggt_mv("reconstruct", "a", "-o", "b")``: exit code, stdout and stderr."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a new process that finds the packages where this one did."""
    import vggt_mv
    import vggt_mv_ext

    folders = [str(Path(str(package.__file__)).parents[1]) for package in (vggt_mv, vggt_mv_ext)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """2 times x 2 views of 80x60 pixels."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for t in range(2):
        (folder / f"time_{t}").mkdir(parents=True)
        for n in range(2):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(pixels).save(folder / f"time_{t}" / f"view{n}.png")
    return folder


@pytest.fixture
def small_config() -> dict[str, Any]:
    """A tiny model."""
    return deepcopy(SMALL)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The JSON file of a tiny model."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path
