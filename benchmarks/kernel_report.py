"""What every CUDA kernel costs, read from the compiled code: no GPU needed.

Compiles each ``csrc/cuda/*.cu`` with warnings as errors for every target, reads registers, spills and stack from
ptxas and instruction counts from the machine code, and writes ``docs/kernels/resources.json`` and ``resources.md``.

    python benchmarks/kernel_report.py            # rewrite the table (`make kernel-report`)
    python benchmarks/kernel_report.py --check    # compile again, fail on spills or if the table does not match

Needs nvcc; rewriting also needs nvdisasm (``pip install nvidia-cuda-nvdisasm``), which nvcc does not bring along.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
TABLE = ROOT / "docs" / "kernels" / "resources.json"
PAGE = TABLE.with_suffix(".md")
TARGETS = ("80", "90a")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra")

# Registers of a multiprocessor and the resident warps it can hold.
REGISTERS, MAX_WARPS = 65536, 64

# Machine instructions worth a column: tensor core, matrix loads, asynchronous copies, 16-byte global accesses, and
# local memory, which is what spills and register arrays with run-time indices turn into.
INSTRUCTIONS = {
    "tensor_core": re.compile(r"^(HMMA|HGMMA|BMMA|IMMA)\b"),
    "matrix_load": re.compile(r"^LDSM\b"),
    "async_copy": re.compile(r"^(LDGSTS|UBLKCP|UTMALDG)\b"),
    "global_load": re.compile(r"^LDG\b"),
    "global_load_16": re.compile(r"^LDG\b.*\.128"),
    "global_store": re.compile(r"^STG\b"),
    "global_store_16": re.compile(r"^STG\b.*\.128"),
    "barrier": re.compile(r"^BAR\b"),
    "local_memory": re.compile(r"^(LDL|STL)\b"),
}


class ReportError(RuntimeError):
    """Something is missing or does not compile; the message is for a person."""


@dataclass
class Kernel:
    """One entry function for one target."""

    target: str
    source: str
    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    max_threads: int | None = None
    instructions: int | None = None
    counts: dict[str, int] | None = None

    @property
    def resident_warps(self) -> int | None:
        """Warps that registers alone leave room for on a multiprocessor, in whole blocks of the largest size."""
        if self.max_threads is None:
            return None
        warps = self.max_threads // 32
        blocks = REGISTERS // ((self.registers + 7) // 8 * 8 * 32 * warps)
        return min(blocks * warps, MAX_WARPS // warps * warps)


def find_tool(name: str) -> str | None:
    """Path of a CUDA binary: on the PATH, in CUDA_HOME, or from NVIDIA's wheels."""
    folders = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    spec = importlib.util.find_spec("nvidia")
    for location in list(spec.submodule_search_locations or []) if spec is not None else []:
        folders += sorted(Path(location).glob("*/bin"), reverse=True)
    on_path = shutil.which(name)
    return on_path or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def included_files(source: Path) -> set[Path]:
    """`source` and every file of csrc that it includes, directly or not."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            if (SOURCES / name).is_file():
                waiting.append(SOURCES / name)
    return found


def kernel_sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def code_of(text: str) -> str:
    """C++ without comments and white space: what decides the compiled code, and no formatter changes."""
    return re.sub(r"\s+", "", re.sub(r"//[^\n]*", "", text))


def sources_hash() -> str:
    """Of the code of every file that a kernel is compiled from, and of the flags."""
    digest = hashlib.sha256("\n".join(FLAGS).encode())
    for path in sorted(set().union(*(included_files(source) for source in kernel_sources()))):
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(code_of(path.read_text()).encode())
    return digest.hexdigest()


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ReportError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def readable_names(mangled: list[str]) -> dict[str, str]:
    """`residual_scale_norm_kernel<float, float, float, 4, 4, 1>` for each mangled name."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise ReportError("c++filt not found: install binutils")
    lines = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, line in zip(mangled, lines.splitlines(), strict=True):
        plain = re.sub(r"^void ", "", line.replace("(anonymous namespace)::", ""))
        plain = re.sub(r"\(vggt_mv::\w+\)$", "", plain)
        names[symbol] = re.sub(r"\((?:int|bool)\)", "", plain.replace("vggt_mv::", "")).replace("__nv_bfloat16", "bf16")
        names[symbol] = names[symbol].replace("__half", "fp16").replace("float", "fp32")
    return names


