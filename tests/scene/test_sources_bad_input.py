"""Bad input to open_scene and Scene.from_tensor: one line that names the thing and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.errors import SceneError, VggtMvError
from vggt_mv.scene import Scene, open_scene


def message(source: Any, **options: Any) -> str:
    with pytest.raises(SceneError) as caught:
        open_scene(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, VggtMvError)
    return text


def matches(source: Any, pattern: str, **options: Any) -> None:
    text = message(source, **options)
    assert re.search(pattern, text), text


def test_missing_path_shows_what_is_near(paint, tmp_path: Path) -> None:
    paint("photos/a.png")
    matches(tmp_path / "fotos", r"fotos' does not exist; check its spelling \('.*' holds photos\)")
    matches(tmp_path / "photos/deep/er", r"er' does not exist; check its spelling \('.*photos' holds a\.png\)")


def test_missing_path_in_an_empty_folder(tmp_path: Path) -> None:
    matches(tmp_path / "fotos", r"check its spelling \('.*' is empty\)")


def test_empty_path() -> None:
    matches("", r"^'' does not exist")


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    matches(tmp_path / "link", "does not exist; it is a link to something that is gone; mend or remove it")


def test_empty_folder(tmp_path: Path) -> None:
    matches(tmp_path, r"folder '.*' is empty; name a folder of images, of time_\*/view\* images, or a video")


def test_empty_list() -> None:
    matches([], "source is an empty list; name a folder, images or videos")


@pytest.mark.parametrize("source", [5, None, [1, 2], torch.zeros(2, 3, 4, 4)])
def test_source_of_another_type(source: Any) -> None:
    matches(
        source, r"source must be a path or a sequence of paths, got .*; for images in memory use Scene\.from_tensor"
    )


def test_folder_without_images_lists_what_it_has(tmp_path: Path) -> None:
    for name in ("a.txt", "b.json", "c.csv", "d.npz", "e.heic"):
        (tmp_path / name).write_text("x")
    (tmp_path / "deep").mkdir()
    matches(tmp_path, r"has no images, it has a\.txt, b\.json, c\.csv, d\.npz and 2 more; supported are \.png, \.jpg")


def test_folder_of_camera_folders_says_how_to_name_them(paint, tmp_path: Path) -> None:
    paint("rig/cam0/0.png"), paint("rig/cam1/0.png")
    matches(tmp_path / "rig", r"has no images, it has cam0/, cam1/; name its folders themselves, one per camera")


@pytest.mark.parametrize("name", ["images/0.png", "images/time_0/view0.png"])
def test_folder_above_the_images_says_which_to_name(paint, tmp_path: Path, name: str) -> None:
    paint(f"rig/{name}")
    (tmp_path / "rig/notes").mkdir()
    matches(tmp_path / "rig", r"has no images, it has images/, notes/; name the folder that has them: .*rig/images$")


def test_folder_of_videos_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "cam0.mp4").write_bytes(b"x")
    matches(tmp_path, r"has no images, it has cam0\.mp4; name the videos themselves, one per camera: .*cam0\.mp4")


def test_text_file_called_png(paint, tmp_path: Path) -> None:
    paint("photos/a.png")
    (tmp_path / "photos/b.png").write_text("hello, I am text")
    matches(
        tmp_path / "photos", r"b\.png' is not an image in a known format \(it starts with b'hello, I'\); replace or"
    )


def test_empty_image(paint, tmp_path: Path) -> None:
    paint("photos/a.png")
    (tmp_path / "photos/b.png").write_bytes(b"")
    matches(tmp_path / "photos", r"b\.png' is empty \(0 bytes\); copy it again or remove it")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_truncated_image_is_found_when_the_scene_is_opened(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, cut = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    # Of some formats, too little is left to tell what it was.
    matches(tmp_path, rf"b\.{suffix}' is (truncated or damaged|not an image in a known format)")


def test_unreadable_image(paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, since the superuser may read everything."""
    paint("photos/a.png"), paint("photos/b.png")

    def refuse(path: Path) -> Image.Image:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    matches(
        tmp_path / "photos", r"a\.png' cannot be opened \(Permission denied\); check that it is a file that you may"
    )


