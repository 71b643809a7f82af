"""Whole models on a CPU beside eager PyTorch and torch.compile: time, peak memory, and the error of what comes out.

    python benchmarks/bench_model.py --frames 1 4 --families vggt --rounds 2

Every run is a process of its own with the same random weights and images; peers take turns. `eager` is the same model
with every operator in plain PyTorch, `compile` that under torch.compile with freezing, `ours` the package as it is,
`optimized` that after `model.optimize_for_inference`, which is what `vggt-mv --weights` does on a CPU.
Errors are relative (Frobenius), of depth and world points, to eager float32 in the same round. Peak memory is what the
process holds at most during the prediction, above what it held before. --pages asks the system for huge pages
(THP_MEM_ALLOC_ENABLE=1, as `vggt-mv` does for itself), for all peers alike; without it none has them. --keep-freed lets
every peer keep memory that is freed for its next tensors; without it `optimized` does, since that is part of
`optimize_for_inference`, and no other.
Results go to benchmarks/results/local-model.json, or --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("eager", "compile", "ours", "optimized")
DTYPES = ("float32", "bfloat16")
COMPARED = ("depth", "world_points")
FULL: dict[str, Any] = {}
TINY = {
    "img_size": 70,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "patch_embed": "conv",
    "dpt_head_options": {"features": 32, "out_channels": [32] * 4, "intermediate_layer_idx": [0, 1, 2, 3]},
    "enable_track": False,
}


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Every operator that blocks call, in plain PyTorch which autograd, autocast and the compiler see through."""
    from unittest import mock

    import torch.nn.functional as F
    from torch import nn

    from vggt_mv.layers import attention, conv, linear, pieces, residual
    from vggt_mv_ext import reference

    def linear_and_activation(x: Any, weight: Any, bias: Any, activation: str = "none") -> Any:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if activation == "gelu" else y

    def norm_rope(*arguments: Any, inplace: bool = False, **keywords: Any) -> Any:
        return reference.qk_norm_rope(*arguments, **keywords)

    def add_and_norm(*arguments: Any, out: None) -> Any:
        return reference.residual_scale_norm(*arguments)

    def convolution(
        x: Any,
        weight: Any,
        bias: Any,
        residual: Any,
        activation: str = "none",
        *,
        size: Any = None,
        offsets: Any = None,
        overwrite_residual: bool = False,
    ) -> Any:
        if size is not None and tuple(size) != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
        if offsets is not None:
            half = x.shape[1] // 2  # each of them is zero in the other half
            x[:, half:].add_(offsets[0].mT[half:].unsqueeze(2))
            x[:, :half].add_(offsets[1].mT[:half].unsqueeze(1))
        y = F.conv2d(x, weight, bias, padding=1)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if activation == "relu" else y

    with (
        mock.patch.object(attention, "alternating_attention", reference.alternating_attention),
        mock.patch.object(attention, "qk_norm_rope", norm_rope),
        mock.patch.object(residual, "residual_scale_norm", add_and_norm),
        mock.patch.object(pieces, "fits", lambda *_: False),  # noqa: PT008 (the compiler sees through no mock)
        mock.patch.object(linear, "packed_linear", linear_and_activation),
        mock.patch.object(conv, "conv3x3", convolution),
        mock.patch.object(conv.StridedConv3x3, "forward", nn.Conv2d.forward),
    ):
        yield


