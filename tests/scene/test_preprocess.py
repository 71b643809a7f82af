"""Preprocessing: sizes by the rule, pixels where the transform says, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vggt_mv.scene import Scene, SceneError, ViewTransform, open_scene, preprocess
from vggt_mv.scene.preprocess import pad_to_largest, plan_transforms, square_transform, view_transform

always_the_same = settings(derandomize=True, deadline=None, max_examples=60)


def transforms_of(longest: int, most_patches: int) -> st.SearchStrategy[ViewTransform]:
    return st.builds(
        lambda height, width, patches, mode: view_transform((height, width), image_size=14 * patches, mode=mode),
        st.integers(1, longest),
        st.integers(1, longest),
        st.integers(1, most_patches),
        st.sampled_from(["crop", "pad"]),
    )


transforms = transforms_of(3000, 40)
small_transforms = transforms_of(300, 10)


@pytest.mark.parametrize(
    ("original", "mode", "resized", "network", "offset"),
    [
        ((480, 640), "crop", (392, 518), (392, 518), (0, 0)),
        ((1080, 1920), "crop", (294, 518), (294, 518), (0, 0)),
        ((350, 434), "crop", (420, 518), (420, 518), (0, 0)),
        ((640, 480), "crop", (686, 518), (518, 518), (0, -84)),
        ((518, 518), "crop", (518, 518), (518, 518), (0, 0)),
        ((3, 3000), "crop", (14, 518), (14, 518), (0, 0)),
        ((480, 640), "pad", (392, 518), (518, 518), (0, 63)),
        ((640, 480), "pad", (518, 392), (518, 518), (63, 0)),
        ((3000, 3), "pad", (518, 14), (518, 518), (252, 0)),
    ],
)
def test_sizes(original, mode, resized, network, offset) -> None:
    assert view_transform(original, mode=mode) == ViewTransform(original, network, resized, offset)


@always_the_same
@given(transforms)
def test_network_sizes_are_multiples_of_the_patch(transform: ViewTransform) -> None:
    assert transform.network_size[0] % 14 == 0
    assert transform.network_size[1] % 14 == 0
    assert transform.resized_size[0] % 14 == 0
    assert transform.resized_size[1] % 14 == 0
    assert transform.valid_mask().any()


@always_the_same
@given(transforms, st.floats(50, 5000), st.floats(50, 5000), st.floats(-100, 4000), st.floats(-100, 4000))
def test_intrinsics_round_trip(transform: ViewTransform, fx: float, fy: float, cx: float, cy: float) -> None:
    intrinsics = np.array([[fx, 0.7, cx], [0, fy, cy], [0, 0, 1]])
    there = transform.intrinsics_to_network(intrinsics)
    assert np.allclose(transform.intrinsics_to_original(there), intrinsics, rtol=1e-12, atol=1e-9)
    assert np.array_equal(there[2], [0, 0, 1])
    # Torch, and leading dimensions.
    batch = torch.from_numpy(np.stack([intrinsics, intrinsics]))
    assert np.allclose(transform.intrinsics_to_network(batch).numpy(), there[None], rtol=1e-12)


@always_the_same
@given(
    transforms,
    st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.5, 20)),
    st.tuples(st.floats(50, 5000), st.floats(50, 5000), st.floats(0, 3000), st.floats(0, 3000)),
)
def test_a_point_projects_to_the_same_place_through_both(
    transform: ViewTransform, point: tuple[float, float, float], camera: tuple[float, float, float, float]
) -> None:
    fx, fy, cx, cy = camera
    original = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])

    def project(intrinsics: np.ndarray) -> np.ndarray:
        homogeneous = intrinsics @ np.array(point)
        return homogeneous[:2] / homogeneous[2]

    through_network = project(transform.intrinsics_to_network(original))
    assert np.allclose(transform.points_to_network(project(original)), through_network, rtol=1e-9, atol=1e-7)
    assert np.allclose(transform.points_to_original(through_network), project(original), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("original", [(240, 320), (1000, 700), (61, 45), (90, 640)])
def test_pixels_lie_where_the_transform_says(original: tuple[int, int], mode: str) -> None:
    """The centroid of a blurred spot, measured in both images: half pixels are counted as Pillow's resizing does."""
    height, width = original
    transform = view_transform(original, image_size=196, mode=mode)
    # Wide enough to be sampled well in both images.
    spread = max(3.0, 3.0 / min(transform.scale))
    centre = np.array([0.47 * (width - 1), 0.52 * (height - 1)])
    y, x = np.mgrid[:height, :width]
    spot = np.exp(-0.5 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / spread**2)
    values = np.round(255 * spot).astype(np.uint8)
    network = transform.apply(Image.fromarray(np.repeat(values[..., None], 3, axis=2)))[0].numpy().astype(np.float64)
    network[~transform.valid_mask()] = 0
    rows, columns = np.mgrid[: network.shape[0], : network.shape[1]]

    def centroid(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()

    expected = transform.points_to_network(centroid(values.astype(np.float64), x, y))
    # A rounding error of 8 bits over a spot moves its centroid by less; half a pixel would be 0.5 or 0.5 of the scale.
    assert np.abs(centroid(network, columns, rows) - expected).max() < 0.06


@pytest.mark.parametrize(("mode", "original"), [("crop", (640, 480)), ("pad", (640, 480)), ("pad", (48, 64))])
def test_pixels_are_those_of_pillow_and_padding_is_white(mode: str, original: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*original, 3), dtype=np.uint8))
    result = view_transform(original, mode=mode).apply(image).permute(1, 2, 0).numpy()
    assert result.dtype == np.float32
    if mode == "crop":
        expected = np.asarray(image.resize((518, 686), Image.Resampling.BICUBIC))[84:602]
        assert np.array_equal(result, expected.astype(np.float32) / 255)
        return
    if original == (640, 480):
        content, size, padding = result[:, 63:455], (392, 518), [result[:, :63], result[:, 455:]]
    else:
        content, size, padding = result[63:455], (518, 392), [result[:63], result[455:]]
    assert np.array_equal(content, np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float32) / 255)
    assert all((part == 1).all() for part in padding)


