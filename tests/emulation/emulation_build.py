"""Builds the emulated library: the CUDA kernels and launchers, compiled for the host by the C++ compiler.

Objects and libraries lie in ``build/emulation`` under names that hold the hash of everything that went into them, so a
second run compiles nothing and two runs at once do not disturb each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulation"
MACHINE = (HERE / "fiber.cpp", HERE / "machine.cpp", HERE / "c_api.cpp")
FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DVGGT_MV_EMULATED",
)
NEEDED_HEADERS = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target")


class CannotBuild(RuntimeError):
    """The machine lacks something that the emulated library needs; the message says what to install."""


def cuda_include_candidates() -> list[Path]:
    """Folders that may hold the CUDA headers, most deliberate first: variables, nvcc's toolkit, NVIDIA's wheels."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    spec = importlib.util.find_spec("nvidia")
    for location in list(spec.submodule_search_locations or []) if spec is not None else []:
        candidates += sorted(Path(location).glob("*/include"), reverse=True)
    return candidates


def cuda_include() -> Path:
    """The first folder that holds every header needed."""
    for folder in cuda_include_candidates():
        if all((folder / header).is_file() for header in NEEDED_HEADERS):
            return folder
    raise CannotBuild(
        "no CUDA headers found (cuda_runtime_api.h, cuda_fp16.h): install the CUDA toolkit, set CUDA_HOME, "
        "or run: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def compiler() -> str:
    """The C++ compiler: CXX, else g++, else clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CannotBuild("no C++ compiler found: install g++ (12 or later), or set CXX")


def _headers() -> list[Path]:
    folders = (HERE, ROOT / "csrc" / "core", ROOT / "csrc" / "cuda")
    return sorted(path for folder in folders for suffix in ("*.h", "*.cuh") for path in folder.rglob(suffix))


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build_library(sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Compiles `sources` and the machine into a shared library, in parallel, and returns its path.

    Args:
        sources: ``.cu`` and ``.cpp`` files.
        flags: further compiler flags, such as ``-DVGGT_MV_FIBER_UCONTEXT``.

    Raises:
        CannotBuild: no compiler, or no CUDA headers.
        RuntimeError: the compiler's complaint.
    """
    cxx = compiler()
    include = cuda_include()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    arguments = [*FLAGS, *flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(include)]
    common = hashlib.sha256("\n".join([version, *arguments]).encode())
    for header in _headers():
        common.update(header.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                partial = Path(folder) / "object.o"
                _run([cxx, *arguments, "-x", "c++", "-c", str(source), "-o", str(partial)])
                partial.replace(target)
        return target

    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles, the others find what it left
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, [*MACHINE, *sources]))
    digest = hashlib.sha256("\n".join(str(path) for path in objects).encode()).hexdigest()[:16]
    library = BUILD / f"libemulated-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            partial = Path(folder) / "library.so"
            _run([cxx, "-shared", "-o", str(partial), *map(str, objects), "-ldl"])
            partial.replace(library)
    return library
