"""All commands of `vggt-mv`."""

from __future__ import annotations

import typer

from vggt_mv.cli.demo import demo
from vggt_mv.cli.info import info
from vggt_mv.cli.reconstruct import reconstruct
from vggt_mv.cli.weights import weights

app = typer.Typer(
    help="Cameras, depth and points of scenes seen by several cameras over time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into a bug report
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(reconstruct)
app.command()(demo)
app.command()(info)

app.add_typer(weights, name="weights")
