"""Writers of a Reconstruction, one module a format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.export.cameras import write_cameras
from vggt_mv.scene.export.depth import write_depth_previews, write_overview
from vggt_mv.scene.export.folder import output_folder
from vggt_mv.scene.export.mask import write_mask_overlays
from vggt_mv.scene.export.npz import write_npz
from vggt_mv.scene.export.ply import made_by, write_ply
from vggt_mv.scene.export.report import write_report

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import ProgressCallback, Reconstruction

__all__ = [
    "output_folder",
    "write_cameras",
    "write_depth_previews",
    "write_mask_overlays",
    "write_npz",
    "write_outputs",
    "write_overview",
    "write_ply",
    "write_report",
]


@dataclass(frozen=True)
class _Output:
    """One file or folder of the output: how to write it, or why there is nothing to write."""

    name: str
    write: Callable[[Path], None]
    missing: str | None = None
    steps: int = 1


def write_outputs(
    reconstruction: Reconstruction,
    folder: Path,
    *,
    conf_percentile: float = 50.0,
    max_points: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write every output into an existing folder; what the model did not predict is left out, and the report says so.

    Args:
        folder: an existing folder, usually the one that ``output_folder`` yields; report.json lists all files in it.
        conf_percentile, max_points: see ``Reconstruction.point_cloud``.
        progress: called with ("write", files done, files in all).

    Raises:
        VggtMvError: a file that cannot be written (disk full, for one).
    """
    points_facts: dict[str, object] = {}
    started = time.perf_counter()
    done = 0

    def advance(steps: int = 1) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress("write", done, total)

    def write_points(path: Path) -> None:
        cloud = reconstruction.point_cloud(conf_percentile, max_points)
        write_ply(cloud, path, comments=made_by(reconstruction.weights.description, reconstruction.random_weights))
        points_facts.update(count=len(cloud), conf_percentile=conf_percentile, conf_threshold=cloud.threshold)

    no_cameras = "the model has no camera head" if reconstruction.extrinsics is None else None
    no_depth = "the model has no depth head" if reconstruction.depth is None else None
    no_mask = None
    if reconstruction.dynamic_mask is None and reconstruction.given_mask is None:
        no_mask = "no mask of what moves was predicted or given"
    no_points = (no_depth or no_cameras) if reconstruction.world_points is None else None
    outputs = [
        _Output("predictions.npz", lambda path: write_npz(reconstruction, path)),
        _Output("cameras.json", lambda path: write_cameras(reconstruction, path), no_cameras),
        _Output("points.ply", write_points, no_points),
        _Output(
            "depth",
            lambda path: write_depth_previews(reconstruction, path, on_file=advance),
            no_depth,
            steps=reconstruction.num_times * reconstruction.num_views,
        ),
        _Output(
            "dynamic_mask",
            lambda path: write_mask_overlays(reconstruction, path, on_file=advance),
            no_mask,
            steps=reconstruction.num_times * reconstruction.num_views,
        ),
        _Output("overview.png", lambda path: write_overview(reconstruction, path)),
        _Output(
            "report.json",
            lambda path: write_report(
                reconstruction,
                path,
                points=points_facts,
                not_written={output.name: output.missing for output in outputs if output.missing},
                write_seconds=time.perf_counter() - started,
            ),
        ),
    ]
    total = sum(output.steps for output in outputs if output.missing is None)
    for output in outputs:
        if output.missing is not None:
            continue
        before = done
        try:
            output.write(folder / output.name)
        except OSError as error:
            raise VggtMvError(
                f"{output.name} cannot be written ({error.strerror or error}); is the disk full?"
            ) from error
        advance(output.steps - (done - before))
