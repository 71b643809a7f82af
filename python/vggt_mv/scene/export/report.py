"""report.json: how a reconstruction was made, and what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vggt_mv.scene.export.folder import REPORT_FORMAT, files_under
from vggt_mv.scene.export.npz import ARRAYS, npz_arrays

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction


def weights_dict(reconstruction: Reconstruction) -> dict[str, Any]:
    """Which weights made the reconstruction; ``note`` is there for random ones only."""
    from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE

    weights = reconstruction.weights
    facts: dict[str, Any] = {
        "family": weights.family,
        "description": weights.description,
        "sources": [str(source) for source in weights.sources],
        "random": reconstruction.random_weights,
    }
    if reconstruction.random_weights:
        facts["note"] = RANDOM_WEIGHTS_NOTE
    return facts


def array_table(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What the report says of arrays, by name and shape."""
    specs = {spec.name: spec for spec in ARRAYS}
    return {
        name: {
            "shape": list(shape),
            "dtype": specs[name].dtype,
            "axes": specs[name].axes,
            "unit": specs[name].unit,
            "meaning": specs[name].meaning,
        }
        for name, shape in shapes.items()
    }


def count_non_finite(array: NDArray[Any]) -> int:
    """How many values are NaN or infinite."""
    return int(array.size - np.isfinite(array).sum())


def report_dict(
    reconstruction: Reconstruction,
    files: list[str],
    *,
    points: Mapping[str, object] | None = None,
    not_written: Mapping[str, str | None] | None = None,
    write_seconds: float | None = None,
    arrays: Mapping[str, object] | None = None,
    non_finite: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The content of report.json: what ``reconstruct`` recorded, then arrays, points and files.

    ``arrays`` (of ``array_table``) and ``non_finite`` are the reconstruction's own, unless they are given.
    """
    if arrays is None or non_finite is None:
        values = npz_arrays(reconstruction)
        arrays = array_table({name: array.shape for name, array in values.items()})
        non_finite = {name: count_non_finite(array) for name, array in values.items() if array.dtype.kind == "f"}
    seconds = dict(reconstruction.report.get("seconds", {}))
    if write_seconds is not None:
        seconds["write"] = round(write_seconds, 4)
    return {
        "format": REPORT_FORMAT,
        "version": 1,
        "weights": weights_dict(reconstruction),
        **reconstruction.report,
        "seconds": seconds,
        "arrays": dict(arrays),
        "non_finite": {name: count for name, count in non_finite.items() if count},
        "points": dict(points or {}),
        "files": files,
        "not_written": dict(not_written or {}),
    }


def write_report(
    reconstruction: Reconstruction,
    path: Path,
    *,
    points: Mapping[str, object] | None = None,
    not_written: Mapping[str, str | None] | None = None,
    write_seconds: float | None = None,
) -> None:
    """Write report.json; ``files`` lists everything in its folder, itself too (so that a later run may replace the
    folder)."""
    files = sorted({*files_under(path.parent), path.name})
    report = report_dict(reconstruction, files, points=points, not_written=not_written, write_seconds=write_seconds)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
