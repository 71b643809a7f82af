"""Loading weights: seconds and peak resident memory of every way, beside plain torch.load + load_state_dict.

    python benchmarks/bench_weights.py                 # 1.2 B random values: 10 GB of temporary disk and of memory
    python benchmarks/bench_weights.py --folder /disk  # on another disk
    python benchmarks/bench_weights.py --dual-stream --ways build-safetensors  # 2.5 B: 10 GB
    pytest benchmarks/bench_weights.py --benchmark-only

Each way runs in a process of its own, after the file was put out of the page cache, and must end with the right values
in all parameters, every one of which is then read, so that nothing is left unloaded. Reported are

- `disk`: seconds to read the same bytes from the same cold file in sequence, just before: no way can be quicker;
- `build`, `load`, `read`: seconds to make the model, to load, and to read every parameter once more afterwards;
- `peak`: VmHWM, the most memory that was resident in the whole process: Python, torch, model, and the pages of the
  mapped file that were touched. These belong to the page cache and go without being written when memory is short; they
  are counted all the same;
- `anon`, `file`: of the memory when all is loaded, how much is the process's own and how much mapped files, in GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "plain-pt": "torch.load, load_state_dict",
    "plain-safetensors": "safetensors load_file, load_state_dict",
    "build-pt": "from_pretrained (build_from_weights), .pt",
    "build-safetensors": "from_pretrained (build_from_weights), .safetensors",
    "copy-safetensors": "load_pretrained_weights into a built model",
    "assign-safetensors": "load_pretrained_weights(assign=True) into a built model",
}


# ---- one process a way


def build(config: str) -> torch.nn.Module:
    """The model of a configuration; after "dual:" a bare tree with the tensors that it has with a dual stream."""
    from vggt_mv.models.configs import load_config
    from vggt_mv.weights.preview import config_spec

    if config.startswith("dual:"):
        tree = torch.nn.Module()
        for key, info in config_spec(config[len("dual:") :], dual_stream=True).tensors.items():
            *path, leaf = key.split(".")
            module = tree
            for name in path:
                if name not in module._modules:
                    module.add_module(name, torch.nn.Module())
                module = module.get_submodule(name)
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty(info.shape)))
        return tree
    model_class, options = load_config(config)
    return model_class(**options).eval()


def make_files(config: str, folder: Path, suffixes: Sequence[str] = ("safetensors", "pt")) -> None:
    """The same random values as .safetensors and as .pt, or as one of them."""
    from vggt_mv.weights.safetensors_io import write_safetensors

    model: torch.nn.Module = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    state = model.state_dict()
    (folder / "digest").write_text(str(digest(model)))
    if "safetensors" in suffixes:
        write_safetensors(folder / "weights.safetensors", state)
    if "pt" in suffixes:
        torch.save(state, folder / "weights.pt")
    for suffix in suffixes:
        with (folder / f"weights.{suffix}").open("rb") as file:
            os.fsync(file.fileno())


def digest(model: torch.nn.Module) -> int:
    """Of the first and last values of every tensor."""
    total = 0
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        ends = torch.cat((flat[:512], flat[-512:]))
        total = zlib.crc32(name.encode() + ends.contiguous().numpy().tobytes(), total)
    return total


def run_way(way: str, config: str, folder: Path) -> dict[str, float]:
    kind, suffix = way.split("-")
    path = folder / f"weights.{suffix}"
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    if kind == "build":
        from vggt_mv.weights import build_from_weights

        built = start
        model, _ = build_from_weights(lambda: build(config), path)
    else:
        model = build(config)
        built = time.perf_counter()
        _load(kind, model, path)
    loaded = time.perf_counter()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    done = time.perf_counter()
    if digest(model) != int((folder / "digest").read_text()):
        raise SystemExit(f"{way}: wrong values")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    memory = {name: int(status[key].split()[0]) * 1024 for name, key in MEMORY.items()}
    return {"build": built - start, "load": loaded - built, "read": done - loaded, **memory}


MEMORY = {"peak": "VmHWM", "anon": "RssAnon", "file": "RssFile"}


def _load(kind: str, model: torch.nn.Module, path: Path) -> None:
    from vggt_mv.weights import load_pretrained_weights

    if kind in ("copy", "assign"):
        load_pretrained_weights(model, path, assign=kind == "assign")
    elif path.suffix == ".pt":
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))


# ---- the parent


def child(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or f"{arguments}: exit code {done.returncode}")
    return done.stdout


def evict(path: Path) -> None:
    """Put a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> float:
    evict(path)
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def measure(config: str, folder: Path, ways: list[str], say: Callable[[str], Any]) -> list[dict[str, Any]]:
    suffixes = sorted({way.split("-")[1] for way in ways})
    child("make:" + ",".join(suffixes), config, str(folder))
    rows = []
    size = (folder / f"weights.{suffixes[0]}").stat().st_size
    say(f"{config}: file of {size / 1e9:.3f} GB")
    say(f"{'way':<56}   disk  build   load   read     peak of file   anon   file")
    for way in ways:
        path = folder / f"weights.{way.split('-')[1]}"
        disk = read_through(path)
        evict(path)
        row = {"way": way, "bytes": path.stat().st_size, "disk": disk, **json.loads(child(way, config, str(folder)))}
        rows.append(row)
        times = " ".join(f"{row[name]:5.1f}s" for name in ("disk", "build", "load", "read"))
        memory = f"{row['peak'] / 1e9:6.2f}GB {row['peak'] / row['bytes']:6.2f}x"
        say(f"{WAYS[way]:<56} {times} {memory} {row['anon'] / 1e9:6.2f} {row['file'] / 1e9:6.2f}")
    return rows


