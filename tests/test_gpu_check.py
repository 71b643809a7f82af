"""The runner of `make gpu-check`: what it promises about failures, time and files holds without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is when the script runs
    try:
        return importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_fails_and_does_not_skip_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device found" in done.stderr


def test_results_are_on_disk_after_every_step(gpu_check: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen: list[int] = []

    def look() -> str:
        seen.append(len(json.loads(path.read_text())["steps"]) if path.exists() else 0)
        return "done"

    steps = [gpu_check.Step(name, look, 0.0) for name in ("first", "second", "third")]
    report = gpu_check.run_steps(steps, path, 60.0, {"commit": "c0ffee"})
    assert seen == [0, 1, 2]
    assert report["ok"] is True
    assert json.loads(path.read_text()) == report
    assert report["commit"] == "c0ffee"


def test_a_failed_step_is_recorded_and_the_next_one_runs(gpu_check: ModuleType, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the kernel is wrong")

    path = tmp_path / "results.json"
    report = gpu_check.run_steps([gpu_check.Step("bad", fail, 0.0), gpu_check.Step("good", dict, 0.0)], path, 60.0, {})
    assert report["ok"] is False
    assert [step["status"] for step in report["steps"]] == ["failed", "ok"]
    assert "RuntimeError: the kernel is wrong" in report["steps"][0]["error"]


def test_a_step_without_time_left_is_not_run_and_not_ok(gpu_check: ModuleType, tmp_path: Path) -> None:
    ran: list[int] = []
    report = gpu_check.run_steps([gpu_check.Step("long", lambda: ran.append(1), 100.0)], tmp_path / "r.json", 50.0, {})
    assert not ran
    assert report["ok"] is False
    assert report["steps"][0]["status"] == "not run"
    assert "needs about 100 s" in report["steps"][0]["error"]


def test_a_nan_never_passes(gpu_check: ModuleType) -> None:
    relative_error = sys.modules["gpu_measure"].relative_error
    reference = torch.ones(4)
    assert not relative_error(torch.tensor([1.0, 1.0, float("nan"), 1.0]), reference) < 1e9
    assert relative_error(reference, reference) == 0.0


def test_the_measurements_themselves_run(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code that measures on a GPU, on the CPU and at a small size: that it is right Python and what it reports."""
    operators = sys.modules["gpu_operators"]
    monkeypatch.setattr(operators, "TOKENS", 37 * 37)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # compiling takes longer than all of this
    measure = gpu_check.measure
    quick = {"warmup": 0, "repeats": 1}
    for module in (gpu_check, operators):
        monkeypatch.setattr(module, "measure", lambda function, **options: measure(function, **{**options, **quick}))
    rows = gpu_check.step_model("auto", (1, 2), 28, 28, config="vggt_mv_demo", device="cpu")
    assert [row["frames"] for row in rows] == [1, 2]
    assert all(row["aggregator"]["median_ms"] > 0 and row["model"]["median_ms"] > 0 for row in rows)
    rows = gpu_check.step_residual_scale_norm((1,), device="cpu")
    assert {row["dtypes"] for row in rows} == {"float32/bfloat16", "bfloat16/bfloat16", "float32/float32"}
    assert all(row["gb_per_s"] > 0 and max(row["errors"]) < 1e-2 for row in rows)
    steps = {"residual_scale_norm": rows, "qk_norm_rope": gpu_check.step_qk_norm_rope((1,), device="cpu")}
    steps["alternating_attention"] = gpu_check.step_alternating_attention((70,), device="cpu")
    assert [row["bias"] for row in steps["alternating_attention"]] == [False, True]
    assert all(row["tflop_per_s"]["ours"] > 0 for row in steps["alternating_attention"])
    entries = [{"name": name, "status": "ok", "seconds": 1.0, "result": rows} for name, rows in steps.items()]
    gpu_check.print_table({"ok": True, "steps": entries})
    table = capsys.readouterr().out
    assert all(name in table for name in ("residual_scale_norm", "qk_norm_rope", "attention L     70 bias TFLOP/s"))
