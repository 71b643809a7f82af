"""`vggt-mv reconstruct`: images or videos in, a folder of predictions out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vggt_mv.cli.console import Bars, large, load_operators, note, size
from vggt_mv.errors import VggtMvError

if TYPE_CHECKING:
    from vggt_mv.scene.export.stored import StoredReconstruction
    from vggt_mv.scene.reconstruction import Reconstruction

Weights = Annotated[
    str | None, typer.Option(help="Weights: a file, a folder, a shard index or a hub id.", metavar="PATH")
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Run without (all) weights. The numbers mean nothing; all files say so."),
]
Config = Annotated[
    str | None,
    typer.Option(help="A named configuration or a JSON file (default: what the weights are for).", metavar="NAME|FILE"),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights.", min=0)]
Dtype = Annotated[str, typer.Option(help="What matrix products compute in.", metavar="auto|float32|bfloat16|float16")]
Device = Annotated[str, typer.Option(help="Where to compute.", metavar="auto|cpu|cuda[:N]")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's choice).", min=1)]
Percentile = Annotated[
    float, typer.Option(help="Percent of the points to drop from points.ply, those of lowest confidence.", metavar="P")
]
DualStream = Annotated[
    bool,
    typer.Option(
        "--dual-stream",
        help="Cameras from a stream that looks away from what moves, geometry from one that looks at it.",
    ),
]
SparseGlobal = Annotated[
    str | None,
    typer.Option(
        help="Let all times and views exchange information after the last rounds.",
        metavar="memory_bank|landmark|block_dilated",
    ),
]
MaskDir = Annotated[
    Path | None,
    typer.Option(
        help="Masks of what moves, white on black, in folders and under names like those of the images.",
        metavar="FOLDER",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="For long recordings: see so many times at once, write to disk on the way. A run that was stopped goes on "
        "when the same command is given again.",
        metavar="T",
    ),
]
Stride = Annotated[
    int | None, typer.Option(help="Times from window to window, fewer than --window (default: half).", metavar="S")
]
NoMemoryCarry = Annotated[
    bool, typer.Option("--no-memory-carry", help="Start the memory bank anew in each window (--sparse-global).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]


def reconstruct(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="A folder of time_*/view* images, a folder of images, one folder or video per camera, or a video.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="FOLDER")],
    weights: Weights = None,
    random_weights: RandomWeights = False,
    config: Config = None,
    layout: Annotated[
        str, typer.Option("--as", help="What the images of one folder (or video) are.", metavar="auto|views|times")
    ] = "auto",
    attention: Annotated[
        str,
        typer.Option(
            help="How the frames of a grid see each other: all as one sequence (public weights), or views and times in "
            "turn. auto: what the weights learnt.",
            metavar="auto|joint|alternating",
        ),
    ] = "auto",
    max_frames: Annotated[
        int | None, typer.Option(help="Use at most this many times (or views of a folder), evenly spread.", min=1)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Width for the network, a multiple of 14 (default: the model's).")
    ] = None,
    preprocess: Annotated[
        str, typer.Option(help="Fit the width and crop tall images, or pad to a square.", metavar="crop|pad")
    ] = "crop",
    dual_stream: DualStream = False,
    sparse_global: SparseGlobal = None,
    mask_dir: MaskDir = None,
    window: Window = None,
    stride: Stride = None,
    no_memory_carry: NoMemoryCarry = False,
    conf_percentile: Percentile = 50.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    allow_single: Annotated[bool, typer.Option("--allow-single", help="Accept a single image.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output in FOLDER.")] = False,
    quiet: Quiet = False,
) -> None:
    """Reconstruct cameras, depth and points of a scene."""
    load_operators()
    from vggt_mv.models.configs import load_config
    from vggt_mv.scene.export import output_folder, write_outputs
    from vggt_mv.scene.load_model import choose_config, load_model, with_options
    from vggt_mv.scene.masks import find_masks
    from vggt_mv.scene.preprocess import plan_transforms
    from vggt_mv.scene.reconstruct import check_attention, reconstruct, resolve_device, resolve_dtype
    from vggt_mv.scene.reconstruction import check_percentile
    from vggt_mv.scene.sources import open_scene
    from vggt_mv.scene.windows import plan_windows, reconstruct_to_folder

    refuse_no_weights(weights, random_weights)
    refuse_output_around_inputs(inputs, output)
    check_attention(attention)
    check_percentile(conf_percentile)
    place = resolve_device(device)
    resolve_dtype(dtype, place)
    set_threads(threads)
    # Checked by those they are for, one by one, whatever their type here.
    how: Any = {"layout": layout, "attention": attention, "dtype": dtype, "preprocess": preprocess}
    in_windows = window is not None
    if not in_windows and (stride is not None or no_memory_carry):
        raise VggtMvError(
            f"{'--stride' if stride is not None else '--no-memory-carry'} is for --window; give that, too"
        )
    place_to_write: Any = going_on(output, overwrite) if in_windows else output_folder(output, overwrite=overwrite)
    result: Any
    with place_to_write as staging, Bars(quiet=quiet) as bars:
        # All that can be wrong is looked at before the model is loaded, which takes longer than most mistakes.
        chosen = choose_config(weights, config)
        options = model_options(dual_stream, sparse_global)
        image_size = image_size or load_config(with_options(chosen, options))[1].get("img_size", 518)
        scene = open_scene(
            inputs,
            layout=how.pop("layout"),
            max_frames=max_frames,
            allow_single=allow_single,
            on_frame=lambda done, total: bars("check", done, total),
        )
        plan_transforms(scene, image_size=image_size, mode=how["preprocess"])
        if mask_dir is not None:
            find_masks(mask_dir, scene)
        if window is not None:
            plan_windows(scene.num_times, window, stride)
        with bars.busy("loading model"):
            model = load_model(
                weights,
                config=chosen,
                options=options,
                random_weights=random_weights,
                seed=seed,
                device=place,
                progress=bars.loading,
            )
        if place.type == "cpu" and weights is not None:
            with bars.busy("packing weights"):  # in place of the plain ones, whose memory the file stands for
                model.optimize_for_inference(resolve_dtype(dtype, place))
        how |= {"image_size": image_size, "dynamic_mask": mask_dir, "progress": bars}
        named = chosen if isinstance(chosen, dict) else str(chosen)
        if window is not None:
            result = reconstruct_to_folder(
                scene,
                model,
                output,
                window=window,
                stride=stride,
                carry_memory=not no_memory_carry,
                overwrite=overwrite,
                conf_percentile=conf_percentile,
                model_config=named,
                **how,
            )
        else:
            result = reconstruct(scene, model, **how)
            result.report["model"]["config"] = named
            write_outputs(result, staging, conf_percentile=conf_percentile, progress=bars)
    summarize(result, output, quiet=quiet)


@contextlib.contextmanager
def going_on(output: Path, overwrite: bool) -> Iterator[None]:
    """Look at the output folder before anything else; where a run is stopped, say that it can go on."""
    from vggt_mv.scene.export.folder import check_target
    from vggt_mv.scene.export.resumable import partial_folder

    check_target(output.resolve(), str(output), overwrite)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if (folder := partial_folder(output)).exists():
            note(f"stopped; the same command goes on after the last whole window (what there is lies in {folder})")
        raise


def model_options(dual_stream: bool, sparse_global: str | None) -> dict[str, Any]:
    """The arguments of the model that the command line's options mean."""
    from vggt_mv.models.sparse_global import STRATEGIES

    options: dict[str, Any] = {"enable_dual_stream": True} if dual_stream else {}
    if sparse_global is not None:
        if sparse_global not in STRATEGIES:
            raise VggtMvError(f"sparse-global must be one of {', '.join(STRATEGIES)}, got {sparse_global!r}")
        options |= {"enable_sparse_global": True, "sparse_strategy": sparse_global}
    return options