def measure_planning(say: Callable[[str], Any]) -> None:
    for name, shapes in manifests().items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            plan(shapes)
            times.append(time.perf_counter() - start)
        times.sort()
        say(f"planning {name}, {len(shapes)} tensors: median {times[2]:.3f} s, from {times[0]:.3f} to {times[-1]:.3f}")


def manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    found = {}
    for name in ("page4d_1b", "vggt_mv_aggregator_dual_memory"):
        shapes = json.loads((ROOT / "tests" / "keys" / f"{name}.json").read_text())
        found[name] = {key: tuple(shape) for key, shape in shapes.items()}
    return found


def plan(shapes: dict[str, tuple[int, ...]]) -> None:
    from vggt_mv.weights import plan_load

    assert plan_load(shapes, shapes).report()["missing"] == 0


@pytest.mark.parametrize("name", ["page4d_1b", "vggt_mv_aggregator_dual_memory"])
def test_planning(benchmark: Any, name: str) -> None:
    shapes = manifests()[name]
    benchmark(plan, shapes)


@pytest.mark.parametrize("way", ["plain-pt", "build-pt", "build-safetensors", "copy-safetensors"])
def test_loading_the_small_model(benchmark: Any, way: str, tmp_path: Path) -> None:
    """Seconds of each way for the model of the demo. Memory is measured at full size, by this file as a program."""
    make_files("vggt_mv_demo", tmp_path)
    benchmark(run_way, way, "vggt_mv_demo", tmp_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="vggt_mv_1b")
    parser.add_argument("--dual-stream", action="store_true", help="a tree with the tensors of the dual stream")
    parser.add_argument("--folder", default=None, help="where the temporary files go")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path, default=None, help="write the numbers here as well")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        way, config, folder = arguments.child
        if way.startswith("make:"):
            make_files(config, Path(folder), way[len("make:") :].split(","))
        else:
            print(json.dumps(run_way(way, config, Path(folder))))
        return
    measure_planning(print)
    config = f"dual:{arguments.config}" if arguments.dual_stream else arguments.config
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-weights-") as folder:
        rows = measure(config, Path(folder), arguments.ways, lambda line: print(line, flush=True))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
