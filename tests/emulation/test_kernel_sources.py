"""What the kernel sources and the checked-in resource table promise, without compiling anything."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE_HEADER = ROOT / "csrc" / "cuda" / "arch" / "simt.cuh"
KERNEL_SOURCES = sorted(
    path
    for path in (ROOT / "csrc" / "cuda").rglob("*")
    if path.suffix in {".cu", ".cuh", ".h"} and path != MACHINE_HEADER
)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """benchmarks/kernel_report.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "benchmarks" / "kernel_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda path: path.name)
def test_kernels_reach_the_machine_only_through_its_header(path: Path) -> None:
    forbidden = (
        r"\basm\b|__shared__|<<<|\b(threadIdx|blockIdx|blockDim|gridDim)\b|__sync\w+|__shfl\w+|__ldg|__pipeline\w+"
    )
    found = re.search(forbidden, without_comments(path.read_text()))
    assert found is None, f"{path.relative_to(ROOT)} uses {found and found[0]}: use the names of arch/simt.cuh"


@pytest.mark.parametrize("path", [p for p in KERNEL_SOURCES if p.suffix == ".cuh"], ids=lambda path: path.name)
def test_kernels_touch_global_memory_through_checked_accesses(path: Path) -> None:
    """A plain `pointer[i]` on a member of the params would escape the emulator's bounds checks."""
    found = re.search(r"\bp\.\w+\[", without_comments(path.read_text()))
    assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}...: use load_global or store_global"


def test_resource_table_is_of_these_sources(report: ModuleType) -> None:
    table = json.loads(report.TABLE.read_text())
    assert table["sources"] == report.sources_hash(), "the kernels have changed: run `make kernel-report`"


def test_no_kernel_spills(report: ModuleType) -> None:
    rows = json.loads(report.TABLE.read_text())["kernels"]
    assert {row["target"] for row in rows} == {f"sm_{target}" for target in report.TARGETS}
    assert {row["source"] for row in rows} == {source.name for source in report.kernel_sources()}
    for row in rows:
        assert row["spill_bytes"] == row["stack_bytes"] == row["counts"]["local_memory"] == 0, row["name"]


def test_page_is_of_the_same_table(report: ModuleType) -> None:
    rows = json.loads(report.TABLE.read_text())["kernels"]
    page = report.PAGE.read_text()
    for row in rows:
        assert f"| `{row['name']}` |" in page


def test_every_kernel_leaves_room_for_eight_warps(report: ModuleType) -> None:
    for row in json.loads(report.TABLE.read_text())["kernels"]:
        assert row["resident_warps"] >= 8, row["name"]


def test_rows_are_stored_in_16_bytes(report: ModuleType) -> None:
    """The emulator counts what the source says; here is what the compiler made of it."""
    forward = [row for row in table_rows(report) if row["name"].startswith("qk_norm_rope_kernel")]
    assert forward
    for row in forward:
        counts = row["counts"]
        assert counts["global_store"] == counts["global_store_16"] > 0, row["name"]
        assert counts["global_load"] == counts["global_load_16"] > 0, row["name"]


def table_rows(report: ModuleType) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(report.TABLE.read_text())["kernels"]
    return rows


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    24 bytes stack frame, 24 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers
"""


def test_only_code_counts_as_a_change(report: ModuleType) -> None:
    plain = report.code_of("int a;  // one\nint b;\n")
    assert plain == report.code_of("int a;\n\n  int b;") != report.code_of("int a; int c;")


def test_spills_are_read_and_refused(report: ModuleType) -> None:
    kernels = report.parse_ptxas(PTXAS, "sm_80", "planted.cu")
    assert (kernels["_Z1aPf"].registers, kernels["_Z1aPf"].static_shared_bytes) == (40, 512)
    assert report.spilling(list(kernels.values())) == ["_Z1bPf for sm_80: 72 bytes spilled, 24 bytes of stack"]


def test_resident_warps_follow_from_registers(report: ModuleType) -> None:
    def kernel(registers: int, threads: int) -> object:
        return report.Kernel("sm_80", "a.cu", "a", registers, 0, 0, 0, max_threads=threads)

    assert kernel(32, 1024).resident_warps == 64
    assert kernel(33, 1024).resident_warps == 32
    assert kernel(128, 128).resident_warps == 16
    assert kernel(255, 128).resident_warps == 8