def refuse_no_weights(weights: str | None, random_weights: bool) -> None:
    """Say what is missing before anything is looked at."""
    if weights is None and not random_weights:
        raise VggtMvError(
            "no weights: name a file, folder or hub id with --weights, or try the program out with --random-weights, "
            "whose numbers mean nothing"
        )


def refuse_output_around_inputs(inputs: list[str], output: Path) -> None:
    """An output folder is replaced whole: inputs inside of it would go with it."""
    for text in inputs:
        if Path(text).expanduser().resolve().is_relative_to(output.expanduser().resolve()):
            raise VggtMvError(f"input {text!r} lies inside of the output folder {str(output)!r}; choose another output")


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of this process, if a number was asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def summarize(result: Reconstruction | StoredReconstruction, output: Path, *, quiet: bool) -> None:
    """What was made, in a few lines."""
    report: dict[str, Any] = result.report
    height, width = result.network_size
    model, memory = report["model"], report["memory_bytes"]
    for line in report["input"]["notes"]:
        note(f"note: {line}", quiet=quiet)
    note(
        f"{result.num_times} time{'s' * (result.num_times > 1)} x {result.num_views} view"
        f"{'s' * (result.num_views > 1)} of {width}x{height} pixels, {model['class']} with "
        f"{large(model['parameters'])} parameters, {report['attention']['used']} attention, {report['dtype']} on "
        f"{report['device']}",
        quiet=quiet,
    )
    if windows := report.get("windows"):
        fits = [window["alignment"] for window in windows["windows"][1:]]
        worst = max((fit["median_residual"] / fit["extent"] for fit in fits), default=0.0)
        again = f" (went on after {windows['resumed_after']})" if windows["resumed_after"] else ""
        note(
            f"{windows['count']} windows of {windows['window']} times{again}, worst alignment {100 * worst:.2g} % of "
            f"the extent of its points; memory: {windows['memory']}",
            quiet=quiet,
        )
    peak = memory.get("cuda_peak_allocated") or memory["process_peak_resident"]
    note(
        f"{report['seconds']['total']:.1f} s, peak memory {'unknown' if peak is None else size(peak)}; "
        f"weights: {result.weights.description}",
        quiet=quiet,
    )
    if result.random_weights:
        from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE

        note(RANDOM_WEIGHTS_NOTE, style="bold red")
    for name, meaning in {
        "overview.png": "images and depth on one sheet",
        "points.ply": "coloured points",
        "cameras.json": "cameras by name",
        "depth": "a picture of depth per image",
        "dynamic_mask": "a picture of what moves per image",
        "predictions.npz": "all arrays",
        "predictions": "all arrays, one file each",
        "report.json": "how it was made",
    }.items():
        path = output / name
        if path.exists():
            bytes_ = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
            if not quiet:
                typer.echo(f"{path}{'/' * path.is_dir()}  ({meaning}, {size(bytes_)})")