def test_folder_with_the_name_of_an_image(paint, tmp_path: Path) -> None:
    """Folders are never taken for images, whatever their name."""
    paint("photos/a.png"), (tmp_path / "photos/b.png").mkdir()
    matches(tmp_path / "photos", "one image only")


def test_values_without_one_meaning(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3.5, dtype=np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32)).save(tmp_path / "b.tif")
    scene = open_scene(tmp_path)
    images = scene.images()
    with pytest.raises(SceneError, match=r"a\.tif' has float values from 3\.5 to 3\.5; they must be .* in \[0, 1\]"):
        next(images)
    with pytest.raises(SceneError, match=r"b\.tif' has 32-bit integer values from 1048576 .*; values must fit 16 bits"):
        next(open_scene([tmp_path / "b.tif"], allow_single=True).images())


def test_sizes_that_change_over_time_name_two_files(grid: Path, paint) -> None:
    paint("grid/time_2/view1.png", 41, 30)
    matches(
        grid,
        r"images of view 'view1' must have one size at all times: 'time_1/view1\.png' is 40x30, "
        r"'time_2/view1\.png' is 41x30; scale them",
    )


def test_sizes_that_change_in_a_sequence_point_to_views(paint, tmp_path: Path) -> None:
    paint("seq/frame_0.png", 40, 30), paint("seq/frame_1.png", 30, 40)
    matches(
        tmp_path / "seq",
        r"'frame_0\.png' is 40x30, 'frame_1\.png' is 30x40; if these are different cameras, use layout='views', "
        r"mode='pad' \(--as views --preprocess pad\)",
    )


def test_view_missing_at_a_time(grid: Path) -> None:
    (grid / "time_2/view1.png").unlink()
    matches(
        grid,
        r"view 'view1' is missing at time 'time_2' of '.*grid' \(1 of 6 images missing\); add it, or remove that",
    )


def test_time_without_images(grid: Path) -> None:
    (grid / "time_3").mkdir()
    (grid / "time_3/log.txt").write_text("x")
    matches(grid, r"time_3' has no images, it has log\.txt; add its views or remove it")


def test_time_folders_with_different_view_names(paint, tmp_path: Path) -> None:
    for name in ("time_0/left", "time_0/right", "time_1/cam0", "time_1/cam1"):
        paint(f"rig/{name}.png")
    matches(
        tmp_path / "rig",
        r"the time_\* folders of '.*rig' must hold the same views: time_0 has left, right, but time_1 has 'cam0'; "
        r"give each camera one name at all times",
    )


def test_two_images_of_one_view(grid: Path, paint) -> None:
    paint("grid/time_1/view0.jpg")
    matches(grid, r"time_1' has two images of one view: view0\.(jpg and view0\.png|png and view0\.jpg); remove one")


def test_one_image_only(paint, tmp_path: Path) -> None:
    path = paint("photos/a.png")
    for source in (path, [path], tmp_path / "photos"):
        matches(source, r"one image only, .*; add more, or pass allow_single=True \(--allow-single\)")


def test_one_frame_left_by_max_frames(grid: Path, paint, tmp_path: Path) -> None:
    for i in range(3):
        paint(f"seq/{i}.png")
    matches(tmp_path / "seq", "one image only", max_frames=1)
    assert open_scene(grid, max_frames=1).num_images == 2


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", True])
def test_max_frames_that_is_no_count(grid: Path, value: Any) -> None:
    matches(grid, rf"max_frames must be a whole number of at least 1, got {value!r}", max_frames=value)


def test_unsupported_suffix(tmp_path: Path) -> None:
    (tmp_path / "scan.heic").write_bytes(b"x")
    matches(
        tmp_path / "scan.heic",
        r"scan\.heic' has suffix '\.heic'; supported are folders, images \(\.png.*\) and videos \(\.mp4.*\); convert",
    )


def test_sources_of_two_sorts(grid: Path, paint) -> None:
    image = paint("a.png")
    matches([grid, image], r"sources must be of one sort: '.*grid' is a folder, '.*a\.png' an image; name folders only")


def test_source_named_twice(grid: Path) -> None:
    matches([grid, grid / "../grid"], r"is named twice; every camera or image is named once")


