"""Who may know whom: imports of the Python packages and includes of the C++ sources point down only.

python/vggt_mv/cli   thin over the rest of vggt_mv; nothing imports it
python/vggt_mv       knows vggt_mv_ext's public functions, and no backend
vggt_mv_ext          knows torch and its own parts; no model
csrc/bindings.cpp    the only file that knows Python
csrc/cpu, csrc/cuda  know csrc/core and themselves
csrc/core            knows the C++ standard library alone
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the model may import of vggt_mv_ext: the package itself and the names that it exports. `backends`, `_extension`,
# `ops` and `reference` are its own business.
PUBLIC = {
    "alternating_attention",
    "backend",
    "block_dilated_attention",
    "build_info",
    "cannot_pack_linear_weight",
    "conv3x3",
    "dual_stream_attention",
    "explain",
    "get_backend",
    "landmark_attention",
    "linear_product_dtype",
    "memory_read",
    "memory_write",
    "pack_linear_weight",
    "packed_linear",
    "qk_norm_rope",
    "residual_scale_norm",
    "set_backend",
    "BackendError",
    "Explanation",
    "__version__",
}
# Names of the choice of backend: the model computes and does not choose. Whoever runs it may (cli, benchmarks).
CHOICE = {"backend", "set_backend", "get_backend", "explain", "BackendError", "Explanation"}
COMPUTES = ("layers", "heads", "models")


def imports(path: Path, package: tuple[str, ...]) -> Iterator[tuple[int, str, str | None]]:
    """Every import of a file as (line, absolute module, name taken from it or None)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield node.lineno, module, alias.name


def python_violations(root: Path) -> list[str]:
    """Imports of python/vggt_mv and vggt_mv_ext that point up, or past the public names."""
    found = []
    for top, folder in (("vggt_mv_ext", root / "vggt_mv_ext"), ("vggt_mv", root / "python" / "vggt_mv")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            for line, module, name in imports(path, (top, *inside[:-1])):
                reason = forbidden(top, inside, module, name)
                if reason:
                    found.append(f"{path.relative_to(root)}:{line}: {module} {name or ''}: {reason}")
    return found


def forbidden(top: str, inside: tuple[str, ...], module: str, name: str | None) -> str | None:
    """Why a file of package `top` at path `inside` may not import this, or None where it may."""
    parts = module.split(".")
    if top == "vggt_mv_ext":
        return "vggt_mv_ext knows no model" if parts[0] == "vggt_mv" else None
    if parts[0] == "vggt_mv_ext":
        if module != "vggt_mv_ext._version" and (len(parts) > 1 or (name is not None and name not in PUBLIC)):
            return "only the public names of vggt_mv_ext"
        if inside[0] in COMPUTES and name in CHOICE:
            return "the model knows no backend"
    if parts[:2] == ["vggt_mv", "cli"] or (parts == ["vggt_mv"] and name == "cli"):
        return None if inside[0] in ("cli", "__main__.py") else "nothing imports the command line"
    if parts[0] in ("typer", "click") and inside[0] not in ("cli", "__main__.py"):
        return "the command line's library belongs to cli"
    return None


INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)


def include_violations(root: Path) -> list[str]:
    """Includes of csrc that point up, and Python or PyTorch outside the bindings."""
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        inside = path.relative_to(root / "csrc").parts
        layer = inside[0] if len(inside) > 1 else "bindings"
        for quote, target in INCLUDE.findall(path.read_text(encoding="utf-8")):
            reason = forbidden_include(layer, quote, target)
            if reason:
                found.append(f"{path.relative_to(root)}: {target}: {reason}")
    return found


