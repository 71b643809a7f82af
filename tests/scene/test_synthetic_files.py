"""A synthetic scene on disk: complete or not there, and readable by everybody else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.errors import VggtMvError
from vggt_mv.scene import SyntheticScene, open_scene, synthetic_scene


@pytest.fixture(scope="module")
def scene() -> SyntheticScene:
    return synthetic_scene(num_times=2, num_views=3, height=28, width=42, seed=1, antialias=1, num_tracks=16)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_written_and_comes_back(scene: SyntheticScene, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = scene.save(tmp_path / "deep/out", on_frame=lambda done, total: calls.append((done, total)))
    assert out == tmp_path / "deep/out"
    assert calls == [(i, 6) for i in range(1, 7)]
    names = [f"time_{t:02d}/view{n}.png" for t in range(2) for n in range(3)]
    assert files_in(out) == {*names, *(f"masks/{name}" for name in names), "cameras.json", "ground_truth.npz"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    opened = open_scene(out)
    assert opened.describe() == "grid: 2 times x 3 views, 42x28"
    for t, views in enumerate(opened.frames()):
        for n, image in enumerate(views):
            difference = np.asarray(image) / 255 - scene.images[t, n].transpose(1, 2, 0)
            assert np.abs(difference).max() <= 0.5 / 255 + 1e-6
            mask = np.asarray(Image.open(out / f"masks/time_{t:02d}/view{n}.png"))
            assert np.array_equal(mask, scene.moving_mask[t, n] * 255)

    with np.load(out / "ground_truth.npz", allow_pickle=False) as truth:
        for name in set(truth.files) - {"object_names", "object_moving"}:
            assert np.array_equal(truth[name], getattr(scene, name), equal_nan=name == "tracks"), name
        assert len(truth.files) == 14
        assert truth["object_names"].tolist() == scene.object_names
        assert truth["object_moving"].tolist() == scene.object_moving


def test_cameras_json(scene: SyntheticScene, tmp_path: Path) -> None:
    scene.save(tmp_path / "out")
    content = json.loads((tmp_path / "out/cameras.json").read_text())
    assert content["format"] == "vggt_mv.synthetic_scene"
    assert content["image_size"] == {"height": 28, "width": 42}
    assert len(content["cameras"]) == 6
    for camera in content["cameras"]:
        t, n = camera["time"], camera["view"]
        assert camera["image"] == f"time_{t:02d}/view{n}.png"
        assert np.allclose(camera["camera_from_world"][:3], scene.extrinsics[t, n])
        assert np.allclose(np.array(camera["camera_from_world"]) @ camera["world_from_camera"], np.eye(4), atol=1e-9)
        assert np.allclose(camera["intrinsics"], scene.intrinsics[t, n])
    assert [thing["name"] for thing in content["objects"]] == scene.object_names
    assert set(content["files"]) == files_in(tmp_path / "out")


def test_torch_scenes_are_written_alike(scene: SyntheticScene, tmp_path: Path) -> None:
    other = synthetic_scene(2, 3, 28, 42, seed=1, antialias=1, num_tracks=16, backend="torch")
    assert isinstance(other.images, torch.Tensor)
    scene.save(tmp_path / "a")
    other.save(tmp_path / "b")
    for name in sorted(files_in(tmp_path / "a") - {"ground_truth.npz"}):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_times_beyond_a_hundred_keep_their_order(tmp_path: Path) -> None:
    scene = synthetic_scene(101, 1, 2, 2, num_tracks=0, num_moving=0, antialias=1)
    scene.save(tmp_path / "out")
    assert open_scene(tmp_path / "out").names[100] == ["time_100/view0.png"]
    assert (tmp_path / "out/time_001").is_dir()


def test_a_folder_with_something_in_it_is_refused(scene: SyntheticScene, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VggtMvError, match=r"output folder '.*' is not empty; choose another one, or .*overwrite=True"):
        scene.save(tmp_path)
    with pytest.raises(VggtMvError, match=r"is not an earlier output \(no cameras\.json of vggt-mv in it\)"):
        scene.save(tmp_path, overwrite=True)
    assert files_in(tmp_path) == {"notes.txt"}


def test_an_earlier_scene_is_replaced_when_asked(scene: SyntheticScene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthetic_scene(3, 1, 14, 14, num_tracks=0, antialias=1).save(out)
    with pytest.raises(VggtMvError, match="is not empty"):
        scene.save(out)
    assert open_scene(out).num_times == 3
    scene.save(out, overwrite=True)
    assert open_scene(out).num_times == 2
    assert not (out / "time_02").exists()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(VggtMvError, match=r"holds 'mine\.txt', which vggt-mv did not write"):
        scene.save(out, overwrite=True)


def test_an_error_halfway_leaves_nothing(scene: SyntheticScene, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.save(tmp_path / "deep/out", on_frame=stop)
    assert list(tmp_path.iterdir()) == []
