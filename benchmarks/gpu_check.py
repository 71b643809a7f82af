"""One command for a machine with a GPU: build, test, measure, write everything down.

    python3 benchmarks/gpu_check.py            (or: make gpu-check)

Works from a bare checkout with torch, nvcc, cmake, ninja, numpy and pytest; nothing is downloaded and nothing is
installed: the extension is built in place. The steps run most wanted first, the results file is rewritten before and
after every step (a run that is cut off keeps what it had, and says in which step), a step that no longer fits into
``--time-limit`` is recorded as not run, and a kernel that hangs ends the command there.
Without a CUDA device the command fails: it never skips.

The file it writes, ``benchmarks/results/gpu-<device>.json``:

    {"started", "finished", "commit", "ok",
     "steps": [{"name", "status": "running" | "ok" | "failed" | "not run", "seconds", "result" | "error"}]}
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_measure import PeakMemory, measure, measure_graph
from gpu_operators import (
    step_alternating_attention,
    step_dual_stream_attention,
    step_gathered_attention,
    step_qk_norm_rope,
    step_residual_scale_norm,
)

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "gpu-check: no CUDA device found (torch.cuda.is_available() is False); this command needs one"


# ---------------------------------------------------------------------------------------------------------------------
# The runner: knows no GPU, so that it is tested everywhere.


@dataclass(frozen=True)
class Step:
    """One piece of work. `run` returns what goes into the file; `estimate_s` says when it no longer fits."""

    name: str
    run: Callable[[], Any]
    estimate_s: float


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` always holds a whole file: temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def run_steps(steps: Sequence[Step], path: Path, time_limit_s: float, header: dict[str, Any]) -> dict[str, Any]:
    """Run `steps` in order, write `path` around each, go on after a failure; `ok` only if all ran and succeeded."""
    start = time.monotonic()
    report: dict[str, Any] = {"started": _now(), **header, "ok": False, "steps": []}
    for step in steps:
        left = time_limit_s - (time.monotonic() - start)
        entry: dict[str, Any] = {"name": step.name, "status": "running"}
        report["steps"].append(entry)
        write_json(path, report)
        if left < step.estimate_s:
            entry.update(status="not run", error=f"{left:.0f} s left, the step needs about {step.estimate_s:.0f} s")
        else:
            _run_one(step, entry)
        print(f"[{time.monotonic() - start:6.1f} s] {step.name}: {entry['status']}", flush=True)
        if "error" in entry:
            print("    " + entry["error"].strip().replace("\n", "\n    "), flush=True)
        write_json(path, report)
    report["finished"] = _now()
    report["ok"] = all(entry["status"] == "ok" for entry in report["steps"])
    write_json(path, report)
    return report


def run_steps_within(
    steps: Sequence[Step], path: Path, time_limit_s: float, header: dict[str, Any], *, grace_s: float = 10.0
) -> dict[str, Any]:
    """`run_steps`, and at the time limit the end of the process, wherever it is.

    A kernel that hangs holds the process inside a CUDA call, which no exception reaches.
    """
    faulthandler.dump_traceback_later(time_limit_s, exit=True)
    try:
        return run_steps(steps, path, time_limit_s - grace_s, header)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run_one(step: Step, entry: dict[str, Any]) -> None:
    began = time.monotonic()
    try:
        entry.update(status="ok", result=step.run())
    except Exception as error:  # a failed step must not cost the steps after it
        entry.update(status="failed", error=f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}")
    entry["seconds"] = round(time.monotonic() - began, 2)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _command(arguments: Sequence[str], timeout_s: float = 120.0, **environment: str) -> str:
    """Run a command in the repository root; its output, or an error that carries the end of it."""
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        command = " ".join(arguments)
        raise RuntimeError(f"{command} was still running after {timeout_s:.0f} s:\n{output[-3000:]}") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def commit() -> str:
    """The checked-out commit, with a mark if the tree differs from it; 'unknown' outside a git checkout."""
    try:
        name = _command(["git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD"]).strip()
        dirty = _command(
            ["git", "-c", f"safe.directory={ROOT}", "status", "--porcelain", "--untracked-files=no"]
        ).strip()
    except (RuntimeError, OSError):
        return "unknown"
    return name + (" (modified)" if dirty else "")


# ---------------------------------------------------------------------------------------------------------------------
# The steps.


def step_device() -> dict[str, Any]:
    """Device, clocks, versions, and the two ceilings: copy bandwidth and the bf16 matrix product."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        smi = _command(["nvidia-smi", f"--query-gpu={query}", "--format=csv"]).strip().splitlines()
    except (RuntimeError, OSError) as error:
        smi = [str(error)]
    source = torch.randn(1 << 28, device="cuda")  # 1 GiB: many times the L2 cache
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: a @ b)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "nvidia_smi": smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_per_s": round(2 * source.nbytes / copy["median_ms"] / 1e6, 1),
        "matmul_bf16_tflop_per_s": round(2 * 8192**3 / product["median_ms"] / 1e9, 1),
    }


