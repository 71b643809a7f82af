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


def test_results_are_on_disk_around_every_step(gpu_check: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen: list[str] = []

    def look() -> str:
        *before, own = json.loads(path.read_text())["steps"]
        assert [step["status"] for step in before] == ["ok"] * len(seen)
        seen.append(own["status"])
        return "done"

    steps = [gpu_check.Step(name, look, 0.0) for name in ("first", "second", "third")]
    report = gpu_check.run_steps(steps, path, 60.0, {"commit": "c0ffee"})
    assert seen == ["running", "running", "running"]
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


def test_a_command_that_hangs_is_ended(gpu_check: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="was still running after 2 s:\nhalf way"):
        gpu_check._command([sys.executable, "-c", "import time; print('half way', flush=True); time.sleep(60)"], 2.0)


def test_a_kernel_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """The process itself cannot go on: the file says in which step it was."""
    path = tmp_path / "results.json"
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check
steps = [gpu_check.Step("fine", dict, 0.0), gpu_check.Step("stuck", lambda: time.sleep(60), 0.0)]
gpu_check.run_steps_within(steps, Path({str(path)!r}), 1.0, {{}}, grace_s=0.5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert [step["status"] for step in json.loads(path.read_text())["steps"]] == ["ok", "running"]


def test_the_sanitizer_runs_tests_that_exist(gpu_check: ModuleType) -> None:
    for name in gpu_check.SANITIZED:
        path, function = name.split("::")
        assert f"def {function}(" in (SCRIPT.parents[1] / path).read_text(), name


def test_what_each_frame_more_costs(gpu_check: ModuleType) -> None:
    rows = [{"frames": 10, "aggregator": {"peak_gib": 3.0}}, {"frames": 20, "aggregator": {"peak_gib": 4.0}}]
    assert gpu_check.extra_frame_mb(rows) == 107.4
    assert gpu_check.extra_frame_mb(rows[:1]) is None


def test_a_nan_never_passes(gpu_check: ModuleType) -> None:
    relative_error = sys.modules["gpu_measure"].relative_error
    reference = torch.ones(4)
    assert not relative_error(torch.tensor([1.0, 1.0, float("nan"), 1.0]), reference) < 1e9
    assert relative_error(reference, reference) == 0.0


def test_a_wrong_result_is_not_measured(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import vggt_mv_ext

    streams = vggt_mv_ext.dual_stream_attention
    monkeypatch.setattr(vggt_mv_ext, "dual_stream_attention", lambda *given: streams(*given)[::-1])
    with pytest.raises(RuntimeError, match="dual_stream_attention, L = 70: error .* against fp64"):
        gpu_check.step_dual_stream_attention((70,), device="cpu")
    monkeypatch.setattr(sys.modules["gpu_operators"], "TOKENS", 80)
    monkeypatch.setattr(
        vggt_mv_ext, "landmark_attention", lambda qkv, _: vggt_mv_ext.alternating_attention(qkv, "view")
    )
    with pytest.raises(RuntimeError, match="landmark, 2 frames: error .* against fp64"):
        gpu_check.step_gathered_attention((2,), device="cpu")


def test_the_measurements_themselves_run(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code that measures on a GPU, on the CPU and at a small size: that it is right Python and what it reports."""
    operators = sys.modules["gpu_operators"]
    monkeypatch.setattr(operators, "TOKENS", 37 * 37)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes longer than all of this
    measure = gpu_check.measure
    quick = {"warmup": 0, "repeats": 1}
    for module in (gpu_check, operators):
        monkeypatch.setattr(module, "measure", lambda function, **options: measure(function, **{**options, **quick}))
    rows = gpu_check.step_model("auto", (1, 2), 28, 28, config="vggt_mv_demo", device="cpu")
    assert [row["frames"] for row in rows] == [1, 2]
    assert all(row["aggregator"]["median_ms"] > 0 and row["model"]["median_ms"] > 0 for row in rows)
    steps = {"eager_1b": rows, "auto_1b": rows}
    rows = gpu_check.step_residual_scale_norm((1,), device="cpu")
    assert {row["dtypes"] for row in rows} == {"float32/bfloat16", "bfloat16/bfloat16", "float32/float32"}
    assert all(row["gb_per_s"] > 0 and max(row["errors"]) < 1e-2 and row["copy_over_ours"] > 0 for row in rows)
    steps |= {"residual_scale_norm": rows, "qk_norm_rope": gpu_check.step_qk_norm_rope((1,), device="cpu")}
    steps["alternating_attention"] = gpu_check.step_alternating_attention((70,), device="cpu")
    assert [row["bias"] for row in steps["alternating_attention"]] == [False, True]
    assert all(row["tflop_per_s"]["ours"] > 0 for row in steps["alternating_attention"])
    assert steps["alternating_attention"][1]["over_no_bias"] > 0
    assert all(row["copy_inplace"]["median_ms"] > 0 for row in steps["qk_norm_rope"])
    steps["dual_stream_attention"] = gpu_check.step_dual_stream_attention((70,), device="cpu")
    assert all(row["own_over_one"] > 0 and row["shared_over_one"] > 0 for row in steps["dual_stream_attention"])
    steps["gathered_attention"] = gpu_check.step_gathered_attention((2,), device="cpu")
    (row,) = steps["gathered_attention"]
    assert set(row["errors"]) == {"memory_write", "memory_read", "landmark", "block_dilated"}
    assert all(row["tflop_per_s"][name] > 0 and row[name]["median_ms"] > 0 for name in row["errors"])
    entries = [{"name": name, "status": "ok", "seconds": 1.0, "result": rows} for name, rows in steps.items()]
    gpu_check.print_table({"ok": True, "steps": entries})
    table = capsys.readouterr().out
    expected = ("residual_scale_norm", "qk_norm_rope", "attention L     70 bias TFLOP/s", "eager / ours 1.00")
    expected += ("dual stream L     70: own qkv", "sparse    2 frames: memory_write", "block_dilated")
    assert all(text in table for text in expected), table