def test_grid_among_camera_folders(grid: Path, paint, tmp_path: Path) -> None:
    paint("other/a.png")
    matches([grid, tmp_path / "other"], r"grid' has time_\* folders, which hold all cameras of a time: name it alone")


def test_camera_folder_lacks_an_image(paint, tmp_path: Path) -> None:
    for i in range(4):
        paint(f"a/{i}.png")
        if i != 2:
            paint(f"b/{i}.png")
    matches(
        [tmp_path / "a", tmp_path / "b"],
        r"camera folder '.*b' lacks image '2', which other cameras have \(1 missing in it\); add it, or remove it",
    )


def test_camera_folders_of_different_length(paint, tmp_path: Path) -> None:
    for i in range(3):
        paint(f"a/left{i}.png")
    paint("b/right0.png")
    matches(
        [tmp_path / "a", tmp_path / "b"],
        r"must hold equally many images: '.*b' has 1, '.*a' has 3; add or remove images, or give images of one time",
    )


def test_unknown_layout(grid: Path) -> None:
    matches(grid, "layout must be 'auto', 'views' or 'times', got 'view'", layout="view")


def test_layout_where_it_means_nothing(grid: Path, paint, tmp_path: Path) -> None:
    matches(
        grid,
        r"layout='times' \(--as\) is only for one folder .*with time_\* folders is not; leave it out",
        layout="times",
    )
    paint("a/0.png"), paint("b/0.png")
    matches([tmp_path / "a", tmp_path / "b"], "a set of 2 camera folders is not; leave it out", layout="views")


# Tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "pattern"),
    [
        ([[1.0]], r"images must be a torch tensor or a numpy array .*, got list"),
        (torch.zeros(3, 8, 8), r"must have shape \[T,N,3,H,W\] or \[S,3,H,W\], got 3 dimensions \[3, 8, 8\]$"),
        (
            torch.zeros(1, 2, 2, 3, 8, 8),
            r"got 6 dimensions \[1, 2, 2, 3, 8, 8\]; take the batch apart first: images\[0\]",
        ),
        (torch.zeros(0, 3, 8, 8), r"images must not be empty, got shape \[0, 3, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), r"must have 3 channels \(RGB\) in dimension -3, got 1 in shape \[2, 1, 8, 8\]$"),
        (torch.zeros(2, 8, 8, 3), r"got 8 in shape \[2, 8, 8, 3\]; move the channels: images\.movedim\(-1, -3\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"must be floating point in \[0, 1\] or uint8, got torch\.int64"),
        (np.full((2, 3, 8, 8), "a"), r"must be floating point in \[0, 1\] or uint8, got <U1"),
        (torch.full((2, 3, 8, 8), 200.0), r"must be in \[0, 1\], got values from 200 to 200; divide by 255"),
        (torch.full((2, 3, 8, 8), -2.0), r"must be in \[0, 1\], got values from -2 to -2; undo their normalisation"),
        (torch.zeros(1, 3, 8, 8), r"images: one image only, .*allow_single=True \(--allow-single\)"),
    ],
)
def test_bad_tensors(images: Any, pattern: str) -> None:
    with pytest.raises(SceneError, match=pattern):
        Scene.from_tensor(images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_tensor_is_located(bad: float) -> None:
    images = torch.zeros(2, 2, 3, 8, 8)
    images[1, 0, 2, 3, 4] = bad
    images[1, 1, 2, 3, 4] = bad
    with pytest.raises(
        SceneError, match=rf"must be finite, got {bad} at index \[1, 0, 2, 3, 4\] \(2 such values\); replace"
    ):
        Scene.from_tensor(images)


def test_layout_of_a_grid_tensor_and_wrong_number_of_names() -> None:
    with pytest.raises(SceneError, match=r"layout='views' .*\[T,N,3,H,W\] = \[2, 2, 3, 8, 8\] is not; leave it out"):
        Scene.from_tensor(torch.zeros(2, 2, 3, 8, 8), layout="views")
    with pytest.raises(SceneError, match="view_names must name 2 views, got 3 names"):
        Scene.from_tensor(torch.zeros(2, 2, 3, 8, 8), view_names=["a", "b", "c"])


def test_one_image_in_a_tensor_passes_when_allowed() -> None:
    assert Scene.from_tensor(torch.zeros(1, 3, 8, 8), allow_single=True).num_images == 1
