"""vggt-mv demo, smaller than by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vggt_mv.scene.export.depth import color_map
from vggt_mv.scene.sources import open_scene

Run = Callable[..., Any]  # see conftest.py


def test_demo_makes_reconstructs_and_compares(vggt_mv: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = vggt_mv("demo", "-o", out, "--times", 2, "--views", 2)
    assert result.code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["weights"]["random"] is True
    assert report["model"]["config"] == "vggt_mv_demo"
    assert report["input"]["source"] == str(out / "scene")
    assert report["ground_truth"]["meaningless"] is True
    assert report["ground_truth"]["depth_median_relative_error"] > 0.01
    assert "against the truth (RANDOM WEIGHTS: meaningless)" in result.stdout
    assert "RANDOM WEIGHTS" in result.stderr
    assert open_scene(out / "scene").describe() == "grid: 2 times x 2 views, 168x126"
    with np.load(out / "predictions.npz") as predictions, np.load(out / "scene" / "ground_truth.npz") as truth:
        assert predictions["depth"].shape == truth["depth"].shape
        assert predictions["tracks"].shape == truth["tracks"].shape
    with Image.open(out / "truth.png") as as_it_is, Image.open(out / "overview.png") as found:
        # The truth carries no label of random weights, and the overview does.
        assert as_it_is.width == found.width and as_it_is.height < found.height
        assert set(map(tuple, color_map()[200:205].tolist())) & set(
            map(tuple, np.asarray(as_it_is).reshape(-1, 3).tolist())
        )
    # Again, over what is there.
    assert vggt_mv("demo", "-o", out, "--times", 2, "--views", 2, "-q").code == 0


def test_demo_leaves_foreign_folders_alone(vggt_mv: Run, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    assert "is not an earlier output" in vggt_mv("demo", "-o", tmp_path / "demo").error
