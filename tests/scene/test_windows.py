"""Windows of long recordings: plans, alignment and blending against a plain run, memory, stopping and going on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vggt_mv.errors import VggtMvError
from vggt_mv.models.configs import build_model
from vggt_mv.scene.export.stored import load_predictions
from vggt_mv.scene.reconstruct import reconstruct
from vggt_mv.scene.similarity import Similarity
from vggt_mv.scene.windows import plan_windows, reconstruct_to_folder, transformed

SMALL: dict[str, Any] = {
    "img_size": 56,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mask_layer": 0,
    "patch_embed": "conv",
    "camera_head_options": {"trunk_depth": 1, "num_heads": 2},
    "dpt_head_options": {"features": 8, "out_channels": [8, 8, 8, 8], "intermediate_layer_idx": [0, 0, 1, 1]},
    "enable_track": False,
    "enable_sparse_global": True,
}
ARRAYS = ("extrinsics", "intrinsics", "depth", "depth_conf", "world_points", "world_points_conf", "dynamic_mask")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def awake(model: nn.Module) -> nn.Module:
    """Make the model show what it is given: untrained, its blocks are near the identity, its fields of view near 0, and
    the special tokens of first frames and others alike."""
    with torch.no_grad():
        for tokens in (model.aggregator.camera_token, model.aggregator.register_token):
            tokens.normal_()
        for name, parameter in model.aggregator.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(1.0)
        model.camera_head.pose_branch.fc2.bias[7:] += 0.8
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return awake(build_model(SMALL))


def recording(times: int, views: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (times, views, 3, 6, 8), dtype=np.uint8).repeat(7, -1).repeat(7, -2)


def save_images(folder: Path, images: np.ndarray) -> Path:
    for t, views in enumerate(images):
        (folder / f"time_{t:03}").mkdir(parents=True)
        for n, image in enumerate(views):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"time_{t:03}" / f"view{n}.png")
    return folder


@pytest.mark.parametrize(
    ("num_times", "window", "stride", "expected"),
    [
        (2, 2, 1, [(0, 2)]),
        (3, 2, 1, [(0, 2), (1, 3)]),
        (5, 5, 1, [(0, 5)]),
        (5, 9, 8, [(0, 5)]),
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (11, 4, 3, [(0, 4), (3, 7), (6, 10), (7, 11)]),
        (9, 4, None, [(0, 4), (2, 6), (4, 8), (5, 9)]),
    ],
)
def test_plans(num_times: int, window: int, stride: int | None, expected: list[tuple[int, int]]) -> None:
    assert [(times.start, times.stop) for times in plan_windows(num_times, window, stride)] == expected


@pytest.mark.parametrize("num_times", [2, 7, 40])
def test_plans_cover_all_and_overlap(num_times: int) -> None:
    for window in range(2, 9):
        for stride in range(1, window):
            plan = plan_windows(num_times, window, stride)
            assert sorted({t for times in plan for t in times}) == list(range(num_times))
            assert all(len(times) == min(window, num_times) for times in plan)
            for before, after in itertools.pairwise(plan):
                assert before.start < after.start <= before.start + stride < before.stop


@pytest.mark.parametrize(
    ("num_times", "window", "stride", "message"),
    [
        (9, 1, None, r"window \(--window\) must be a whole number of times of at least 2, got 1"),
        (9, 4.0, None, "must be a whole number .* got 4.0"),
        (9, 4, 0, r"stride \(--stride\) must be a whole number from 1 up to 3, below window = 4.*; got 0"),
        (9, 4, 4, "stride .* from 1 up to 3.* got 4"),
        (1, 4, 2, "is for recordings of several times, and this scene has 1; leave it out"),
    ],
)
def test_bad_plans(num_times: int, window: Any, stride: Any, message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        plan_windows(num_times, window, stride)


@pytest.mark.parametrize("window", [4, 9])
@pytest.mark.parametrize("attention", ["alternating", "joint"])
def test_a_window_of_everything_is_a_plain_run(model: nn.Module, window: int, attention: Any) -> None:
    images = recording(4)
    plain = reconstruct(images, model, attention=attention)
    windows = reconstruct(images, model, attention=attention, window=window, stride=2, carry_memory=False)
    for name in ("images", *ARRAYS):
        one, other = getattr(plain, name), getattr(windows, name)
        assert (one is None) == (other is None) == (name == "dynamic_mask" and attention == "alternating")
        if one is not None:
            np.testing.assert_array_equal(one, other)
    assert windows.report["windows"]["count"] == 1


def test_a_still_recording_aligns_to_identity(model: nn.Module) -> None:
    """Frames that are all alike: windows agree but for their first frames, whose tokens are special, and those are
    outliers."""
    images = recording(1).repeat(12, 0)
    result = reconstruct(images, model, window=6, stride=2, carry_memory=False)
    records = result.report["windows"]["windows"]
    assert len(records) == 4
    for record in records[1:]:
        found = Similarity.from_dict(record["to_first"])
        # Float32 points; the frames of a window differ by rounding.
        assert abs(found.scale - 1) < 1e-5
        np.testing.assert_allclose(found.rotation, np.eye(3), atol=1e-5)
        np.testing.assert_allclose(found.translation, 0, atol=1e-5 * record["alignment"]["extent"] + 1e-6)
        assert record["alignment"]["median_residual"] < 1e-5 * record["alignment"]["extent"]
    np.testing.assert_allclose(result.depth[11], result.depth[1], rtol=1e-5)
    # The first frame of a window is another: without outliers this test would say little.
    assert np.abs(result.depth[0] / result.depth[1] - 1).max() > 3e-4


class Elsewhere(nn.Module):
    """A model that sees one true scene, each window in a world, at a scale, of its own."""

    def __init__(self, truth: dict[str, np.ndarray], worlds: list[Similarity]) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.camera_head = self.depth_head = self.point_head = nn.Identity()
        self.img_size = 56
        self.truth, self.worlds, self.calls = truth, worlds, 0

    def forward(self, frames: torch.Tensor, points: Any, on_stage: Any) -> dict[str, torch.Tensor]:
        # The time of a frame is the brightness of its first pixel.
        times = (frames[0, :, 0, 0, 0] * 255).round().long().numpy()
        part = transformed({name: array[times] for name, array in self.truth.items()}, self.worlds[self.calls])
        self.calls += 1
        tensors = {name: torch.from_numpy(array)[None] for name, array in part.items()}
        return {
            "pose_enc": pose_encoding(tensors["extrinsics"], tensors["intrinsics"]),
            "depth": tensors["depth"][..., None],
            "depth_conf": tensors["depth_conf"],
            "world_points": tensors["world_points"],
            "world_points_conf": tensors["depth_conf"],
        }


def pose_encoding(extrinsics: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    from vggt_mv.utils.pose_enc import extri_intri_to_pose_encoding

    return extri_intri_to_pose_encoding(extrinsics.float(), intrinsics.float(), (42, 56))


def test_windows_in_worlds_of_their_own_come_together() -> None:
    """Against the truth: a camera that walks and turns, three windows with known similarities between them."""
    rng = np.random.default_rng(0)
    count = 10
    depth = rng.uniform(2, 4, (count, 42, 56)).astype(np.float32)
    K = np.array([[50, 0, 28], [0, 50, 21], [0, 0, 1]], dtype=np.float32)
    cameras = np.zeros((count, 3, 4), dtype=np.float32)
    for t in range(count):
        angle = 0.05 * t
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        cameras[t] = np.c_[turn, [0.1 * t, 0, 0]]
    from vggt_mv.utils.geometry import unproject_depth_map_to_point_map

    intrinsics = np.broadcast_to(K, (count, 3, 3)).copy()
    world = unproject_depth_map_to_point_map(depth, cameras, intrinsics).astype(np.float32)
    truth = {
        "depth": depth,
        "depth_conf": rng.uniform(1, 3, depth.shape).astype(np.float32),
        "extrinsics": cameras,
        "intrinsics": intrinsics,
        "world_points": world,
    }
    worlds = [Similarity.identity()]
    for scale in (2.0, 0.3):
        q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        worlds.append(Similarity(scale, q * np.sign(np.linalg.det(q)), rng.normal(size=3)))
    images = np.zeros((count, 1, 3, 42, 56), dtype=np.uint8)
    images[:] = np.arange(count, dtype=np.uint8)[:, None, None, None, None]
    from vggt_mv.scene.sources import Scene

    scene = Scene.from_tensor(images[:, 0], layout="times")
    result = reconstruct(scene, Elsewhere(truth, worlds), window=4, stride=3)
    np.testing.assert_allclose(result.depth[:, 0], depth, rtol=1e-5)
    np.testing.assert_allclose(result.extrinsics[:, 0], cameras, atol=1e-5)
    np.testing.assert_allclose(result.world_points[:, 0], world, atol=1e-4)
    records = result.report["windows"]["windows"]
    for record, one, other in zip(records[1:], worlds[1:], worlds[:-1], strict=True):
        np.testing.assert_allclose(record["to_previous"]["scale"], other.scale / one.scale, rtol=1e-5)
        assert record["alignment"]["inlier_share"] > 0.95  # rounding has tails


def test_memory_is_carried_or_not(model: nn.Module) -> None:
    images = recording(6)
    carried = reconstruct(images, model, window=4, stride=2)
    alone = reconstruct(images, model, window=4, stride=2, carry_memory=False)
    assert carried.report["windows"]["memory"] == "carried from window to window"
    assert alone.report["windows"]["memory"] == "each window starts anew"
    # The first window has nothing to go on from; the last one does.
    np.testing.assert_array_equal(carried.depth[:2], alone.depth[:2])
    assert np.abs(carried.depth[5] / alone.depth[5] - 1).max() > 1e-4
    # The same by hand: the second window, from where the first one left the memory.
    as_seen = torch.from_numpy(images)[None].float() / 255
    with torch.inference_mode():
        state = model(as_seen[:, :4])["memory_state"]
        second = model(as_seen[:, 2:], memory_state=state)
    scale = carried.report["windows"]["windows"][1]["to_first"]["scale"]
    np.testing.assert_allclose(carried.depth[5], scale * second["depth"][0, 3, ..., 0].numpy(), rtol=1e-5)


def test_masks_go_with_their_window(model: nn.Module) -> None:
    images, mask = recording(5), np.random.default_rng(1).uniform(0, 1, (5, 2, 42, 56)).astype(np.float32)
    result = reconstruct(images, model, window=3, stride=1, dynamic_mask=mask)
    np.testing.assert_allclose(result.given_mask, mask, atol=1e-6)
    plain = reconstruct(images, model, window=3, stride=1)
    assert np.abs(result.depth / plain.depth - 1).max() > 1e-5
    with pytest.raises(VggtMvError, match="dynamic_mask must have 5 times, as the images, got 4"):
        reconstruct(images, model, window=3, dynamic_mask=mask[:4])


def test_bad_options(model: nn.Module) -> None:
    images = recording(5)
    with pytest.raises(VggtMvError, match=r"stride=2 \(--stride\) needs a window"):
        reconstruct(images, model, stride=2)
    with pytest.raises(VggtMvError, match="query_points start at time 0, which the first window alone sees"):
        reconstruct(images, model, window=3, query_points=[[1, 1]])
    cameras_only = build_model({**SMALL, "enable_depth": False, "enable_point": False})
    with pytest.raises(VggtMvError, match="needs a model that predicts depth and cameras, or world points"):
        reconstruct(images, cameras_only, window=3)


def test_windows_that_cannot_be_aligned_say_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any, **__: Any) -> Any:
        raise VggtMvError("similarity_transform: source_points must determine a rotation, and they lie on one line")

    monkeypatch.setattr("vggt_mv.scene.windows.similarity_transform", nowhere)
    message = r"times 1 to 3 cannot be aligned .* 2 times that they share \(.* on one line\); .*smaller stride"
    with pytest.raises(VggtMvError, match=message):
        reconstruct(recording(5), model, window=3, stride=1)


def test_a_folder_holds_what_memory_held(model: nn.Module, tmp_path: Path) -> None:
    """All numbers of windows in memory, and all files of a plain run."""
    images = save_images(tmp_path / "images", recording(7))
    steps: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"image_size": 56, "window": 4, "stride": 2}
    in_memory = reconstruct(images, model, **options)
    stored = reconstruct_to_folder(
        images, model, tmp_path / "out", conf_percentile=30, progress=lambda *step: steps.append(step), **options
    )
    arrays = stored.arrays()
    for name in ("images", *ARRAYS, "intrinsics_original"):
        value = getattr(in_memory, name)
        assert (value is None) == (name not in arrays)
        if value is not None:
            np.testing.assert_array_equal(arrays[name], value)
            assert isinstance(arrays[name], np.memmap)
    in_memory.save(tmp_path / "plain", conf_percentile=30)
    for path in sorted((tmp_path / "plain").rglob("*")):
        name = path.relative_to(tmp_path / "plain").as_posix()
        if path.suffix == ".png":
            # Percentiles are the same but for the last bit, which here and there changes a colour by one step.
            one, other = (np.asarray(Image.open(picture)).astype(int) for picture in (path, tmp_path / "out" / name))
            assert one.shape == other.shape and np.abs(one - other).max() <= 8, name
            assert (one != other).mean() < 0.01, name
        elif path.is_file() and name not in ("report.json", "predictions.npz"):
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes(), name
    plain, report = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "out"))
    assert set(report) == set(plain)
    assert report["points"] == pytest.approx(plain["points"])
    assert report["not_written"] == plain["not_written"]
    del plain["arrays"]["__doc__"]
    assert report["arrays"] == plain["arrays"]
    assert sorted(report["files"]) == sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    read = load_predictions(tmp_path / "plain")
    assert set(read) - {"__doc__"} == set(arrays)
    np.testing.assert_array_equal(read["names"], arrays["names"])
    assert [step for step in steps if step[0] == "windows"] == [("windows", k, 3) for k in (1, 2, 3)]
    assert [step[1:] for step in steps if step[0] == "write"][-1][0] == steps[-1][2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "plain"]


class Stop(Exception):
    pass


def stop_after(windows: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "windows" and done == windows:
            raise Stop

    return progress


def test_a_stopped_run_goes_on(model: nn.Module, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", recording(9))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    options: dict[str, Any] = {"image_size": 56, "window": 4, "stride": 2}
    with pytest.raises(Stop):
        reconstruct_to_folder(images, model, out, progress=stop_after(2), **options)
    assert partial.exists() and not out.exists()
    message = r"an unfinished run for output folder .* had another windows; .* or discard it with --overwrite"
    with pytest.raises(VggtMvError, match=message):
        reconstruct_to_folder(images, model, out, **{**options, "stride": 1})
    with pytest.raises(VggtMvError, match="had another memory carry;"):
        reconstruct_to_folder(images, model, out, carry_memory=False, **options)
    seen: list[str] = []
    result = reconstruct_to_folder(images, model, out, progress=lambda stage, *_: seen.append(stage), **options)
    assert seen.count("windows") == 2 and result.report["windows"]["resumed_after"] == 2
    assert not partial.exists()
    with pytest.raises(Stop):
        reconstruct_to_folder(images, model, tmp_path / "other", progress=stop_after(2), **options)
    discarded = reconstruct_to_folder(images, model, tmp_path / "other", overwrite=True, carry_memory=False, **options)
    assert discarded.report["windows"]["resumed_after"] is None


def test_before_the_first_window_nothing_stays(model: nn.Module, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "attention":
            raise Stop

    with pytest.raises(Stop):
        reconstruct_to_folder(recording(5), model, tmp_path / "new" / "out", window=3, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_and_images_are_noticed(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"window": 4, "stride": 2}
    with pytest.raises(Stop):
        reconstruct_to_folder(recording(6), model, tmp_path / "out", progress=stop_after(1), **options)
    torch.manual_seed(1)
    with pytest.raises(VggtMvError, match="had another weights;"):
        reconstruct_to_folder(recording(6), awake(build_model(SMALL)), tmp_path / "out", **options)
    with pytest.raises(VggtMvError, match="had another input;"):
        reconstruct_to_folder(recording(6, seed=1), model, tmp_path / "out", **options)


def test_what_is_in_the_way_is_not_removed(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(VggtMvError, match="is in the way and no unfinished run of vggt-mv"):
        reconstruct_to_folder(recording(5), model, tmp_path / "out", window=3, overwrite=True)
    assert (tmp_path / ".out.partial" / "thesis.txt").read_text() == "mine"


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import numpy as np, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_windows import SMALL, awake
    from vggt_mv.models.configs import build_model
    from vggt_mv.scene.windows import reconstruct_to_folder
    from vggt_mv.scene.reconstruct import reconstruct

    torch.manual_seed(0)
    model = awake(build_model(SMALL))
    """
)


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    import vggt_mv
    import vggt_mv_ext

    folders = [str(Path(str(package.__file__)).parents[1]) for package in (vggt_mv, vggt_mv_ext)]
    # glibc keeps freed blocks for later, more of them the longer a process runs, unless they are large: all are, then.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **malloc, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(tests=str(Path(__file__).parent)) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", recording(8))
    call = f"reconstruct_to_folder({str(images)!r}, model, {{!r}}, image_size=56, window=4, stride=2"
    once, killed = str(tmp_path / "once"), str(tmp_path / "killed")
    # In the middle of the second window: the first is whole.
    dead = run_script(
        f"""
        windows = 0
        def kill(stage, done, total):
            global windows
            windows += stage == "windows"
            if windows and stage == "attention":
                os.kill(os.getpid(), signal.SIGKILL)
        {call.format(killed)}, progress=kill)
        """
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert (tmp_path / ".killed.partial").exists() and not (tmp_path / "killed").exists()
    whole = run_script(f"{call.format(once)})\n{call.format(killed)})")
    assert whole.returncode == 0, whole.stderr
    files = sorted(path.relative_to(once).as_posix() for path in Path(once).rglob("*") if path.is_file())
    assert "predictions/depth.npy" in files and "points.ply" in files
    for name in files:
        if name != "report.json":
            assert (Path(once) / name).read_bytes() == (Path(killed) / name).read_bytes(), name
    reports = [json.loads((Path(folder) / "report.json").read_text())["windows"] for folder in (once, killed)]
    assert [report.pop("resumed_after") for report in reports] == [None, 1]
    assert reports[0] == reports[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak that Linux reports")
def test_memory_does_not_depend_on_the_length(tmp_path: Path) -> None:
    """Peak of 12 and of 48 times, on disk and, for comparison, in memory, each in a process of its own.

    A time of 224 x 168 pixels has 1 MB of arrays: 36 more of them weigh 36 MB in memory, and more while points are
    made.
    """
    images = recording(48, 1).repeat(4, -1).repeat(4, -2)
    folders = {count: save_images(tmp_path / f"images{count}", images[:count]) for count in (12, 48)}

    def peak(count: int, call: str) -> float:
        result = run_script(
            f"""
            options = dict(image_size=224, window=4, stride=2)
            {call.format(repr(str(folders[count])))}
            # Not ru_maxrss, which begins with the peak of the process that started this one.
            print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
            """
        )
        assert result.returncode == 0, result.stderr
        return float(result.stdout)

    on_disk = {
        count: peak(count, f"reconstruct_to_folder({{}}, model, {str(tmp_path / f'out{count}')!r}, **options)")
        for count in (12, 48)
    }
    in_memory = {
        count: peak(count, f"reconstruct({{}}, model, **options).save({str(tmp_path / f'plain{count}')!r})")
        for count in (12, 48)
    }
    print("peak MiB: on disk", on_disk, "in memory", in_memory)
    # Seen: 0.5 and 73.
    assert on_disk[48] - on_disk[12] < 5
    assert in_memory[48] - in_memory[12] > 36