@always_the_same
@given(small_transforms)
def test_maps_come_back_to_where_their_pixels_came_from(transform: ViewTransform) -> None:
    """A map that holds its own coordinates: what comes back must be where the transform puts the original's pixel."""
    height, width = transform.original_size
    y, x = np.mgrid[: transform.network_size[0], : transform.network_size[1]]
    back = transform.map_to_original(np.stack([x, y], axis=-1).astype(np.float64))
    assert back.shape == (height, width, 2)
    seen = transform.seen_mask()
    assert np.array_equal(np.isnan(back).all(-1), ~seen)
    rows, columns = np.mgrid[:height, :width]
    expected = transform.points_to_network(np.stack([columns, rows], axis=-1).astype(np.float64))
    shown_rows, shown_columns = np.nonzero(transform.valid_mask())
    low, high = (shown_columns.min(), shown_rows.min()), (shown_columns.max(), shown_rows.max())
    assert np.allclose(back[seen], expected.clip(low, high)[seen], atol=1e-9)


def test_cropped_rows_come_back_as_nan_and_zero() -> None:
    transform = view_transform((640, 480), mode="crop")
    seen = transform.seen_mask()
    # 686 rows are made of 640, 84 are cut off above and below.
    lost = round(84 * 640 / 686)
    assert seen.sum() == (640 - 2 * lost) * 480
    assert not seen[: lost - 1].any()
    assert not seen[-lost + 1 :].any()
    depth = np.ones((518, 518), dtype=np.float32)
    back = transform.map_to_original(depth)
    assert back.dtype == np.float32
    assert np.isnan(back[~seen]).all()
    assert (back[seen] == 1).all()
    ids = transform.map_to_original(np.full((518, 518), 7, dtype=np.int32), interpolation="nearest")
    assert ids.dtype == np.int32
    assert (ids[~seen] == 0).all()
    assert (ids[seen] == 7).all()
    assert (transform.map_to_original(depth, fill=0.0)[~seen] == 0).all()


def test_padding_does_not_leak_into_the_way_back() -> None:
    transform = view_transform((48, 64), image_size=56, mode="pad")
    depth = np.where(transform.valid_mask(), 2.0, np.nan)
    assert (transform.map_to_original(depth) == 2).all()
    assert (transform.map_to_original(depth, interpolation="nearest") == 2).all()


