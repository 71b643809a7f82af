"""vggt-mv reconstruct: what it writes, what it says, and every kind of bad input through the real entry point."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.models.configs import build_model

Run = Callable[..., Any]  # see conftest.py

FILES = ["cameras.json", "depth", "overview.png", "points.ply", "predictions.npz", "report.json"]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def nothing_left(tmp_path: Path) -> None:
    """No output, and nothing half written beside it."""
    assert [path.name for path in tmp_path.iterdir() if path.name == "out" or path.name.startswith(".")] == []


def test_random_weights(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = vggt_mv("reconstruct", images, "-o", out, "--random-weights", "--config", small, "--conf-percentile", 80)
    assert result.code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert "RANDOM WEIGHTS" in result.stderr
    assert "2 times x 2 views of 56x42 pixels" in result.stderr
    assert [line.split("  ")[0].rstrip("/") for line in result.stdout.splitlines()] == [
        str(out / name)
        for name in ("overview.png", "points.ply", "cameras.json", "depth", "predictions.npz", "report.json")
    ]
    report = report_of(out)
    assert report["weights"]["random"] is True
    assert report["weights"]["description"] == f"random weights, config {small}, seed 0"
    assert report["model"]["config"] == str(small)
    assert report["points"]["conf_percentile"] == 80
    assert report["attention"]["used"] == "alternating"
    assert set(report["seconds"]) >= {
        "images",
        "patch_embed",
        "attention",
        "camera",
        "depth",
        "points",
        "write",
        "total",
    }
    assert "time_1_view0.png" in os.listdir(out / "depth")


def test_bars_on_a_terminal(
    vggt_mv: Run, images: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["reconstruct", images, "--random-weights", "--config", small]
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = vggt_mv(*command, "-o", tmp_path / "out").stderr
    for stage in ("checking files", "loading model", "reading images", "patch embedding", "attention", "writing"):
        assert stage in shown
    assert "checking files" not in vggt_mv(*command, "-o", tmp_path / "quiet", "-q").stderr
    monkeypatch.delenv("FORCE_COLOR")
    assert "checking files" not in vggt_mv(*command, "-o", tmp_path / "log").stderr


def test_quiet_still_says_random(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    result = vggt_mv("reconstruct", images, "-o", tmp_path / "out", "--random-weights", "--config", small, "-q")
    assert (result.code, result.stdout) == (0, "")
    assert result.stderr == "RANDOM WEIGHTS: an untrained model made these numbers, they mean nothing\n"


def test_seed_and_overwrite(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    out, depths = tmp_path / "out", []
    for seed in (1, 1, 2):
        command = [
            "reconstruct",
            images,
            "-o",
            out,
            "--random-weights",
            "--config",
            small,
            "--seed",
            seed,
            "--overwrite",
        ]
        assert vggt_mv(*command).code == 0
        with np.load(out / "predictions.npz") as file:
            depths.append(file["depth"])
    np.testing.assert_array_equal(depths[0], depths[1])
    assert not np.array_equal(depths[0], depths[2])


def test_options_reach_the_run(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--attention", "joint", "--dtype", "bfloat16", "--max-frames", 1, "--image-size", 28]
    more = ["--preprocess", "pad", "--threads", 1, "--device", "cpu"]
    command = ["reconstruct", images, "-o", out, "--random-weights", "--config", small, *options, *more]
    assert vggt_mv(*command).code == 0
    report = report_of(out)
    assert report["attention"]["used"] == "joint"
    assert (report["dtype"], report["device"], report["threads"]) == ("bfloat16", "cpu", 1)
    assert report["preprocessing"] == {"mode": "pad", "network_size": [28, 28]}
    assert (report["input"]["times"], report["input"]["views"]) == (1, 2)


def test_layouts_of_a_folder(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    folder = images / "time_0"
    for layout, grid in (("views", [1, 2]), ("times", [2, 1])):
        command = [
            "reconstruct",
            folder,
            "-o",
            tmp_path / layout,
            "--random-weights",
            "--config",
            small,
            "--as",
            layout,
        ]
        assert vggt_mv(*command).code == 0
        assert report_of(tmp_path / layout)["arrays"]["depth"]["shape"][:2] == grid


def test_folders_of_cameras(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    command = ["reconstruct", images / "time_0", images / "time_1", "-o", tmp_path / "out", "--random-weights"]
    assert vggt_mv(*command, "--config", small).code == 0
    report = report_of(tmp_path / "out")
    assert (report["input"]["kind"], report["input"]["views"]) == ("folders", 2)


@pytest.fixture
def saved(tmp_path: Path, small_config: dict[str, Any]) -> Path:
    """A folder with config.json and weights of the small model."""
    torch.manual_seed(3)
    model = build_model(small_config)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_weights_bring_their_configuration(
    vggt_mv: Run,
    images: Path,
    saved: Path,
    small_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = vggt_mv("reconstruct", images, "-o", out, "--weights", saved)
    assert result.code == 0, result.stderr
    assert "checking weights" in result.stderr
    assert "loading weights" in result.stderr
    report = report_of(out)
    assert report["weights"]["random"] is False
    assert str(saved) in report["weights"]["description"]
    # By their names these are weights with a spatial mask, which learnt joint attention.
    assert report["weights"]["family"] == "page4d"
    assert report["attention"]["used"] == "joint"
    assert "RANDOM" not in result.stderr
    torch.manual_seed(3)
    model = build_model(small_config)
    with np.load(out / "predictions.npz") as file:
        images_seen = torch.from_numpy(file["images"]).permute(0, 1, 4, 2, 3)[None].float() / 255
        with torch.inference_mode():
            expected = model(images_seen, attention="joint")["depth"][0, ..., 0]
        np.testing.assert_allclose(file["depth"], expected, rtol=1e-5)


def test_weights_of_a_part_need_random_weights(
    vggt_mv: Run, images: Path, small: Path, small_config: dict[str, Any], tmp_path: Path
) -> None:
    aggregator = {k: v for k, v in build_model(small_config).state_dict().items() if k.startswith("aggregator.")}
    torch.save(aggregator, tmp_path / "part.pt")
    command = ["reconstruct", images, "-o", tmp_path / "out", "--weights", tmp_path / "part.pt", "--config", small]
    assert "of the model not in the file" in vggt_mv(*command).error
    nothing_left(tmp_path)
    result = vggt_mv(*command, "--random-weights")
    assert result.code == 0, result.stderr
    weights = report_of(tmp_path / "out")["weights"]
    assert weights["random"] is True
    assert "tensors random (seed 0), the others from" in weights["description"]


def other_model(tmp_path: Path) -> list[str]:
    torch.save({"conv1.weight": torch.zeros(3), "layer1.0.bn1.weight": torch.zeros(4)}, tmp_path / "resnet.pt")
    return ["--weights", str(tmp_path / "resnet.pt")]


def truncated_weights(tmp_path: Path) -> list[str]:
    torch.save({"aggregator.camera_token": torch.zeros(1, 2, 1, 32)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    return ["--weights", str(tmp_path / "cut.pt")]


def config(text: str) -> Callable[[Path], list[str]]:
    def write(tmp_path: Path) -> list[str]:
        (tmp_path / "config.json").write_text(text)
        return ["--random-weights", "--config", str(tmp_path / "config.json")]

    return write


BAD_OPTIONS: dict[str, tuple[list[str] | Callable[[Path], list[str]], str]] = {
    "no weights": ([], r"no weights: name a file, folder or hub id with --weights, or .* --random-weights"),
    "missing weights": (["--weights", "/nowhere/w.pt"], r"/nowhere/w.pt: no such file or folder"),
    "weights of another model": (other_model, r"resnet.pt.*\b(VGGT|known)"),
    "truncated weights": (truncated_weights, r"cut.pt"),
    "unknown config": (
        ["--random-weights", "--config", "vggt_2b"],
        r"config 'vggt_2b' is neither a file nor a known name",
    ),
    "unknown key in config": (config('{"dept": 3}'), r"unknown option 'dept'; the nearest known one is 'depth'"),
    "config is no JSON": (config("{"), r"config\.json: must be a JSON file"),
    "config is no object": (config("[]"), r"config\.json: must hold a JSON object, got list"),
    "value of another type in config": (config('{"depth": "4"}'), r"config\.json: depth must be int, got '4'"),
    "size of nothing in config": (config('{"patch_size": 0}'), r"config\.json: no model has these sizes .*; correct"),
    "bad value in config": (config('{"depth": 0}'), r"depth must be a positive multiple"),
    "dtype": (["--random-weights", "--dtype", "float8"], r"dtype must be 'auto', .* got 'float8'"),
    "float16 on cpu": (["--random-weights", "--dtype", "float16", "--device", "cpu"], r"'float16' is not supported"),
    "device": (["--random-weights", "--device", "tpu:x"], r"device 'tpu:x' is not a device"),
    "attention": (["--random-weights", "--attention", "all"], r"attention must be 'auto', 'joint' or 'alternating'"),
    "layout": (["--random-weights", "--as", "sideways"], r"layout must be 'auto', 'views' or 'times'"),
    "layout of a grid": (["--random-weights", "--as", "views"], r"--as"),
    "percentile": (["--random-weights", "--conf-percentile", "100"], r"conf_percentile must be in \[0, 100\), got 100"),
    "image size": (["--random-weights", "--image-size", "50"], r"image_size must be a multiple of 14, got 50"),
    "preprocess": (["--random-weights", "--preprocess", "squash"], r"mode must be 'crop' or 'pad', got 'squash'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(vggt_mv: Run, images: Path, tmp_path: Path, options: Any, message: str) -> None:
    arguments = options(tmp_path) if callable(options) else options
    result = vggt_mv("reconstruct", images, "-o", tmp_path / "out", *arguments)
    assert re.search(message, result.error), result.error
    nothing_left(tmp_path)


def missing(folder: Path) -> str:
    return str(folder / "nope")


def empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def unreadable(folder: Path) -> str:
    (folder / "time_1" / "view0.png").write_text("not an image")
    return str(folder)


def truncated(folder: Path) -> str:
    path = folder / "time_1" / "view0.png"
    path.write_bytes(path.read_bytes()[:-40])
    return str(folder)


def truncated_video(folder: Path) -> str:
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    return str(folder / "film.mp4")


def mixed_over_time(folder: Path) -> str:
    Image.new("RGB", (40, 60)).save(folder / "time_1" / "view0.png")
    return str(folder)


def mixed_over_views(folder: Path) -> str:
    for t in range(2):
        Image.new("RGB", (40, 60)).save(folder / f"time_{t}" / "view1.png")
    return str(folder)


def one_image(folder: Path) -> str:
    return str(folder / "time_0" / "view0.png")


def missing_view(folder: Path) -> str:
    (folder / "time_1" / "view1.png").unlink()
    return str(folder)


def no_images(folder: Path) -> str:
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("x")
    return str(folder / "text")


BAD_INPUTS: list[tuple[Callable[[Path], str], str]] = [
    (missing, r"nope' does not exist; check its spelling"),
    (empty, r"empty' is empty; name a folder of images"),
    (unreadable, r"time_1/view0\.png"),
    (truncated, r"time_1/view0\.png.*(truncated|cut short|incomplete)"),
    (truncated_video, r"film\.mp4"),
    (mixed_over_time, r"must have one size at all times.*time_1/view0\.png"),
    (mixed_over_views, r"views have different shapes.*pad"),
    (one_image, r"one image only.*--allow-single"),
    (missing_view, r"view 'view1' is missing at time 'time_1'"),
    (no_images, r"has no images, it has notes\.txt"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUTS, ids=[spoil.__name__ for spoil, _ in BAD_INPUTS])
def test_bad_inputs(
    vggt_mv: Run,
    images: Path,
    small: Path,
    tmp_path: Path,
    spoil: Callable[[Path], str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the model was built before the input was looked at")

    monkeypatch.setattr("vggt_mv.scene.load_model.load_model", never)
    source = spoil(images)
    result = vggt_mv("reconstruct", source, "-o", tmp_path / "out", "--random-weights", "--config", small)
    assert re.search(message, result.error), result.error
    nothing_left(tmp_path)


def test_allow_single(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    command = ["reconstruct", one_image(images), "-o", tmp_path / "out", "--random-weights", "--config", small]
    assert vggt_mv(*command, "--allow-single").code == 0


def test_bad_outputs(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    def error(out: object, *options: str) -> str:
        return vggt_mv("reconstruct", images, "-o", out, "--random-weights", "--config", small, *options).error

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert "thesis' is not empty; choose another one, or replace it with --overwrite" in error(tmp_path / "thesis")
    assert "is not an earlier output" in error(tmp_path / "thesis", "--overwrite")
    assert "is a file; name a folder" in error(small)
    assert "images' lies inside of the output folder" in error(tmp_path, "--overwrite")
    if os.path.isdir("/proc/self"):
        assert "output folder '/proc/out' cannot be written" in error("/proc/out")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    assert (images / "time_0" / "view0.png").exists()
    nothing_left(tmp_path)


def test_earlier_output_survives_a_failed_run(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    command = ["reconstruct", images, "-o", tmp_path / "out", "--random-weights", "--config", small, "--overwrite"]
    assert vggt_mv(*command).code == 0
    before = (tmp_path / "out" / "report.json").read_text()
    truncated(images)
    assert "time_1/view0.png" in vggt_mv(*command).error
    assert (tmp_path / "out" / "report.json").read_text() == before


def test_disk_full(vggt_mv: Run, images: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    result = vggt_mv("reconstruct", images, "-o", tmp_path / "out", "--random-weights", "--config", small, "-q")
    assert "predictions.npz cannot be written (No space left on device); is the disk full?" in result.error
    nothing_left(tmp_path)


def test_the_unforeseen_keeps_its_traceback(
    vggt_mv: Run, images: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("vggt_mv.scene.running._collect", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        vggt_mv("reconstruct", images, "-o", tmp_path / "out", "--random-weights", "--config", small)
    nothing_left(tmp_path)


def test_warnings_are_one_line(vggt_mv: Run, images: Path, saved: Path, tmp_path: Path) -> None:
    command = ["reconstruct", images, "-o", tmp_path / "out", "--weights", saved, "--attention", "alternating", "-q"]
    result = vggt_mv(*command)
    assert result.code == 0
    line = "attention='alternating' was asked for, but page4d weights learnt joint attention: expect poor results"
    assert result.stderr == f"vggt-mv: warning: {line}\n"
    assert report_of(tmp_path / "out")["warnings"] == [line]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "terminate"])
def test_interrupted_runs_leave_nothing(
    images: Path, environment: dict[str, str], tmp_path: Path, number: int, code: int
) -> None:
    # The full-size model, so that it is still being built when the signal comes.
    command = [sys.executable, "-m", "vggt_mv.cli", "reconstruct", str(images), "-o", str(tmp_path / "out"), "-q"]
    process = subprocess.Popen(
        [*command, "--random-weights"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not any(path.name.endswith(".partial") for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    nothing_left(tmp_path)


def write_masks(images: Path, folder: Path) -> Path:
    for path in images.rglob("*.png"):
        mask = folder / path.relative_to(images)
        mask.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((60, 80), dtype=np.uint8)
        pixels[20:40, 20:60] = 255
        Image.fromarray(pixels).save(mask)
    return folder


@pytest.mark.parametrize("strategy", ["memory_bank", "landmark", "block_dilated"])
def test_dual_stream_sparse_global_and_masks(
    vggt_mv: Run, images: Path, small: Path, tmp_path: Path, strategy: str
) -> None:
    out, masks = tmp_path / "out", write_masks(images, tmp_path / "masks")
    command = ["reconstruct", images, "-o", out, "--random-weights", "--config", small]
    result = vggt_mv(*command, "--dual-stream", "--sparse-global", strategy, "--mask-dir", masks)
    assert result.code == 0, result.stderr
    assert f"{out / 'dynamic_mask'}/" in result.stdout
    assert sorted(path.name for path in (out / "dynamic_mask").iterdir()) == sorted(os.listdir(out / "depth"))
    report = report_of(out)
    assert report["model"]["dual_stream"] is True
    assert report["model"]["sparse_global"] == {"strategy": strategy, "layers": [0, 1]}
    assert report["dynamic_mask"] == {"given": str(masks), "predicted": True}
    assert f"config {small} with enable_dual_stream=True" in report["weights"]["description"]
    arrays = np.load(out / "predictions.npz")
    assert arrays["dynamic_mask"].shape == (2, 2, 3, 4)
    assert arrays["given_mask"].shape == (2, 2, 42, 56)
    picture = np.asarray(Image.open(out / "dynamic_mask" / "time_0_view0.png"))
    assert (picture == (0, 220, 255)).all(axis=-1).any()


def test_bad_dual_stream_options(vggt_mv: Run, images: Path, small: Path, tmp_path: Path) -> None:
    command = ["reconstruct", images, "-o", tmp_path / "out", "--random-weights", "--config", small]
    error = vggt_mv(*command, "--sparse-global", "dense").error
    assert "sparse-global must be one of memory_bank, landmark, block_dilated, got 'dense'" in error
    assert "mask folder" in vggt_mv(*command, "--mask-dir", tmp_path / "nowhere").error
    masks = write_masks(images, tmp_path / "masks")
    (masks / "time_1" / "view0.png").unlink()
    assert (
        "lacks 1 of 4 masks, the first that of image 'time_1/view0.png'" in vggt_mv(*command, "--mask-dir", masks).error
    )
    nothing_left(tmp_path)
