"""Builds the CPU kernels with sanitizers and runs them: `make sanitize`, or ARGS=address or ARGS=thread for one.
ARGS="address tests/ops/test_qk_norm_rope.py" runs the tests of those files alone.

address   AddressSanitizer and UndefinedBehaviorSanitizer over the operators' own tests (tests/ops).
thread    ThreadSanitizer over race_check.cpp: every kernel on four threads and on one, which must give the same bits.

On x86 without AVX-512 its variants run all the same, their instructions made of AVX2 (avx512/immintrin.h).

Needs cmake, ninja and GCC's sanitizer libraries. Builds into build/sanitize-*, beside what is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"address": "address,undefined", "thread": "thread"}


def has_avx512_bf16() -> bool:
    """Whether this processor runs every variant of the CPU kernels; where nobody knows, it has to."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True


def build(kind: str, target: str) -> Path:
    """Configures and builds one target; returns the folder."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    folder = ROOT / "build" / f"sanitize-{kind}"
    options = {
        "VGGT_MV_CUDA": "0",
        "VGGT_MV_SANITIZE": FLAGS[kind],
        "VGGT_MV_EMULATE_AVX512": "OFF" if has_avx512_bf16() else "ON",
        "Python_EXECUTABLE": sys.executable,
        "VGGT_MV_PYBIND11_INCLUDE": str(Path(torch.origin).parent / "include"),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", target], check=True)
    return folder


def check_addresses(files: list[str]) -> int:
    """The operators' tests, or those of `files`, on a package whose compiled module watches every access."""
    folder = build("address", "_C")
    package = folder / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "vggt_mv_ext", package / "vggt_mv_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.json")
    )
    subprocess.run(["cmake", "--install", folder, "--prefix", package], check=True)
    libraries = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep what they allocate
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VGGT_MV_REQUIRE_EXT": "1",
    }
    # Compilation and processes of their own test nothing of the kernels, and take long here.
    skipped = "not compile and not fresh_processes and not opcheck"
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(files or ["tests/ops"]), "-k", skipped]
    # Reports go to the process's standard error, and the process then ends: pytest must not have it in a buffer.
    command += ["--capture=sys"]
    command += ["-o", f"pythonpath={package.relative_to(ROOT)} python", "-o", "addopts=-p no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def check_threads() -> int:
    """Every kernel under ThreadSanitizer."""
    folder = build("thread", "race_check")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=0 second_deadlock_stack=1"}
    return subprocess.run([folder / "race_check"], env=environment, check=False).returncode


def main() -> int:
    files = [argument for argument in sys.argv[1:] if argument.endswith(".py")]
    checks = {"address": lambda: check_addresses(files), "thread": check_threads}
    chosen = [argument for argument in sys.argv[1:] if argument not in files] or list(checks)
    if unknown := [name for name in chosen if name not in checks]:
        print(f"sanitize: must be of {', '.join(checks)}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    statuses = {name: checks[name]() for name in chosen}
    for name, status in statuses.items():
        print(f"{name}: {'clean' if status == 0 else f'FAILED ({status})'}")
    return max(statuses.values())


if __name__ == "__main__":
    sys.exit(main())
