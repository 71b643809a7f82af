"""Masks of what moves: found, read, handed to the model, and drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.errors import SceneError, VggtMvError
from vggt_mv.models.configs import build_model
from vggt_mv.scene.export.mask import mask_overlay
from vggt_mv.scene.load_model import choose_config, load_model, with_options
from vggt_mv.scene.masks import find_masks, read_masks
from vggt_mv.scene.preprocess import preprocess
from vggt_mv.scene.reconstruct import reconstruct
from vggt_mv.scene.sources import Scene, open_scene
from vggt_mv.weights import WeightsMismatchError, provenance_of

TINY: dict[str, Any] = {
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


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def masks(grid: Path, tmp_path: Path) -> Path:
    """For every image of `grid` a mask of 40 x 30 pixels, white in column 10 t' + n of ten, another suffix."""
    for t, time in enumerate((1, 2, 10)):
        for n in range(2):
            pixels = np.zeros((30, 40), dtype=np.uint8)
            pixels[:, 10 * t + 5 * n : 10 * t + 5 * n + 5] = 255
            path = tmp_path / "masks" / f"time_{time}" / f"view{n}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "masks"


def read(source: Any, scene: Scene, **options: Any) -> np.ndarray:
    return read_masks(source, scene, preprocess(scene, image_size=56, **options).transforms)


def test_masks_go_by_the_names_of_images(grid: Path, masks: Path) -> None:
    scene = open_scene(grid)
    found = read(masks, scene)
    assert found.shape == (3, 2, 42, 56)
    assert found.dtype == np.float32
    for t in range(3):
        for n in range(2):
            columns = found[t, n].mean(axis=0)
            left, width = (10 * t + 5 * n) * 1.4, 5 * 1.4
            assert columns[int(left) + 2 : int(left + width) - 1].min() > 0.99
            assert columns[: max(int(left) - 2, 0)].sum() == columns[int(left + width) + 3 :].sum() == 0
            assert found[t, n].mean() == pytest.approx(1 / 8, abs=0.01)
    # Fewer times: their own masks.
    few = read(masks, open_scene(grid, max_frames=2))
    np.testing.assert_array_equal(few, found[[0, 2]])


def test_padding_stands_still_and_cropping_crops(grid: Path, masks: Path) -> None:
    for folder in masks.iterdir():
        for file in folder.iterdir():
            Image.new("L", (40, 30), 255).save(file)
    padded = read(masks, open_scene(grid), mode="pad")
    assert padded.shape == (3, 2, 56, 56)
    assert padded[:, :, 7:49].min() == 1
    assert padded[:, :, :7].max() == padded[:, :, 49:].max() == 0
    tall = Scene.from_tensor(torch.rand(2, 1, 3, 100, 40))
    ramp = np.broadcast_to(np.linspace(0, 1, 100, dtype=np.float32)[None, None, :, None], (2, 1, 100, 40))
    cropped = read(ramp, tall)
    assert cropped.shape == (2, 1, 56, 56)
    assert cropped[0, 0, 0].max() == pytest.approx(0.3, abs=0.01)
    assert cropped[0, 0, -1].min() == pytest.approx(0.7, abs=0.01)


def test_arrays_of_the_originals_size(grid: Path, masks: Path) -> None:
    scene = open_scene(grid)
    array = np.stack([[np.asarray(Image.open(path)) > 0 for path in row] for row in find_masks(masks, scene)])
    want = read(masks, scene)
    for given in (array, array.astype(np.float64), torch.from_numpy(array)):
        np.testing.assert_allclose(read(given, scene), want, atol=1e-6)
    sequence = Scene.from_tensor(torch.rand(3, 3, 30, 40))
    assert read(array[:, 0], sequence).shape == (1, 3, 42, 56)


def break_missing(masks: Path) -> None:
    (masks / "time_2" / "view1.bmp").unlink()


def break_twice(masks: Path) -> None:
    Image.new("L", (40, 30)).save(masks / "time_2" / "view1.png")


def break_size(masks: Path) -> None:
    Image.new("L", (41, 30)).save(masks / "time_10" / "view0.bmp")


def break_colour(masks: Path) -> None:
    Image.new("RGB", (40, 30), (255, 0, 0)).save(masks / "time_10" / "view0.bmp")


def break_labels(masks: Path) -> None:
    for file in masks.rglob("*.bmp"):
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8)).save(file)


def break_damage(masks: Path) -> None:
    (masks / "time_1" / "view0.bmp").write_bytes(b"BM nothing")


