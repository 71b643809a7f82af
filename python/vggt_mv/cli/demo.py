"""`vggt-mv demo`: a scene that the package makes itself, reconstructed and compared with the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vggt_mv.cli.console import Bars, load_operators, note
from vggt_mv.cli.reconstruct import (
    Config,
    Device,
    Dtype,
    Percentile,
    Quiet,
    Seed,
    Threads,
    Weights,
    set_threads,
    summarize,
)

DEMO_CONFIG = "vggt_mv_demo"
_NAMES = {
    "depth_median_relative_error": ("depth, median relative error after one scale", "{:.3f}"),
    "depth_within_25_percent": ("depth, share of pixels within 25 %", "{:.3f}"),
    "rotation_median_degrees": ("camera rotation, median error", "{:.2f} degrees"),
    "position_median_relative_error": ("camera position, median error over median distance", "{:.3f}"),
}


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="FOLDER")] = Path(
        "demo_output"
    ),
    weights: Weights = None,
    config: Config = None,
    times: Annotated[int, typer.Option(help="Time steps.", min=1)] = 3,
    views: Annotated[int, typer.Option(help="Cameras.", min=1)] = 4,
    conf_percentile: Percentile = 50.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Make a small moving scene, reconstruct it, and compare with what is true of it.

    Without weights a small untrained model runs: it shows the way from images to files, and its numbers mean nothing.
    FOLDER is replaced if it holds an earlier output.
    """
    load_operators()
    from vggt_mv.models.configs import load_config
    from vggt_mv.scene.evaluate import compare_to_truth
    from vggt_mv.scene.export import output_folder, write_outputs, write_overview
    from vggt_mv.scene.load_model import choose_config, load_model
    from vggt_mv.scene.reconstruct import reconstruct, resolve_device, resolve_dtype
    from vggt_mv.scene.reconstruction import check_percentile
    from vggt_mv.scene.sources import open_scene
    from vggt_mv.scene.synthetic import synthetic_scene
    from vggt_mv.weights import WeightsProvenance

    check_percentile(conf_percentile)
    place = resolve_device(device)
    resolve_dtype(dtype, place)
    set_threads(threads)
    with output_folder(output, overwrite=True) as staging, Bars(quiet=quiet) as bars:
        chosen = choose_config(weights, DEMO_CONFIG if weights is None and config is None else config)
        width = load_config(chosen)[1].get("img_size", 518)
        height = max(1, round(0.75 * width / 14)) * 14  # what the network takes as it is
        truth = synthetic_scene(
            times, views, height, width, seed, on_frame=lambda done, total: bars("render", done, total)
        )
        truth.save(staging / "scene")
        # From the files, as a user's own images come.
        scene = open_scene(staging / "scene")
        with bars.busy("loading model"):
            model = load_model(
                weights,
                config=chosen,
                random_weights=weights is None,
                seed=seed,
                device=place,
                progress=bars.loading,
            )
        how: Any = {"dtype": dtype}  # checked above, whatever its type here
        if model.track_head is not None:
            how["query_points"] = truth.query_points
        result = reconstruct(scene, model, image_size=width, progress=bars, **how)
        result.report["model"]["config"] = chosen if isinstance(chosen, dict) else str(chosen)
        # Its present path is a temporary one.
        result.report["input"]["source"] = str(output / "scene")
        errors = compare_to_truth(result, truth.depth, truth.extrinsics)
        result.report["ground_truth"] = {"meaningless": result.random_weights, **errors}
        as_it_is = replace(result, depth=truth.depth, weights=WeightsProvenance("unknown", "none: the truth"))
        write_overview(as_it_is, staging / "truth.png")
        write_outputs(result, staging, conf_percentile=conf_percentile, progress=bars)
    summarize(result, output, quiet=quiet)
    if not quiet:
        typer.echo(f"{output / 'truth.png'}  (the overview as it should be)")
        typer.echo(f"{output / 'scene'}/  (the scene itself; vggt-mv reconstruct takes this folder)")
        typer.echo("against the truth" + (" (RANDOM WEIGHTS: meaningless)" if result.random_weights else ""))
        for name, (meaning, form) in _NAMES.items():
            if name in errors:
                typer.echo(f"  {meaning}: {form.format(errors[name])}")
    if weights is None:
        note("a trained model does better: vggt-mv demo --weights PATH", quiet=quiet)