def parse_ptxas(text: str, target: str, source: str) -> dict[str, Kernel]:
    """Mangled name -> resources, from what ``-Xptxas -v`` prints."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for .*?\n.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s*\n"
        r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = {}
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[match["name"]] = Kernel(
            target=target,
            source=source,
            name=match["name"],
            registers=int(match["registers"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            stack_bytes=int(match["stack"]),
            static_shared_bytes=int(shared[1]) if shared else 0,
        )
    if not kernels:
        raise ReportError(f"no kernel found in what ptxas printed for {source}:\n{text}")
    return kernels


def read_machine_code(cubin: Path, kernels: dict[str, Kernel], nvdisasm: str) -> None:
    """Adds launch bounds and instruction counts."""
    text = run([nvdisasm, "-c", str(cubin)])
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        kernel = kernels.get(section.split(",", 1)[0])
        if kernel is None:
            continue
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section, re.MULTILINE)
        opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
        kernel.instructions = len(opcodes)
        counts = Counter(key for opcode in opcodes for key, form in INSTRUCTIONS.items() if form.match(opcode))
        kernel.counts = {key: counts[key] for key in INSTRUCTIONS}
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise ReportError("cuobjdump not found: pip install nvidia-cuda-cuobjdump")
    elf = run([cuobjdump, "--dump-elf", str(cubin)])
    for match in re.finditer(r"^\.nv\.info\.(\S+)$(.*?)(?=^\.\S|\Z)", elf, re.MULTILINE | re.DOTALL):
        bound = re.search(
            r"EIATTR_MAX_THREADS.*?Value:\s*0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)", match[2], re.DOTALL
        )
        if bound and match[1] in kernels:
            kernels[match[1]].max_threads = int(bound[1], 16) * int(bound[2], 16) * int(bound[3], 16)


def compile_one(source: Path, target: str, nvdisasm: str | None) -> list[Kernel]:
    """Every kernel of a source file for one target."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise ReportError("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [nvcc, *FLAGS, f"-I{SOURCES}", architecture, "-cubin", "-Xptxas=-v", "-o", str(cubin), str(source)]
        kernels = parse_ptxas(run(command), f"sm_{target}", source.name)
        if nvdisasm is not None:
            read_machine_code(cubin, kernels, nvdisasm)
    names = readable_names(list(kernels))
    for symbol, kernel in kernels.items():
        kernel.name = names[symbol]
    return list(kernels.values())


def compile_all(targets: list[str], nvdisasm: str | None) -> list[Kernel]:
    jobs = [(source, target) for source in kernel_sources() for target in targets]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        results = pool.map(lambda job: compile_one(job[0], job[1], nvdisasm), jobs)
    kernels = [kernel for result in results for kernel in result]
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.name, kernel.target))


