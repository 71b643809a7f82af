"""What lies in an output, format by format, read back with other people's readers where there are some."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.export import write_outputs
from vggt_mv.scene.export.depth import color_map, depth_range, depth_to_rgb, preview_names
from vggt_mv.scene.export.npz import ARRAYS
from vggt_mv.scene.preprocess import view_transform
from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE, Reconstruction

T, N, H, W = 2, 3, 42, 56


def provenance(family: str = "vggt") -> Any:
    return SimpleNamespace(family=family, description=f"{family} weights from tests", sources=("somewhere",))


def make(family: str = "vggt", **changes: Any) -> Reconstruction:
    """Cameras on a line, looking along z at a slanted plane; all numbers known in closed form."""
    rng = np.random.default_rng(0)
    extrinsics = np.tile(np.eye(4, dtype=np.float32)[:3], (T, N, 1, 1))
    extrinsics[..., 0, 3] = -np.arange(N)  # camera n stands at x = n
    extrinsics[..., 1, 3] = np.arange(T)[:, None]
    intrinsics = np.tile(np.array([[50, 0, W / 2], [0, 50, H / 2], [0, 0, 1]], dtype=np.float32), (T, N, 1, 1))
    depth = np.broadcast_to(np.linspace(1, 5, W, dtype=np.float32), (T, N, H, W)).copy()
    fields: dict[str, Any] = {
        "images": rng.integers(0, 256, (T, N, H, W, 3), dtype=np.uint8),
        "names": [[f"time_{t:02d}/view{n}.png" for n in range(N)] for t in range(T)],
        "view_names": [f"view{n}" for n in range(N)],
        "transforms": [view_transform((84, 112), image_size=W, mode="crop")] * N,
        "weights": provenance(family),
        "times": [0.0, 0.5],
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "depth": depth,
        "depth_conf": 1 + rng.random((T, N, H, W), dtype=np.float32),
        "world_points": rng.standard_normal((T, N, H, W, 3), dtype=np.float32),
        "world_points_conf": 1 + rng.random((T, N, H, W), dtype=np.float32),
        "dynamic_mask": rng.random((T, N, H // 14, W // 14), dtype=np.float32),
        "given_mask": rng.random((T, N, H, W), dtype=np.float32),
        "query_points": np.array([[3.0, 4.0]], dtype=np.float32),
        "tracks": rng.random((T, N, 1, 2), dtype=np.float32),
        "track_vis": rng.random((T, N, 1), dtype=np.float32),
        "track_conf": rng.random((T, N, 1), dtype=np.float32),
        "report": {"device": "cpu"},
    }
    return Reconstruction(**{**fields, **changes})


def test_npz_holds_every_documented_array_as_documented(tmp_path: Path) -> None:
    reconstruction = make()
    write_outputs(reconstruction, tmp_path)
    sizes = {"T": T, "N": N, "H": H, "W": W, "h": H // 14, "w": W // 14, "M": 1}
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as file:
        assert set(file.files) == {spec.name for spec in ARRAYS}
        for spec in ARRAYS:
            array = file[spec.name]
            assert array.shape == tuple(sizes.get(axis) or int(axis) for axis in spec.axes.split()), spec.name
            assert array.dtype.kind == "U" if spec.dtype == "str" else array.dtype == np.dtype(spec.dtype), spec.name
            assert spec.name in file["__doc__"].item()
        np.testing.assert_array_equal(file["depth"], reconstruction.depth)
        assert file["names"][1, 2] == "time_01/view2.png"
        assert file["times"].tolist() == [0.0, 0.5]
        assert not file["random_weights"]
        # The original is twice as large: so are its focal lengths.
        np.testing.assert_allclose(file["intrinsics_original"][0, 0, 0, 0], 100, rtol=1e-6)


def test_docs_list_every_array_and_file() -> None:
    text = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
    for spec in ARRAYS:
        shape = f"[{', '.join(spec.axes.split())}]"
        assert f"| `{spec.name}` | `{shape}` | {spec.dtype} | {spec.unit} |" in text, spec
    for name in (
        "predictions.npz",
        "cameras.json",
        "points.ply",
        "depth/",
        "dynamic_mask/",
        "overview.png",
        "report.json",
    ):
        assert f"`{name}`" in text


def test_points_lie_where_the_formula_puts_them() -> None:
    reconstruction = make()
    points = reconstruction.points_from_depth
    # Camera (t=1, n=2): X_world = depth * ((x - cx)/f, (y - cy)/f, 1) - t.
    x, y = 7, 11
    depth = 1 + 4 * x / (W - 1)
    expected = [depth * (x - W / 2) / 50 + 2, depth * (y - H / 2) / 50 - 1, depth]
    np.testing.assert_allclose(points[1, 2, y, x], expected, rtol=1e-5)


@pytest.mark.parametrize("with_cameras", [True, False], ids=["depth", "points"])
def test_ply_is_read_by_trimesh(tmp_path: Path, with_cameras: bool) -> None:
    reconstruction = make() if with_cameras else make(extrinsics=None, intrinsics=None)
    write_outputs(reconstruction, tmp_path, conf_percentile=75)
    cloud = reconstruction.point_cloud(75)
    read = trimesh.load(tmp_path / "points.ply")
    assert isinstance(read, trimesh.PointCloud)
    np.testing.assert_array_equal(np.asarray(read.vertices, dtype=np.float32), cloud.points)
    np.testing.assert_array_equal(np.asarray(read.colors)[:, :3], cloud.colors)
    assert len(cloud) == T * N * H * W // 4
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["points"]["count"] == len(cloud)
    assert report["points"]["conf_threshold"] == cloud.threshold
    assert ("cameras.json" in report["not_written"]) == (not with_cameras)
    assert (tmp_path / "cameras.json").exists() == with_cameras


def test_point_cloud_keeps_colour_time_and_view_of_each_point() -> None:
    reconstruction = make()
    cloud = reconstruction.point_cloud(0)
    assert len(cloud) == T * N * H * W
    index = ((1 * N + 2) * H + 11) * W + 7
    np.testing.assert_array_equal(cloud.points[index], reconstruction.points_from_depth[1, 2, 11, 7])
    np.testing.assert_array_equal(cloud.colors[index], reconstruction.images[1, 2, 11, 7])
    assert (cloud.time[index], cloud.view[index]) == (1, 2)
    assert cloud.confidence is not None and reconstruction.depth_conf is not None
    assert cloud.confidence[index] == reconstruction.depth_conf[1, 2, 11, 7]


def test_point_cloud_drops_what_is_no_point() -> None:
    reconstruction = make()
    depth, conf = reconstruction.depth, reconstruction.depth_conf
    assert depth is not None and conf is not None
    depth[0, 0, 0, :4] = [np.nan, np.inf, 0, -1]
    conf[0, 0, 1, :2] = [np.nan, np.inf]
    cloud = reconstruction.point_cloud(0)
    assert len(cloud) == T * N * H * W - 6
    assert np.isfinite(cloud.points).all()


def test_point_cloud_drops_padding() -> None:
    wide = view_transform((42, 84), image_size=56, mode="pad")
    reconstruction = make()
    reconstruction = make(
        transforms=[wide] * N,
        **{k: getattr(reconstruction, k)[:, :, :1].repeat(56, 2) for k in ("images", "depth", "depth_conf")},
    )
    assert wide.network_size == (56, 56)
    cloud = reconstruction.point_cloud(0, source="depth")
    assert len(cloud) == T * N * 28 * 56
    rows = (np.asarray(reconstruction.points_from_depth) == cloud.points[0]).all(-1).nonzero()[2]
    assert rows[0] == 14


def test_point_cloud_limits_are_even_and_repeatable() -> None:
    reconstruction = make()
    first, second = (reconstruction.point_cloud(0, max_points=500) for _ in range(2))
    assert len(first) == 500
    np.testing.assert_array_equal(first.points, second.points)
    # 250 +- 5 sigma of each half of the frames.
    assert 194 < (first.time == 0).sum() < 306


def test_a_cloud_without_points_is_a_file_without_vertices(tmp_path: Path) -> None:
    reconstruction = make(depth=np.full((T, N, H, W), np.nan, dtype=np.float32))
    write_outputs(reconstruction, tmp_path)
    assert b"element vertex 0\n" in (tmp_path / "points.ply").read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["non_finite"] == {"depth": T * N * H * W}
    assert report["points"]["count"] == 0


def test_cameras_json_names_both_directions(tmp_path: Path) -> None:
    reconstruction = make()
    write_outputs(reconstruction, tmp_path)
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    assert len(cameras["cameras"]) == T * N
    for camera in cameras["cameras"]:
        product = np.array(camera["camera_from_world"]) @ np.array(camera["world_from_camera"])
        np.testing.assert_allclose(product, np.eye(4), atol=1e-6)
    camera = cameras["cameras"][5]
    assert (camera["time"], camera["view"], camera["image"]) == (1, 2, "time_01/view2.png")
    assert [row[3] for row in camera["world_from_camera"]] == [2, -1, 0, 1]
    assert camera["intrinsics"]["network"][0][0] == 50
    assert camera["intrinsics"]["original"][0][0] == pytest.approx(100)
    assert cameras["views"][0]["original_size"] == {"height": 84, "width": 112}
    assert "OpenCV" in cameras["convention"]["axes"]
    # The stated map takes the original's principal point to the network's.
    original = np.array(camera["intrinsics"]["original"])[:, 2]
    network = np.array(cameras["views"][2]["network_from_original"]) @ original
    np.testing.assert_allclose(network, [W / 2, H / 2, 1], rtol=1e-6)


def test_cameras_that_are_not_finite_become_null(tmp_path: Path) -> None:
    reconstruction = make()
    assert reconstruction.intrinsics is not None
    reconstruction.intrinsics[0, 1, 0, 0] = np.inf
    write_outputs(reconstruction, tmp_path)
    camera = json.loads((tmp_path / "cameras.json").read_text())["cameras"][1]
    assert camera["intrinsics"] == {"network": None, "original": None}
    assert camera["camera_from_world"] is not None


def test_depth_previews_carry_the_names_of_their_images(tmp_path: Path) -> None:
    write_outputs(make(), tmp_path)
    assert sorted(p.name for p in (tmp_path / "depth").iterdir()) == [
        f"time_{t:02d}_view{n}.png" for t in range(T) for n in range(N)
    ]
    with Image.open(tmp_path / "depth" / "time_00_view0.png") as picture:
        assert picture.size == (W, H)
        pixels = np.asarray(picture).astype(int)
    # Depth grows to the right, and near is bright.
    assert pixels[5, 3].sum() > pixels[5, 20].sum() > pixels[5, 50].sum()


def test_preview_names_are_safe_and_distinct() -> None:
    names = preview_names([["a/b.png", "a_b.jpg"], ["../../etc/passwd", "  "], ["A_B.PNG", "cam#0001 x.tiff"]])
    flat = [name for row in names for name in row]
    assert flat[0] == "a_b.png"
    assert len({name.lower() for name in flat}) == 6
    assert all("/" not in name and not name.startswith(".") for name in flat)


def test_color_map_is_even_in_lightness_and_spans_it() -> None:
    rgb = color_map().astype(np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    # OKLab lightness straight from its definition.
    to_cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lightness = np.cbrt(linear @ to_cone.T) @ [0.2104542553, 0.7936177850, -0.0040720468]
    assert np.diff(lightness).min() > 0.75 / 255 - 0.004  # 0.004: rounding to 8 bits
    np.testing.assert_allclose(lightness, np.linspace(0.18, 0.93, 256), atol=0.004)


def test_depth_colours_at_the_ends_and_where_there_is_none() -> None:
    depth = np.array([[1.0, 2.0, np.nan, 0.0, np.inf, 1.0]])
    valid = np.array([[True, True, True, True, True, False]])
    rgb = depth_to_rgb(depth, *depth_range(np.array([1.0, 2.0]), None), valid)[0]
    assert (rgb[0] == color_map()[255]).all() and (rgb[1] == color_map()[0]).all()
    assert (rgb[2:] == 110).all()
    flat = depth_to_rgb(np.ones((2, 2)), 1.0, 1.0)
    assert (flat == color_map()[128]).all()
    assert depth_range(np.full((3, 3), np.nan)) == (1.0, 1.0)


def test_random_weights_are_written_all_over(tmp_path: Path) -> None:
    for kind in ("random", "trained"):
        (tmp_path / kind).mkdir()
    write_outputs(make(family="random"), tmp_path / "random")
    write_outputs(make(), tmp_path / "trained")
    for kind, is_random in (("random", True), ("trained", False)):
        folder = tmp_path / kind
        report, cameras = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "cameras"))
        for weights in (report["weights"], cameras["weights"]):
            assert weights["random"] is is_random
            assert (weights.get("note") == RANDOM_WEIGHTS_NOTE) is is_random
        with np.load(folder / "predictions.npz") as file:
            assert bool(file["random_weights"]) is is_random
            assert (RANDOM_WEIGHTS_NOTE in file["__doc__"].item()) is is_random
        header = (folder / "points.ply").read_bytes().split(b"end_header")[0]
        assert (f"comment {RANDOM_WEIGHTS_NOTE}".encode() in header) is is_random
        for name in ("depth/time_00_view0.png", "overview.png"):
            with Image.open(folder / name) as picture:
                assert (picture.info.get("Comment") == RANDOM_WEIGHTS_NOTE) is is_random
                # The label: a red strip at the bottom with white letters in it.
                strip = np.asarray(picture)[-16:]
                assert ((strip[0] == (170, 20, 20)).all() or (strip[-1] == (170, 20, 20)).all()) == is_random
                assert not is_random or (strip.min(-1) > 200).sum() > 20


def test_report_lists_files_arrays_and_what_was_recorded(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    write_outputs(
        make(depth=None, depth_conf=None, dynamic_mask=None, given_mask=None),
        tmp_path,
        progress=lambda *step: steps.append(step),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["format"] == "vggt_mv.reconstruction"
    assert report["device"] == "cpu"
    assert report["files"] == ["cameras.json", "overview.png", "points.ply", "predictions.npz", "report.json"]
    assert report["not_written"] == {
        "depth": "the model has no depth head",
        "dynamic_mask": "no mask of what moves was predicted or given",
    }
    assert report["arrays"]["world_points"]["shape"] == [T, N, H, W, 3]
    assert "depth" not in report["arrays"]
    assert report["seconds"]["write"] > 0
    assert [step[1] for step in steps] == list(range(1, 6)) and steps[-1] == ("write", 5, 5)


def test_depth_comes_back_at_original_size() -> None:
    reconstruction = make()
    depth = reconstruction.depth_at_original(1, 2)
    assert depth.shape == (84, 112) and depth.dtype == np.float32
    assert depth.min() >= 1 and depth.max() <= 5
    with pytest.raises(VggtMvError, match=r"frame \(time 2, view 0\) is outside of 2 times x 3 views"):
        reconstruction.depth_at_original(2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.point_cloud(100), r"conf_percentile must be in \[0, 100\), got 100"),
        (lambda r: r.point_cloud(float("nan")), r"conf_percentile must be in \[0, 100\), got nan"),
        (lambda r: r.point_cloud(max_points=0), "max_points must be at least 1, got 0"),
        (lambda r: r.point_cloud(source="mesh"), "source must be 'auto', 'depth' or 'points', got 'mesh'"),
        (lambda r: make(depth=None).point_cloud(source="depth"), "source='depth' needs depth and cameras"),
        (lambda r: make(world_points=None).point_cloud(source="points"), "source='points' needs world points"),
        (lambda r: make(depth=None).points_from_depth, "points_from_depth needs depth and cameras"),
        (lambda r: make(depth=None).depth_at_original(0, 0), "depth_at_original needs depth"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        call(make())
