"""`vggt-mv weights`: look at checkpoints, see what a load would do, convert them."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vggt_mv.cli.console import Bars, note
from vggt_mv.errors import VggtMvError

weights = typer.Typer(help="Inspect, plan and convert weights files.", no_args_is_help=True)

File = Annotated[str, typer.Argument(help="A weights file, a folder, a shard index or a hub id.", metavar="FILE")]
Unsafe = Annotated[
    bool,
    typer.Option("--unsafe-pickle", help="Run the code that the file brings. Only for files that you trust."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@weights.command()
def inspect(
    file: File,
    values: Annotated[bool, typer.Option("--values", help="Read all values and report NaN and Inf.")] = False,
    as_json: Json = False,
    unsafe_pickle: Unsafe = False,
) -> None:
    """Print what FILE is: family, wrappers, modules, dtypes."""
    from vggt_mv.weights import inspect_weights
    from vggt_mv.weights.table import summary_renderables

    console = _console()
    with console.status("reading values") if values and console.is_terminal else nullcontext():
        summary = inspect_weights(file, check_values=values, unsafe_pickle=unsafe_pickle)
    if as_json:
        print(json.dumps(asdict(summary), indent=2))
        return
    for item in summary_renderables(summary):
        console.print(item)


@weights.command()
def plan(
    file: File,
    pi3: Annotated[str | None, typer.Option(help="A Pi3 checkpoint to load first.", metavar="FILE")] = None,
    config: Annotated[
        str, typer.Option(help="The model to load into: a named configuration or a JSON file.", metavar="NAME|FILE")
    ] = "vggt_mv_1b",
    dual_stream: Annotated[bool, typer.Option("--dual-stream", help="The model has dual-stream blocks.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Restrict to a module or blocks, such as aggregator.frame_blocks.8-15; can be repeated."),
    ] = None,
    prefer: Annotated[str, typer.Option(help="Which file wins where both have a tensor.", metavar="checkpoint|pi3")] = (
        "checkpoint"
    ),
    load_encoder: Annotated[bool, typer.Option("--load-encoder", help="Take Pi3's image encoder too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail unless every tensor has its counterpart.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every tensor.")] = False,
    as_json: Json = False,
    unsafe_pickle: Unsafe = False,
) -> None:
    """Print what loading FILE would do, tensor by tensor accounted for, without loading it."""
    from vggt_mv.weights.preview import preview_load
    from vggt_mv.weights.table import renderables

    if prefer not in ("checkpoint", "pi3"):
        raise VggtMvError(f"--prefer must be checkpoint or pi3, got {prefer!r}")
    report = preview_load(
        file,
        pi3,
        config=config,
        dual_stream=dual_stream,
        only=only,
        prefer="pi3" if prefer == "pi3" else "checkpoint",
        load_encoder=load_encoder,
        unsafe_pickle=unsafe_pickle,
    ).report()
    if as_json:
        print(report.to_json())
    else:
        console = _console()
        for item in renderables(report, verbose=verbose):
            console.print(item)
    if strict:
        report.raise_unless_strict()


@weights.command()
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT.safetensors")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Convert floating-point tensors. [default: keep theirs]", metavar="|".join(_DTYPES)),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")] = False,
    unsafe_pickle: Unsafe = False,
) -> None:
    """Write FILE as one .safetensors file, without wrappers, prefixes and aliases."""
    import torch

    from vggt_mv.weights import convert_weights

    if dtype is not None and dtype not in _DTYPES:
        raise VggtMvError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    with Bars(quiet=quiet) as bars:
        summary = convert_weights(
            file,
            output,
            dtype=None if dtype is None else getattr(torch, _DTYPES[dtype]),
            overwrite=overwrite,
            unsafe_pickle=unsafe_pickle,
            progress=lambda done, total: bars("write", done // 1_000_000, max(total // 1_000_000, 1)),
        )
    note(f"{output}: {summary.family}, {summary.tensors} tensors, {summary.nbytes / 1e9:.2f} GB", quiet=quiet)


def _console() -> Console:
    """The terminal as wide as it is; 100 columns where the output goes elsewhere, so that files read alike."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=100, highlight=False)