def build(family: str, frames: int, config: dict[str, Any]) -> tuple[Any, Any]:
    """A model with random weights and images for it."""
    import torch

    from vggt_mv import VGGT, VGGT_MV

    torch.manual_seed(0)
    options: dict[str, Any] = {"enable_track": False, **config}
    if config and family != "vggt":
        options["mask_layer"] = 1
    side = 70 if config else 518
    if family == "vggt":
        return VGGT(**options).eval(), torch.rand(1, frames, 3, side, side)
    if family == "page4d":
        return VGGT_MV(**options).eval(), torch.rand(1, frames, 3, side, side)
    times = max(1, frames // 2)
    return VGGT_MV(**options).eval(), torch.rand(1, times, frames // times, 3, side, side)


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def child(arguments: argparse.Namespace) -> None:
    """One run of one peer; prints a line of JSON."""
    import torch

    from vggt_mv.weights import pages

    config = TINY if arguments.tiny else FULL
    model, images = build(arguments.family, arguments.frames, config)
    low = arguments.dtype == "bfloat16"
    plain = plain_pytorch() if arguments.peer in ("eager", "compile") else contextlib.nullcontext()
    if arguments.peer == "optimized":
        model.optimize_for_inference(getattr(torch, arguments.dtype))
    if arguments.keep_freed:
        pages.keep_freed()
    with plain, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        run = model
        if arguments.peer == "compile":
            torch._inductor.config.freezing = True  # as an option of torch.compile it has no effect in 2.13
            run = torch.compile(model)
        # What is prepared once (packing, compilation) is no part of a prediction: a first one, of one frame or of all.
        began = time.perf_counter()
        run(images if arguments.peer == "compile" else images[:, :1])
        first = time.perf_counter() - began
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        predictions = run(images)
        seconds = time.perf_counter() - began
        peak = memory("VmHWM") - before
    import numpy as np

    np.savez(arguments.save, **{name: predictions[name].float().numpy() for name in COMPARED})
    print(json.dumps({"seconds": seconds, "first_seconds": first, "peak_bytes": peak, "resident_bytes": before}))


def run_child(arguments: argparse.Namespace, peer: str, dtype: str, family: str, frames: int, save: Path) -> Any:
    command = [sys.executable, __file__, "--child", "--peer", peer, "--dtype", dtype, "--family", family]
    command += ["--frames", str(frames), "--save", str(save), *(["--tiny"] if arguments.tiny else [])]
    command += ["--keep-freed"] if arguments.keep_freed else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    if arguments.pages:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def errors(save: Path, exact: Path) -> dict[str, float]:
    import numpy as np

    with np.load(save) as got, np.load(exact) as expected:
        return {n: float(np.linalg.norm(got[n] - expected[n]) / np.linalg.norm(expected[n])) for n in COMPARED}


def measure(arguments: argparse.Namespace, family: str, frames: int) -> list[dict[str, Any]]:
    """All peers in turn, `rounds` times; medians."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "eager-float32.npz"
        for _ in range(arguments.rounds):
            for peer in arguments.peers:
                for dtype in arguments.dtypes:
                    save = Path(folder) / f"{peer}-{dtype}.npz"
                    result = run_child(arguments, peer, dtype, family, frames, save)
                    if "error" not in result:
                        result["errors"] = errors(save, exact)
                    runs.setdefault((peer, dtype), []).append(result)
                    print(
                        f"  {family} {frames} frames, {peer} {dtype}: {json.dumps(result)}", file=sys.stderr, flush=True
                    )
    rows = []
    for (peer, dtype), results in runs.items():
        row: dict[str, Any] = {"family": family, "frames": frames, "peer": peer, "dtype": dtype}
        if failed := [result["error"] for result in results if "error" in result]:
            row["error"] = failed[0]
        else:
            times = [result["seconds"] for result in results]
            row |= {"seconds": statistics.median(times), "spread": [min(times), max(times)]}
            row |= {"peak_bytes": results[-1]["peak_bytes"], "resident_bytes": results[-1]["resident_bytes"]}
            row |= {"errors": results[-1]["errors"], "first_seconds": results[-1]["first_seconds"]}
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if (row["peer"], row["dtype"]) == ("eager", "float32"))
    for row in rows:
        label = f"{row['family']:<8} {row['frames']:3} frames  {row['peer']:<8} {row['dtype']:<9}"
        if "error" in row:
            print(f"{label} {row['error']}")
            continue
        found = ", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
        print(
            f"{label} {row['seconds']:8.2f} s ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"
            f"  x{base['seconds'] / row['seconds']:.2f}  peak {row['peak_bytes'] / 2**30:5.2f} GiB above"
            f" {row['resident_bytes'] / 2**30:5.2f}  error: {found}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--families", nargs="+", default=["vggt", "page4d", "vggt_mv"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pages", action="store_true", help="huge pages, for every peer")
    parser.add_argument("--keep-freed", action="store_true", help="freed memory stays with the process, for every peer")
    parser.add_argument("--tiny", action="store_true", help="a model that shows whether the script works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "local-model.json")
    for hidden in ("--peer", "--dtype", "--family", "--save"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.frames = arguments.frames[0]
        child(arguments)
        return
    if arguments.peers[0] != "eager" or arguments.dtypes[0] != "float32":
        parser.error("--peers must begin with eager and --dtypes with float32: the others are measured by it")
    rows = []
    for family in arguments.families:
        for frames in arguments.frames:
            found = measure(arguments, family, frames)
            rows += found
            print_rows(found)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