def test_nearest_never_invents_values() -> None:
    transform = view_transform((100, 100), image_size=28)
    ids = np.random.default_rng(0).integers(0, 1000, (28, 28))
    back = transform.map_to_original(ids, interpolation="nearest")
    assert set(np.unique(back)) <= set(np.unique(ids))
    assert back[0, 0] == ids[0, 0]
    assert back[-1, -1] == ids[-1, -1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_maps_keep_the_type_of_torch(dtype: torch.dtype) -> None:
    transform = view_transform((48, 64), image_size=28)
    values = torch.ones(transform.network_size, dtype=dtype)
    back = transform.map_to_original(values, interpolation="bilinear" if dtype.is_floating_point else "nearest")
    assert back.dtype == dtype
    assert back.shape == (48, 64)
    assert (back == 1).all()


def test_nan_of_weight_zero_does_not_spread() -> None:
    transform = view_transform((28, 28), image_size=28)
    depth = np.ones((28, 28))
    depth[5, 5] = np.nan
    assert np.isnan(transform.map_to_original(depth)).sum() == 1


def test_preprocess_keeps_the_grid(grid: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = preprocess(open_scene(grid), image_size=56, on_frame=lambda done, total: calls.append((done, total)))
    assert result.images.shape == (1, 3, 2, 3, 42, 56)
    assert result.images.dtype == torch.float32
    assert 0 <= result.images.min() < result.images.max() <= 1
    assert (result.mode, result.network_size, len(result.transforms)) == ("crop", (42, 56), 2)
    assert calls == [(i, 6) for i in range(1, 7)]
    for t, time in enumerate((1, 2, 10)):
        for n in range(2):
            image = Image.open(grid / f"time_{time}/view{n}.png")
            assert torch.equal(result.images[0, t, n], result.transforms[n].apply(image))


def test_views_of_one_shape_and_different_resolution_need_no_padding(paint, tmp_path: Path) -> None:
    paint("photos/a.png", 64, 48), paint("photos/b.png", 128, 96)
    result = preprocess(open_scene(tmp_path / "photos"), image_size=56)
    assert result.images.shape == (1, 1, 2, 3, 42, 56)
    assert [transform.original_size for transform in result.transforms] == [(48, 64), (96, 128)]


def test_tensor_of_the_network_size_passes_unchanged() -> None:
    images = torch.randint(0, 256, (2, 2, 3, 42, 56), generator=torch.Generator().manual_seed(0)).div(255)
    assert torch.equal(preprocess(Scene.from_tensor(images), image_size=56).images[0], images)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_views_of_different_shape_need_padding(paint, tmp_path: Path) -> None:
    paint("photos/a.png", 64, 48), paint("photos/b.png", 48, 64)
    scene = open_scene(tmp_path / "photos")
    pattern = r"views have different shapes: 'a\.png' is 64x48, 'b\.png' is 48x64; use mode='pad' \(--preprocess pad\)"
    with pytest.raises(SceneError, match=pattern):
        preprocess(scene)
    with pytest.raises(SceneError, match=pattern):
        plan_transforms(scene)
    assert preprocess(scene, image_size=56, mode="pad").images.shape == (1, 1, 2, 3, 56, 56)


@pytest.mark.parametrize(("size", "nearest"), [(500, 504), (519, 518), (13, 14), (0, 14), (-14, 14), (1, 14)])
def test_image_size_that_is_no_multiple_of_14(size: int, nearest: int) -> None:
    with pytest.raises(
        SceneError, match=rf"image_size must be a multiple of 14, got {size}; the nearest is {nearest}$"
    ):
        view_transform((48, 64), image_size=size)


def test_unknown_mode() -> None:
    with pytest.raises(SceneError, match="mode must be 'crop' or 'pad', got 'stretch'"):
        view_transform((48, 64), mode="stretch")


def test_wrong_shapes() -> None:
    transform = view_transform((48, 64), image_size=28)
    with pytest.raises(
        SceneError, match=r"values must be \[H, W, ...\] with \(H, W\) = \(28, 28\).* got shape \(48, 64\)"
    ):
        view_transform((64, 64), image_size=28).map_to_original(np.zeros((48, 64)))
    with pytest.raises(SceneError, match=r"points_to_original: xy must have shape \[..., 2\], got \[5, 3\]"):
        transform.points_to_original(np.zeros((5, 3)))
    with pytest.raises(
        SceneError, match=r"intrinsics_to_network: intrinsics must have shape \[..., 3, 3\], got \[3, 4\]"
    ):
        transform.intrinsics_to_network(np.zeros((3, 4)))
    with pytest.raises(SceneError, match=r"bilinear interpolation needs floating point, got int64; use .*'nearest'"):
        transform.map_to_original(np.zeros(transform.network_size, dtype=np.int64))
    with pytest.raises(SceneError, match="interpolation must be 'bilinear' or 'nearest', got 'cubic'"):
        transform.map_to_original(np.zeros(transform.network_size), interpolation="cubic")
    with pytest.raises(SceneError, match="image must be 64x48, got 10x20"):
        transform.apply(Image.new("RGB", (10, 20)))


def test_padding_to_the_largest_is_centred_and_never_uncrops() -> None:
    wide, tall = view_transform((300, 600), image_size=280), view_transform((600, 300), image_size=280)
    padded = pad_to_largest([wide, tall])
    assert [transform.network_size for transform in padded] == [(280, 280)] * 2
    assert padded[0].offset == (0, 70)
    assert padded[1] == tall
    with pytest.raises(
        SceneError, match="padded_to: 280x400 must be at least 280x280, and equal it where that is cropped"
    ):
        tall.padded_to(400, 280)
    with pytest.raises(SceneError, match="padded_to: 100x140 must be at least 280x140"):
        wide.padded_to(140, 100)


def test_square_of_side_zero() -> None:
    with pytest.raises(SceneError, match="target_size must be at least 1, got 0"):
        square_transform((4, 4), 0)