BROKEN = [
    (break_missing, r"lacks 1 of 6 masks, the first that of image 'time_2/view1.png'; masks lie in the same folders"),
    (break_twice, r"has two masks of image 'time_2/view1.png': view1.bmp and view1.png; remove one"),
    (break_size, r"mask '.*time_10/view0.bmp' must have the size of its image, 40x30, got 41x30"),
    (break_colour, r"mask '.*view0.bmp' must be grey, white where the scene moves; got colours"),
    (break_labels, r"masks must be white where the scene moves, got no value above 1 of 255; multiply labels by 255"),
    (break_damage, r"image '.*view0.bmp' is"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_bad_masks(grid: Path, masks: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(masks)
    with pytest.raises(SceneError, match=message):
        read(masks, open_scene(grid))


def test_bad_sources(grid: Path, masks: Path, tmp_path: Path) -> None:
    scene, memory = open_scene(grid), Scene.from_tensor(torch.rand(2, 2, 3, 28, 28))
    with pytest.raises(SceneError, match=r"mask folder '.*nowhere' does not exist"):
        read(tmp_path / "nowhere", scene)
    with pytest.raises(SceneError, match=r"mask folder '.*view0.bmp' is no folder"):
        read(masks / "time_1" / "view0.bmp", scene)
    with pytest.raises(SceneError, match=r"masks go by the names of image files, and 'images' has none"):
        read(masks, memory)
    for array, message in (
        (np.zeros((2, 2, 28, 27), dtype=np.float32), r"\[T, N, H, W\] = \[2, 2, 28, 28\], .* got \[2, 2, 28, 27\]"),
        (np.zeros((2, 2, 28, 28), dtype=np.int64), r"floating point in \[0, 1\] or bool, got int64"),
        (np.full((2, 2, 28, 28), 1.5), r"lie in \[0, 1\], got values from 1.5 to 1.5"),
        (np.full((2, 2, 28, 28), np.nan), r"must be finite"),
    ):
        with pytest.raises(SceneError, match=message):
            read(array, memory)


@pytest.mark.parametrize("options", [{}, {"enable_dual_stream": True}], ids=["single", "dual"])
def test_reconstruct_hands_the_mask_to_the_model(grid: Path, masks: Path, tmp_path: Path, options: Any) -> None:
    torch.manual_seed(0)
    model = build_model({**TINY, **options})
    with torch.no_grad():
        for name, parameter in model.aggregator.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    scene = open_scene(grid)
    result = reconstruct(scene, model, dynamic_mask=masks, attention="joint")
    prepared = preprocess(scene, image_size=56)
    mask = torch.from_numpy(read_masks(masks, scene, prepared.transforms))[None]
    with torch.inference_mode():
        direct = model(prepared.images, dynamic_mask=mask, attention="joint")
        without = model(prepared.images, attention="joint")
    np.testing.assert_allclose(result.depth, direct["depth"][0, ..., 0], rtol=1e-5)
    assert np.abs(result.depth - without["depth"][0, ..., 0].numpy()).max() > 1e-5
    np.testing.assert_array_equal(result.given_mask, mask[0])
    assert result.report["dynamic_mask"] == {"given": str(masks), "predicted": True}
    assert result.report["model"]["dual_stream"] == bool(options)
    result.save(tmp_path / "out")
    arrays = np.load(tmp_path / "out" / "predictions.npz")
    assert arrays["given_mask"].shape == (3, 2, 42, 56)
    assert arrays["dynamic_mask"].shape == (3, 2, 3, 4)
    assert len(list((tmp_path / "out" / "dynamic_mask").iterdir())) == 6
    with pytest.raises(VggtMvError, match=r"dynamic_mask \(--mask-dir\) is for a VGGT_MV, got VGGT, which takes none"):
        reconstruct(scene, build_model({**TINY, "class": "VGGT"}), dynamic_mask=masks)


def test_the_overlay_shows_both_masks() -> None:
    image = np.full((28, 42, 3), (90, 120, 150), dtype=np.uint8)
    predicted = np.zeros((2, 3), dtype=np.float32)
    predicted[1, 2] = 1
    given = np.zeros((28, 42), dtype=np.float32)
    given[:14, :14] = 1
    overlay = mask_overlay(image, predicted, given)
    orange, plain = overlay[20, 36].astype(int), overlay[3, 30].astype(int)
    assert orange[0] > 180 and orange[2] < 60
    assert np.ptp(plain) < 25 and abs(plain.mean() - 120) < 2
    cyan = (overlay == (0, 220, 255)).all(axis=-1)
    assert cyan[14, :14].all() and cyan[:14, 14].all() and cyan.sum() == 28
    assert not (mask_overlay(image, predicted, None) == (0, 220, 255)).all(axis=-1).any()


# A model with further options


def test_a_single_stream_file_starts_a_dual_stream(tmp_path: Path) -> None:
    torch.manual_seed(3)
    build_model(TINY).save_pretrained(tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    model = load_model(file, config=TINY, options={"enable_dual_stream": True})
    single = load_model(file, config=TINY)
    for stream in ("pose", "geo"):
        for kind in ("frame_blocks", "global_blocks"):
            blocks = getattr(model.aggregator, f"{stream}_{kind}").state_dict()
            for name, value in getattr(single.aggregator, kind).state_dict().items():
                assert torch.equal(blocks[name], value)
    assert model.aggregator.lambda_pose_logit.item() == pytest.approx(-2.302585)
    assert provenance_of(model).family != "random"
    images = torch.rand(1, 2, 2, 3, 28, 28)
    with torch.inference_mode():
        for name in ("lambda_pose_logit", "lambda_geo_logit"):
            getattr(model.aggregator, name).data.fill_(-torch.inf)
        got, want = model(images)["depth"], single(images)["depth"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # Memory tokens have no such start.
    memory = {"enable_dual_stream": True, "enable_sparse_global": True}
    with pytest.raises(WeightsMismatchError, match="strict"):
        load_model(file, config=TINY, options=memory)
    random = load_model(file, config=TINY, options=memory, random_weights=True)
    assert provenance_of(random).family == "random"


def test_weights_with_dual_stream_and_memory_say_so_themselves(tmp_path: Path) -> None:
    options = {"enable_dual_stream": True, "enable_sparse_global": True}
    torch.manual_seed(3)
    model = build_model(with_options(TINY, options))
    model.save_pretrained(tmp_path / "weights")
    chosen = choose_config(tmp_path / "weights" / "model.safetensors")
    assert chosen["enable_dual_stream"] and chosen["enable_sparse_global"]
    again = load_model(tmp_path / "weights" / "model.safetensors", config=None)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    (tmp_path / "weights" / "config.json").unlink()
    bare = choose_config(tmp_path / "weights" / "model.safetensors")
    assert bare["enable_dual_stream"] and bare["enable_sparse_global"]
    with pytest.raises(VggtMvError, match="unknown option 'enable_dual_streem'"):
        with_options(TINY, {"enable_dual_streem": True})
