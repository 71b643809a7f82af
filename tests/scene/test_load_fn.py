"""load_and_preprocess_images and its square sister."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.scene import SceneError
from vggt_mv.utils.load_fn import load_and_preprocess_images, load_and_preprocess_images_square


def test_crop_and_pad(paint) -> None:
    paths = [str(paint("a.png", 64, 48, seed=1)), str(paint("b.png", 64, 48, seed=2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop, pad = load_and_preprocess_images(paths), load_and_preprocess_images(paths, mode="pad")
    assert (crop.shape, pad.shape) == ((2, 3, 392, 518), (2, 3, 518, 518))
    assert crop.dtype == torch.float32
    assert torch.equal(pad[:, :, 63:455], crop)
    assert (pad[:, :, :63] == 1).all()
    assert (pad[:, :, 455:] == 1).all()
    expected = np.asarray(Image.open(paths[1]).resize((518, 392), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    assert np.array_equal(crop[1].permute(1, 2, 0).numpy(), expected)


def test_a_portrait_is_cropped_in_the_middle(paint) -> None:
    path = paint("a.png", 48, 64)
    images = load_and_preprocess_images([path])
    expected = (
        np.asarray(Image.open(path).resize((518, 686), Image.Resampling.BICUBIC))[84:602].astype(np.float32) / 255
    )
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)


def test_transparency_is_white(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(path)
    assert (load_and_preprocess_images([path]) == 1).all()


def test_different_shapes_are_padded_to_the_largest_with_a_warning(paint) -> None:
    paths = [paint("wide.png", 64, 32), paint("less.png", 64, 48)]
    with pytest.warns(
        UserWarning, match=r"images differ in size \(518x252, 518x392\); padded with white to the largest"
    ):
        images = load_and_preprocess_images(paths)
    assert images.shape == (2, 3, 392, 518)
    assert (images[0, :, :70] == 1).all()
    assert (images[0, :, -70:] == 1).all()
    assert torch.equal(images[0, :, 70:322], load_and_preprocess_images(paths[:1])[0])
    assert torch.equal(images[1], load_and_preprocess_images(paths[1:])[0])


def test_square_tells_where_the_image_lies(paint) -> None:
    paths = [paint("wide.png", 64, 48), paint("tall.png", 30, 60), paint("big.png", 500, 500)]
    images, coords = load_and_preprocess_images_square(paths, target_size=128)
    assert images.shape == (3, 3, 128, 128)
    assert coords.tolist() == [[0, 16, 128, 112, 64, 48], [32, 0, 96, 128, 30, 60], [0, 0, 128, 128, 500, 500]]
    for path, image, (x1, y1, x2, y2, width, height) in zip(paths, images, coords.int().tolist(), strict=True):
        original = Image.open(path)
        assert original.size == (width, height)
        inside = np.asarray(original.resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)).astype(np.float32) / 255
        assert np.array_equal(image[:, y1:y2, x1:x2].permute(1, 2, 0).numpy(), inside)
        outside = torch.ones(128, 128, dtype=torch.bool)
        outside[y1:y2, x1:x2] = False
        assert (image[:, outside] == 1).all()


def test_default_square_is_1024(paint) -> None:
    images, coords = load_and_preprocess_images_square([paint("a.png", 40, 40)])
    assert images.shape == (1, 3, 1024, 1024)
    assert coords.tolist() == [[0, 0, 1024, 1024, 40, 40]]


@pytest.mark.parametrize("load", [load_and_preprocess_images, load_and_preprocess_images_square])
def test_bad_input(load, paint, tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="image_path_list is empty; name at least one image"):
        load([])
    with pytest.raises(SceneError, match=r"image_path_list must be a list of paths, got the single path 'a\.png'"):
        load("a.png")
    with pytest.raises(SceneError, match=r"gone\.png' cannot be opened \(No such file or directory\)"):
        load([tmp_path / "gone.png"])
    (tmp_path / "text.png").write_text("not an image at all")
    with pytest.raises(SceneError, match=r"text\.png' is not an image in a known format"):
        load([paint("a.png"), tmp_path / "text.png"])


def test_bad_options(paint) -> None:
    with pytest.raises(SceneError, match="mode must be 'crop' or 'pad', got 'fit'"):
        load_and_preprocess_images([paint("a.png")], mode="fit")
    with pytest.raises(SceneError, match="target_size must be at least 1, got -1"):
        load_and_preprocess_images_square([paint("a.png")], target_size=-1)


def test_nothing_imports_torchvision() -> None:
    code = "import sys, vggt_mv.utils.load_fn, vggt_mv.scene; sys.exit(bool({'torchvision', 'av'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