def forbidden_include(layer: str, quote: str, target: str) -> str | None:
    """Why a file of this layer of csrc may not include `target`, or None where it may."""
    first = target.split("/")[0]
    if first in ("torch", "ATen", "c10"):
        return "no PyTorch headers in C++"
    if (first == "pybind11" or target == "Python.h") and layer != "bindings":
        return "only bindings.cpp knows Python"
    if quote == '"' and first in ("core", "cpu", "cuda"):
        allowed = {"core": ("core",), "cpu": ("core", "cpu"), "cuda": ("core", "cuda"), "bindings": (first,)}[layer]
        return None if first in allowed else f"{layer} may not know {first}"
    if layer == "core" and (quote == '"' or "/" in target or "." in target):
        return "core knows the C++ standard library alone"
    if layer == "cpu" and target.startswith("cuda"):
        return "cpu may not know CUDA"
    return None


def test_imports_point_down() -> None:
    assert python_violations(ROOT) == []


def test_includes_point_down() -> None:
    assert include_violations(ROOT) == []


def test_public_names_are_exported() -> None:
    import vggt_mv_ext

    assert set(vggt_mv_ext.__all__) - {"reference"} == PUBLIC


PLANTED_PYTHON = [
    ("vggt_mv_ext/ops/bad.py", "import vggt_mv.models", "vggt_mv_ext knows no model"),
    ("vggt_mv_ext/bad.py", "def f():\n    from vggt_mv import heads", "vggt_mv_ext knows no model"),
    ("python/vggt_mv/layers/bad.py", "from vggt_mv_ext.reference import qk_norm_rope", "only the public names"),
    ("python/vggt_mv/layers/bad.py", "import vggt_mv_ext.backends", "only the public names"),
    ("python/vggt_mv/models/bad.py", "from vggt_mv_ext import ops", "only the public names"),
    ("python/vggt_mv/heads/bad.py", "from vggt_mv_ext import set_backend", "the model knows no backend"),
    ("python/vggt_mv/scene/bad.py", "from ..cli import main", "nothing imports the command line"),
    ("python/vggt_mv/scene/bad.py", "from .. import cli", "nothing imports the command line"),
    ("python/vggt_mv/weights/bad.py", "import typer", "library belongs to cli"),
]


@pytest.mark.parametrize(("path", "code", "reason"), PLANTED_PYTHON, ids=[code for _, code, _ in PLANTED_PYTHON])
def test_a_planted_import_is_found(tmp_path: Path, path: str, code: str, reason: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (violation,) = python_violations(tmp_path)
    assert violation.startswith(f"{path}:") and reason in violation


PLANTED_CPP = [
    ("csrc/core/bad.h", '#include "cpu/isa.h"', "core may not know cpu"),
    ("csrc/core/bad.h", "#include <cuda_runtime.h>", "core knows the C++ standard library alone"),
    ("csrc/cpu/bad.cpp", '#include "cuda/residual_scale_norm.h"', "cpu may not know cuda"),
    ("csrc/cpu/bad.h", "#  include <pybind11/pybind11.h>", "only bindings.cpp knows Python"),
    ("csrc/cuda/arch/bad.cuh", '#include "cpu/isa.h"', "cuda may not know cpu"),
    ("csrc/cuda/bad.cu", "#include <torch/extension.h>", "no PyTorch headers"),
    ("csrc/bindings.cpp", "#include <ATen/ATen.h>", "no PyTorch headers"),
]


@pytest.mark.parametrize(("path", "code", "reason"), PLANTED_CPP, ids=[code for _, code, _ in PLANTED_CPP])
def test_a_planted_include_is_found(tmp_path: Path, path: str, code: str, reason: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code + "\n#include <vector>\n")
    (violation,) = include_violations(tmp_path)
    assert violation.startswith(f"{path}:") and reason in violation


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("python/vggt_mv/layers/good.py", "from vggt_mv_ext import qk_norm_rope\nfrom . import block\nimport torch"),
        ("python/vggt_mv/cli/good.py", "import typer\nfrom vggt_mv_ext import backend, explain\nfrom ..scene import x"),
        ("vggt_mv_ext/ops/good.py", "from .. import reference\nfrom ..backends import choose"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, path: str, code: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert python_violations(tmp_path) == []
