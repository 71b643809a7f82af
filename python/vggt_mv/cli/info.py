"""`vggt-mv info`: what was built, what runs here, and why not more."""

from __future__ import annotations

import os
import platform
from typing import Annotated, Any

import typer

from vggt_mv.cli.console import load_operators


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what was built, which code runs each operator here, and why not other code."""
    load_operators()
    facts = collect()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if name == "operators":
            continue
        if not isinstance(value, dict):
            typer.echo(f"{name:<10} {value}")
            continue
        typer.echo(name)
        for key, item in value.items():
            typer.echo(f"  {key:<16} {_shown(item)}")
    for device, operators in facts["operators"].items():
        typer.echo(f"operators on {device}")
        for operator, choice in operators.items():
            typer.echo(f"  {operator:<22} {choice['backend'] or 'nothing can run it'}")
            for other, reason in choice["passed_over"].items():
                typer.echo(f"    not {other}: {reason}")


def collect() -> dict[str, Any]:
    """The facts, JSON-ready."""
    import torch

    import vggt_mv_ext
    from vggt_mv.scene.reconstruct import describe_backend

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "vggt_mv": vggt_mv_ext.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "cuda": _cuda(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch uses {torch.backends.cpu.get_cpu_capability()}",
        "linears": _linears(),
        "build": vggt_mv_ext.build_info(),
        "operators": {device: describe_backend(torch.device(device), torch.float32)["operators"] for device in devices},
    }


def _linears() -> str:
    import torch

    import vggt_mv_ext

    if vggt_mv_ext.linear_product_dtype(torch.bfloat16) == torch.float32:
        return "on the CPU bfloat16 is multiplied in float32: nothing here multiplies bfloat16 faster"
    return "on the CPU bfloat16 is multiplied as it is"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch was built for CUDA {torch.version.cuda}, but sees no GPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (torch built for CUDA {torch.version.cuda})"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