def step_build() -> dict[str, Any]:
    """Build the extension in place for the GPU that is present."""
    began = time.monotonic()
    _command([sys.executable, "setup.py", "build_ext", "--inplace"], VGGT_MV_CUDA="1")
    seconds = time.monotonic() - began
    info = _command(
        [sys.executable, "-c", "import json, vggt_mv_ext; print(json.dumps(vggt_mv_ext.build_info()))"],
        PYTHONPATH=_pythonpath(),
    )
    return {"seconds": round(seconds, 1), "build_info": json.loads(info.strip().splitlines()[-1])}


def _pythonpath() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "python")])


PYTEST = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")


def _test_environment() -> dict[str, str]:
    return {"PYTHONPATH": _pythonpath(), "VGGT_MV_REQUIRE_EXT": "1", "VGGT_MV_REQUIRE_GPU": "1"}


def step_tests() -> dict[str, Any]:
    """tests/gpu: operators against fp64, opcheck, streams, graphs, and the model fixtures on CUDA."""
    results = ROOT / "build" / "gpu-check-tests.xml"
    results.parent.mkdir(exist_ok=True)
    output = _command([*PYTEST, "tests/gpu", f"--junitxml={results}"], **_test_environment())
    suite = xml.etree.ElementTree.parse(results).getroot().find("testsuite")
    counts = (
        {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        if suite is not None
        else {}
    )
    if not counts.get("tests") or counts["skipped"] == counts["tests"]:
        raise RuntimeError(f"tests/gpu ran no test: {counts}\n{output[-2000:]}")
    return {**counts, "last_line": output.strip().splitlines()[-1]}


# One test of every kernel and of what is special about its addresses, small enough for an instrumented run.
SANITIZED = (
    "tests/gpu/test_alternating_attention_cuda.py::test_strided_qkv",
    "tests/gpu/test_alternating_attention_cuda.py::test_every_axis",
    "tests/gpu/test_alternating_attention_backward_cuda.py::test_every_axis",
    "tests/gpu/test_alternating_attention_backward_cuda.py::test_strides_change_nothing_but_addresses",
    "tests/gpu/test_qk_norm_rope_cuda.py::test_strides_change_nothing_but_addresses",
    "tests/gpu/test_qk_norm_rope_cuda.py::test_a_gradient_of_any_strides",
    "tests/gpu/test_residual_scale_norm_cuda.py::test_strided_rows",
    "tests/gpu/test_residual_scale_norm_cuda.py::test_opcheck",
)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the toolkit that CUDA_HOME or nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    candidates = [Path(toolkit) / "bin" / "compute-sanitizer" for toolkit in toolkits if toolkit]
    on_path = shutil.which("compute-sanitizer")
    return on_path or next((str(path) for path in candidates if path.is_file()), None)


def step_sanitizer() -> dict[str, Any]:
    """A few tests under compute-sanitizer, our kernels instrumented: addresses, then races in shared memory."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return {"skipped": "no compute-sanitizer on the PATH or in the CUDA toolkit"}
    seconds = {}
    for tool in ("memcheck", "racecheck"):
        began = time.monotonic()
        checked = [sanitizer, "--tool", tool, "--kernel-name", "kns=vggt_mv", "--error-exitcode", "1"]
        _command([*checked, *PYTEST, *SANITIZED], 90.0, **_test_environment())
        seconds[tool] = round(time.monotonic() - began, 1)
    return {"sanitizer": sanitizer, "seconds": seconds}


def step_model(
    backend: str,
    frame_counts: Sequence[int],
    height: int = 336,
    width: int = 518,
    *,
    config: str = "vggt_1b",
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """A model with random weights at growing frame counts, bf16 autocast: time and peak memory of its parts.

    The aggregator at every count, with what each frame more than in the row before adds to the peak, for one frame also
    as a CUDA graph; the whole model up to `WHOLE_MODEL_FRAMES`.
    """
    import torch

    import vggt_mv_ext
    from vggt_mv.models.configs import build_model

    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config).eval()
    parameters = sum(p.numel() for p in model.parameters())
    depth = len(model.aggregator.frame_blocks)
    kept = {4, 11, 17, 23} if depth == 24 else {depth - 1}
    rows: list[dict[str, Any]] = []
    for frames in frame_counts:
        images = torch.rand(1, frames, 3, height, width, device=device)

        def aggregator(images: Any = images) -> Any:
            return model.aggregator(images, keep_outputs=kept)

        def whole(images: Any = images) -> Any:
            return model(images)

        row: dict[str, Any] = {
            "config": config,
            "backend": backend,
            "frames": frames,
            "height": height,
            "width": width,
            "parameters": parameters,
            "weights": "random",
        }
        rows.append(row)
        try:
            with vggt_mv_ext.backend(backend), torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
                parts = {"aggregator": aggregator} | ({"model": whole} if frames <= WHOLE_MODEL_FRAMES else {})
                for name, function in parts.items():
                    peak = PeakMemory(device)
                    timing = measure(function, device=device, warmup=1 if frames > 8 else 3, repeats=10, budget_s=6.0)
                    row[name] = {**timing, **peak.read()}
                if frames == 1 and device == "cuda":
                    row["aggregator_graph"] = measure_graph(lambda run=aggregator: run()[0][-1])
            row["extra_frame_mb"] = extra_frame_mb(rows)
        except torch.cuda.OutOfMemoryError as error:
            row["error"] = f"out of memory: {str(error).splitlines()[0]}"
            break
    return rows


WHOLE_MODEL_FRAMES = 10


def extra_frame_mb(rows: Sequence[dict[str, Any]]) -> float | None:
    """What each frame more than in the row before adds to the aggregator's peak, in 10^6 bytes."""
    if len(rows) < 2:
        return None
    more = rows[-1]["aggregator"]["peak_gib"] - rows[-2]["aggregator"]["peak_gib"]
    return round(more * 2**30 / 1e6 / (rows[-1]["frames"] - rows[-2]["frames"]), 1)


def steps() -> list[Step]:
    """Most wanted first: a machine that is taken away early has answered the oldest questions."""
    frames = (1, 2, 4, 8, 10, 20, 50, 100)
    return [
        Step("device", step_device, 15),
        Step("build", step_build, 60),
        Step("tests", step_tests, 60),
        Step("alternating_attention", step_alternating_attention, 90),
        Step("eager_1b", lambda: step_model("reference", frames), 60),
        Step("auto_1b", lambda: step_model("auto", frames), 60),
        Step("qk_norm_rope", step_qk_norm_rope, 30),
        Step("residual_scale_norm", step_residual_scale_norm, 30),
        Step("dual_stream_attention", step_dual_stream_attention, 15),
        Step("gathered_attention", step_gathered_attention, 30),
        Step("sanitizer", step_sanitizer, 60),
    ]


def print_table(report: dict[str, Any]) -> None:
    """A short table, last, so that it survives any cut of the output's head."""
    results = {entry["name"]: entry.get("result") for entry in report["steps"]}
    print("\n== gpu-check", "passed" if report["ok"] else "FAILED", "==")
    for entry in report["steps"]:
        print(f"{entry['name']:<22}{entry['status']:<10}{entry.get('seconds', 0):8.1f} s")
    if device := results.get("device"):
        ceilings = f"copy {device['copy_gb_per_s']} GB/s, bf16 matmul {device['matmul_bf16_tflop_per_s']} TFLOP/s"
        print(f"{device['device']}: {ceilings}")
    for name in ("residual_scale_norm", "qk_norm_rope"):
        for row in results.get(name) or []:
            ratios = ", ".join(f"{peer}/ours {row[f'{peer}_over_ours']}" for peer in ("copy", "eager", "torch_compile"))
            print(f"{name} {row['dtypes']:<18}{row['frames']:4} frames {row['gb_per_s']:8} GB/s, {ratios}")
    for row in results.get("alternating_attention") or []:
        rates = ", ".join(f"{peer} {rate}" for peer, rate in row["tflop_per_s"].items())
        cost = f"; with bias / without {row['over_no_bias']}" if "over_no_bias" in row else ""
        print(f"attention L {row['length']:6} {'bias' if row['bias'] else '    '} TFLOP/s: {rates}{cost}")
    for row in results.get("dual_stream_attention") or []:
        ratios = ", ".join(f"{mode} qkv {row[f'{mode}_over_one']} x one stream" for mode in ("own", "shared"))
        print(f"dual stream L {row['length']:6}: {ratios}; TFLOP/s: one stream {row['tflop_per_s']['one']}")
    for row in results.get("gathered_attention") or []:
        shares = [f"{name} {row[f'{name}_of_copy']} of a copy's rate" for name in ("memory_write", "memory_read")]
        shares += [f"{name} {row[f'{name}_of_dense_rate']} of dense" for name in ("landmark", "block_dilated")]
        print(f"sparse {row['frames']:4} frames: {', '.join(shares)}; dense {row['tflop_per_s']['dense']} TFLOP/s")
    for name in ("eager_1b", "auto_1b"):
        for row in results.get(name) or []:
            parts = [
                f"{part} {row[part]['median_ms']:9.1f} ms {row[part]['peak_gib']:7.2f} GiB"
                for part in ("aggregator", "model")
                if part in row
            ]
            if "aggregator_graph" in row:
                parts.append(f"aggregator as a CUDA graph {row['aggregator_graph']['median_ms']:.1f} ms")
            if row.get("extra_frame_mb") is not None:
                parts.append(f"{row['extra_frame_mb']} MB a frame more")
            if name == "auto_1b" and (eager := _row(results.get("eager_1b"), row["frames"])) and "aggregator" in row:
                parts.append(f"eager / ours {eager['aggregator']['median_ms'] / row['aggregator']['median_ms']:.2f}")
            print(f"{name} {row['frames']:4} frames: {', '.join(parts)} {row.get('error', '')}")


def _row(rows: Sequence[dict[str, Any]] | None, frames: int) -> dict[str, Any] | None:
    """The row of that many frames, where it holds a measurement."""
    return next((row for row in rows or [] if row["frames"] == frames and "aggregator" in row), None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure on a machine with a GPU.")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/gpu-<device>.json)")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="S", help="seconds in all (default: 540)")
    parser.add_argument("--only", help="comma-separated step names (default: all)")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    chosen = steps()
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = sorted(set(wanted) - {step.name for step in chosen})
        if unknown:
            print(
                f"gpu-check: unknown step {unknown[0]!r}; there are {', '.join(s.name for s in chosen)}",
                file=sys.stderr,
            )
            return 2
        chosen = [step for step in chosen if step.name in wanted]
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    path = arguments.out or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    report = run_steps_within(chosen, path, arguments.time_limit, {"commit": commit()})
    print_table(report)
    print(f"written: {path}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
