"""open_scene and Scene on good input: what belongs to which time and view, in which order, and what pixels come out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.scene import Scene, open_scene
from vggt_mv.scene.sources import opening
from vggt_mv.scene.sources.images import check_image, read_image, to_rgb


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grid_is_times_by_views_in_natural_order(grid: Path) -> None:
    scene = open_scene(grid)
    assert (scene.num_times, scene.num_views, scene.kind, scene.single_sequence) == (3, 2, "grid", False)
    assert scene.names[2] == ["time_10/view0.png", "time_10/view1.png"]
    assert scene.view_names == ["view0", "view1"]
    assert scene.image_sizes == [(30, 40), (30, 40)]
    assert scene.image_size == (30, 40)
    assert scene.times is None
    assert scene.describe() == "grid: 3 times x 2 views, 40x30"
    frames = list(scene.frames())
    assert [len(views) for views in frames] == [2, 2, 2]
    for time, views in zip((1, 2, 10), frames, strict=True):
        for n, image in enumerate(views):
            assert np.array_equal(pixels(image), pixels(Image.open(grid / f"time_{time}/view{n}.png")))


def test_grid_takes_views_and_leaves_masks_and_the_rest_alone(grid: Path, paint) -> None:
    paint("grid/time_2/mask0.png")
    paint("grid/overview.png")
    (grid / "time_1/.view2.png").write_bytes(b"hidden")
    (grid / "masks").mkdir()
    scene = open_scene(grid)
    assert (scene.num_times, scene.num_views) == (3, 2)
    assert scene.notes == ["1 image beside the time_* folders ignored"]


def test_grid_without_the_word_view_uses_all_images_and_any_suffix(paint, tmp_path: Path) -> None:
    for name in ("time_0/left.png", "time_0/right.jpg", "time_1/left.webp", "time_1/right.PNG"):
        paint(f"rig/{name}")
    scene = open_scene(tmp_path / "rig")
    assert scene.view_names == ["left", "right"]
    assert scene.names[1] == ["time_1/left.webp", "time_1/right.PNG"]


def test_views_of_a_grid_may_differ_in_size(paint, tmp_path: Path) -> None:
    for t in range(2):
        paint(f"rig/time_{t}/view0.png", 40, 30)
        paint(f"rig/time_{t}/view1.png", 20, 50)
    scene = open_scene(tmp_path / "rig")
    assert scene.image_sizes == [(30, 40), (50, 20)]
    assert scene.describe() == "grid: 2 times x 2 views, 20x50, 40x30"


def test_folder_is_views_unless_names_count_frames(paint, tmp_path: Path) -> None:
    for i in (1, 2, 10):
        paint(f"photos/{i}.png", seed=i)
        paint(f"frames/frame_{i:04d}.png", seed=i)
    photos, frames = open_scene(tmp_path / "photos"), open_scene(tmp_path / "frames")
    assert (photos.num_times, photos.num_views, photos.layout, photos.kind) == (1, 3, "views", "folder")
    assert photos.names == [["1.png", "2.png", "10.png"]]
    assert photos.view_names == ["1", "2", "10"]
    assert "layout 'views': images of one folder are taken as views of one moment" in photos.notes[0]
    assert (frames.num_times, frames.num_views, frames.layout) == (3, 1, "times")
    assert frames.view_names == ["frames"]
    assert "layout 'times': file names such as 'frame_0001.png' count frames" in frames.notes[0]
    assert photos.single_sequence
    assert frames.single_sequence


def test_layout_is_obeyed(paint, tmp_path: Path) -> None:
    for i in range(3):
        paint(f"frames/frame_{i}.png", seed=i)
    views = open_scene(tmp_path / "frames", layout="views")
    times = open_scene(tmp_path / "frames", layout="times")
    assert (views.num_times, views.num_views, views.notes) == (1, 3, [])
    assert (times.num_times, times.num_views, times.notes) == (3, 1, [])
    flat = [pixels(image) for image in views.images()]
    assert all(np.array_equal(a, pixels(b[0])) for a, b in zip(flat, times.frames(), strict=True))


def test_other_files_in_a_folder_are_noted(paint, tmp_path: Path) -> None:
    paint("photos/a.png"), paint("photos/b.png")
    (tmp_path / "photos/readme.txt").write_text("hello")
    assert open_scene(tmp_path / "photos", layout="views").notes == [
        "photos: 1 file of other kinds ignored (readme.txt)"
    ]


def test_list_of_images_keeps_its_order(paint) -> None:
    paths = [paint("b/img.png", seed=1), paint("a/img.png", seed=2)]
    scene = open_scene(paths)
    assert (scene.kind, scene.num_times, scene.num_views) == ("folder", 1, 2)
    assert scene.names == [["b/img.png", "a/img.png"]]
    assert np.array_equal(pixels(next(scene.images())), pixels(Image.open(paths[0])))


def test_camera_folders_match_by_name(paint, tmp_path: Path) -> None:
    for camera in ("left", "right"):
        for i in (2, 10, 1):
            paint(f"{camera}/rgb/{i}.png", seed=i + 100 * (camera == "left"))
    scene = open_scene([tmp_path / "left/rgb", tmp_path / "right/rgb"])
    assert (scene.kind, scene.num_times, scene.num_views, scene.single_sequence) == ("folders", 3, 2, False)
    assert scene.view_names == ["left/rgb", "right/rgb"]
    assert scene.names[2] == ["left/rgb/10.png", "right/rgb/10.png"]
    assert "folders synchronised by file names" in scene.notes
    assert np.array_equal(pixels(list(scene.frames())[2][1]), pixels(Image.open(tmp_path / "right/rgb/10.png")))


def test_camera_folders_without_common_names_match_by_order(paint, tmp_path: Path) -> None:
    for i in range(3):
        paint(f"a/left{i}.png", seed=i)
        paint(f"b/right{i + 7}.png", seed=i)
    scene = open_scene([tmp_path / "a", tmp_path / "b"])
    assert scene.names[1] == ["a/left1.png", "b/right8.png"]
    assert "folders synchronised by order: their file names differ" in scene.notes


@pytest.mark.parametrize(
    ("count", "max_frames", "expected"),
    [(9, 3, [0, 4, 8]), (10, 4, [0, 3, 6, 9]), (5, 5, [0, 1, 2, 3, 4]), (5, 50, [0, 1, 2, 3, 4]), (7, 2, [0, 6])],
)
def test_max_frames_spreads_evenly(paint, tmp_path: Path, count: int, max_frames: int, expected: list[int]) -> None:
    for i in range(count):
        paint(f"seq/{i}.png", 8, 8, seed=i)
    for layout in ("views", "times"):
        scene = open_scene(tmp_path / "seq", layout=layout, max_frames=max_frames)
        names = [name for views in scene.names for name in views]
        assert names == [f"{i}.png" for i in expected]
        assert (f"{max_frames} of {count} {layout} used, evenly spread (max_frames)" in scene.notes) == (
            max_frames < count
        )


def test_max_frames_of_a_grid_subsamples_times_and_leaves_out_damaged_files(grid: Path) -> None:
    (grid / "time_2/view0.png").write_bytes(b"not opened")
    scene = open_scene(grid, max_frames=2)
    assert [names[0] for names in scene.names] == ["time_1/view0.png", "time_10/view0.png"]
    assert scene.num_views == 2


def test_one_image_passes_when_allowed(paint) -> None:
    scene = open_scene(paint("one.png"), allow_single=True)
    assert (scene.num_times, scene.num_views, scene.names) == (1, 1, [["one.png"]])


def test_home_is_expanded(paint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paint("photos/a.png"), paint("photos/b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_scene("~/photos").num_views == 2


def test_progress_counts_every_file(grid: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_scene(grid, on_frame=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]


def test_images_are_decoded_lazily_one_at_a_time(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(opening, "read_image", lambda path: read.append(path) or read_image(path))
    scene = open_scene(grid)
    assert read == []
    images = scene.images()
    next(images)
    assert len(read) == 1


def test_reading_can_begin_later_and_in_a_part(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = open_scene(grid)
    every = [[np.asarray(image) for image in views] for views in scene.frames()]
    read: list[Path] = []
    monkeypatch.setattr(opening, "read_image", lambda path: read.append(path) or read_image(path))
    later = [[np.asarray(image) for image in views] for views in scene.frames(1)]
    np.testing.assert_array_equal(later, every[1:])
    assert len(read) == 4  # what lies before is not opened
    part = scene.part(1, 2)
    assert (part.names, part.num_times, part.view_names) == (scene.names[1:2], 1, scene.view_names)
    np.testing.assert_array_equal([[np.asarray(image) for image in views] for views in part.frames()], every[1:2])
    assert list(scene.part(0, 3).frames(3)) == list(scene.frames(3)) == []


# What becomes of a pixel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_respected(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.new("RGB", (48, 32), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    # How a camera that was held so stores the upright picture: the inverse of what a viewer does.
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    assert check_image(path) == (32, 48)
    image = read_image(path)
    assert image.size == (48, 32)
    assert np.abs(pixels(image)[8, 8].astype(int) - (255, 0, 0)).max() < 40
    assert np.abs(pixels(image)[24, 40].astype(int) - (0, 0, 255)).max() < 40


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.new("L", (4, 4), 77), (77, 77, 77), id="grey"),
        pytest.param(Image.new("1", (4, 4), 1), (255, 255, 255), id="bilevel"),
        pytest.param(Image.new("I;16", (4, 4), 77 * 256 + 200), (77, 77, 77), id="grey16"),
        pytest.param(Image.new("I;16", (4, 4), 0xFFFF), (255, 255, 255), id="grey16-white"),
        pytest.param(Image.new("I", (4, 4), 77 * 256), (77, 77, 77), id="int32-of-16-bit"),
        pytest.param(Image.new("F", (4, 4), 0.5), (128, 128, 128), id="float"),
        pytest.param(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255), id="rgba-transparent"),
        pytest.param(Image.new("RGBA", (4, 4), (200, 0, 0, 128)), (227, 127, 127), id="rgba-half"),
        pytest.param(Image.new("LA", (4, 4), (0, 0)), (255, 255, 255), id="grey-alpha"),
        pytest.param(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), (0, 0, 0), id="cmyk"),
        pytest.param(Image.new("HSV", (4, 4), (0, 0, 200)), (200, 200, 200), id="hsv"),
        pytest.param(Image.new("RGB", (4, 4), (9, 8, 7)).quantize(4), (9, 8, 7), id="palette"),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(pixels(rgb).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_of_a_png_goes_over_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "keyed.png"
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.save(path, transparency=1)
    else:
        Image.new(mode, (4, 4), 0).save(path, transparency=0 if mode == "L" else (0, 0, 0))
    assert (pixels(read_image(path)) == 255).all()


def test_sixteen_bit_png_file(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert pixels(read_image(path))[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]


# Tensors -------------------------------------------------------------------------------------------------------------


def test_from_tensor_grid() -> None:
    images = torch.rand(2, 3, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    scene = Scene.from_tensor(images)
    assert (scene.num_times, scene.num_views, scene.kind, scene.single_sequence) == (2, 3, "tensor", False)
    assert scene.image_size == (6, 8)
    decoded = np.stack([[pixels(image) for image in views] for views in scene.frames()])
    assert np.abs(decoded / 255 - images.permute(0, 1, 3, 4, 2).numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("layout", "size"), [("auto", (1, 3)), ("views", (1, 3)), ("times", (3, 1))])
def test_from_tensor_sequence(layout: str, size: tuple[int, int]) -> None:
    scene = Scene.from_tensor(torch.zeros(3, 3, 4, 4), layout=layout)
    assert (scene.num_times, scene.num_views) == size
    assert scene.single_sequence


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_from_tensor_dtypes_and_numpy(dtype: torch.dtype) -> None:
    value = 255 if dtype == torch.uint8 else 1
    tensor = torch.full((2, 3, 4, 4), value, dtype=dtype)
    sources = [tensor] if dtype == torch.bfloat16 else [tensor, tensor.numpy()]
    for source in sources:
        assert all((pixels(image) == 255).all() for image in Scene.from_tensor(source).images())


def test_from_tensor_takes_unusual_arrays() -> None:
    ramp = np.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    plain = [pixels(image) for image in Scene.from_tensor(ramp).images()]
    for unusual in (ramp[::-1][::-1], ramp.astype(">f4"), ramp.astype(np.longdouble)):
        again = [pixels(image) for image in Scene.from_tensor(unusual).images()]
        assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))
    flipped = [pixels(image) for image in Scene.from_tensor(ramp[::-1]).images()]
    assert np.array_equal(flipped[0], plain[1])


def test_from_tensor_shares_nothing() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    scene = Scene.from_tensor(images)
    images.fill_(255)
    assert all((pixels(image) == 0).all() for image in scene.images())


def test_view_names_of_a_tensor() -> None:
    assert Scene.from_tensor(torch.zeros(2, 2, 3, 4, 4), view_names=["left", "right"]).view_names == ["left", "right"]


def test_a_file_that_changes_after_opening_is_found(grid: Path) -> None:
    scene = open_scene(grid)
    Image.new("RGB", (20, 20)).save(grid / "time_2/view1.png")
    with pytest.raises(ValueError, match=r"'time_2/view1\.png' of .*decodes to 20x20, but its header .* said 40x30"):
        list(scene.frames())


def test_png_bytes_are_not_decoded_by_the_check(tmp_path: Path) -> None:
    """The check of a PNG is its checksums: flipping one byte of its data must be found by them."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "flipped.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        check_image(path)
