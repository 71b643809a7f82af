"""The entry point itself: exit codes, help, missing dependencies, what importing costs; and vggt-mv info."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

Run = Callable[..., Any]  # see conftest.py


@pytest.fixture
def python(environment: dict[str, str]) -> Run:
    """Run code, or the arguments given, in a new process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(arguments if len(arguments) > 1 else ("-c", *arguments))]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)

    return run


@pytest.mark.parametrize(
    "command", [[], ["reconstruct"], ["demo"], ["info"], ["weights"]], ids=lambda c: "".join(c) or "all"
)
def test_help(vggt_mv: Run, command: list[str]) -> None:
    result = vggt_mv(*command, "--help")
    assert result.code == 0
    assert "Usage: vggt-mv" in result.stdout


def test_all_commands_are_listed(vggt_mv: Run) -> None:
    text = vggt_mv("--help").stdout
    for command in ("reconstruct", "demo", "info", "weights"):
        assert command in text


def test_usage_errors_are_exit_code_2(vggt_mv: Run) -> None:
    assert vggt_mv("reconstruct").code == 2
    assert vggt_mv("reconstruct", "a", "-o", "b", "--max-frames", "0").code == 2
    assert vggt_mv("nonsense").code == 2


def test_module_entry_point_and_one_line_error(python: Run) -> None:
    result = python("-m", "vggt_mv.cli", "reconstruct", "/nowhere/[bold]x", "-o", "/tmp/never", "--random-weights")
    assert result.returncode == 2
    assert result.stdout == ""
    # Brackets in names are no markup.
    assert result.stderr.startswith("vggt-mv: error: '/nowhere/[bold]x' does not exist; ")
    assert result.stderr.count("\n") == 1


def test_importing_the_package_needs_no_typer_and_no_rich(python: Run) -> None:
    modules = "vggt_mv, vggt_mv.scene.reconstruct, vggt_mv.scene.export, vggt_mv.scene.load_model, vggt_mv.cli.main"
    result = python(f"import sys, {modules}; print([m for m in ('typer', 'rich') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_help_needs_no_torch(python: Run) -> None:
    result = python("import sys; from vggt_mv.cli.main import main; main(['--help']); print('torch' in sys.modules)")
    assert result.stdout.splitlines()[-1] == "False", result.stderr


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_missing_dependency_is_one_line(python: Run, name: str) -> None:
    result = python(
        f"import sys; sys.modules[{name!r}] = None; from vggt_mv.cli.main import main; sys.exit(main(['info']))"
    )
    assert result.returncode == 2
    assert result.stderr == f"vggt-mv: error: {name} is missing; install it with: pip install typer rich\n"


def test_wrong_environment_is_one_line(python: Run, environment: dict[str, str]) -> None:
    environment["VGGT_MV_BACKEND"] = "tpu"
    result = python("-m", "vggt_mv.cli", "info")
    assert result.returncode == 2
    assert result.stderr == (
        "vggt-mv: error: environment variable VGGT_MV_BACKEND: must be one of auto, cuda, cpu, reference; got 'tpu'\n"
    )


def test_info_for_people(vggt_mv: Run) -> None:
    result = vggt_mv("info")
    assert result.code == 0
    for part in (torch.__version__, "build", "operators on cpu", "residual_scale_norm", "not cuda: "):
        assert part in result.stdout


def test_info_for_programs(vggt_mv: Run) -> None:
    import vggt_mv_ext
    from vggt_mv_ext.ops import OPERATORS

    facts = json.loads(vggt_mv("info", "--json").stdout)
    assert facts["build"] == vggt_mv_ext.build_info()
    assert facts["vggt_mv"] == vggt_mv_ext.__version__
    assert set(facts["operators"]["cpu"]) == set(OPERATORS)
    assert facts["operators"]["cpu"]["qk_norm_rope"]["backend"] in ("cpu", "reference")
    in_float32 = vggt_mv_ext.linear_product_dtype(torch.bfloat16) == torch.float32
    assert ("in float32" in facts["linears"]) == in_float32