def nvcc_version() -> str:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise ReportError("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
    match = re.search(r"release [\d.]+, V([\d.]+)", run([nvcc, "--version"]))
    return match[1] if match else "unknown"


def page(kernels: list[Kernel], version: str) -> str:
    """The table for people: one row a kernel, one number a target."""
    targets = sorted({kernel.target for kernel in kernels}, key=lambda name: (len(name), name))
    lines = [
        "# What the kernels cost",
        "",
        f"Compiled by nvcc {version} for {', '.join(targets)}; written by `make kernel-report`, which reads the",
        "compiled code and runs nothing. Where two numbers stand, they are for those targets in that order. `warps` is",
        f"how many a multiprocessor can hold as far as registers go, of {MAX_WARPS}. No kernel spills and none uses",
        "local memory.",
        "",
        "| kernel | registers | warps | threads, at most | instructions | tensor core | matrix load | async copy "
        "| global load (16 bytes) | global store (16 bytes) | barrier |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source in sorted({kernel.source for kernel in kernels}):
        lines.append(f"| **{source}** |" + " |" * 10)
        for name in dict.fromkeys(kernel.name for kernel in kernels if kernel.source == source):
            rows = {kernel.target: kernel for kernel in kernels if (kernel.source, kernel.name) == (source, name)}
            present = [rows[target] for target in targets if target in rows]
            counts = [kernel.counts or {} for kernel in present]

            def both(values: list[object]) -> str:
                texts = [str(value) for value in values]
                return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

            cells = [
                f"`{name}`",
                both([kernel.registers for kernel in present]),
                both([kernel.resident_warps for kernel in present]),
                both([kernel.max_threads for kernel in present]),
                both([kernel.instructions for kernel in present]),
                *(both([count.get(key) for count in counts]) for key in ("tensor_core", "matrix_load", "async_copy")),
                both([f"{count.get('global_load')} ({count.get('global_load_16')})" for count in counts]),
                both([f"{count.get('global_store')} ({count.get('global_store_16')})" for count in counts]),
                both([count.get("barrier") for count in counts]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spilling(kernels: list[Kernel]) -> list[str]:
    """A line for each kernel that spills or touches local memory."""
    return [
        f"{kernel.name} for {kernel.target}: {kernel.spill_bytes} bytes spilled, {kernel.stack_bytes} bytes of stack"
        for kernel in kernels
        if kernel.spill_bytes or kernel.stack_bytes or (kernel.counts or {}).get("local_memory")
    ]


def write(targets: list[str]) -> None:
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        raise ReportError("nvdisasm not found: pip install nvidia-cuda-nvdisasm")
    kernels = compile_all(targets, nvdisasm)
    if bad := spilling(kernels):
        raise ReportError("kernels must not spill:\n" + "\n".join(bad))
    version = nvcc_version()
    rows = [asdict(kernel) | {"resident_warps": kernel.resident_warps} for kernel in kernels]
    head = json.dumps({"sources": sources_hash(), "nvcc": version, "flags": FLAGS}, indent=1)[1:-2]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(f'{{{head},\n "kernels": [\n{body}\n ]\n}}\n')
    PAGE.write_text(page(kernels, version))
    print(f"{len(kernels)} kernels -> {TABLE.relative_to(ROOT)}, {PAGE.name}")


def check(targets: list[str]) -> None:
    """Compiles again; with the compiler of the table, registers must be those of the table."""
    table = json.loads(TABLE.read_text())
    if table["sources"] != sources_hash():
        raise ReportError(f"{TABLE.relative_to(ROOT)} is older than the kernels: run `make kernel-report`")
    kernels = compile_all(targets, None)
    if bad := spilling(kernels):
        raise ReportError("kernels must not spill:\n" + "\n".join(bad))
    recorded = {(row["target"], row["name"]): row["registers"] for row in table["kernels"]}
    if set(recorded) != {(kernel.target, kernel.name) for kernel in kernels}:
        raise ReportError(f"{TABLE.relative_to(ROOT)} lists other kernels: run `make kernel-report`")
    if table["nvcc"] == nvcc_version():
        for kernel in kernels:
            if recorded[kernel.target, kernel.name] != kernel.registers:
                raise ReportError(
                    f"{kernel.name} for {kernel.target} has {kernel.registers} registers, the table says "
                    f"{recorded[kernel.target, kernel.name]}: run `make kernel-report`"
                )
    print(f"{len(kernels)} kernels compiled for {', '.join(targets)}: no warnings, no spills, table up to date")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in table instead of writing it")
    arguments = parser.parse_args()
    try:
        (check if arguments.check else write)(list(TARGETS))
    except ReportError as error:
        print(f"kernel_report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
