"""predictions.npz: every array that the model predicted, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction

DOC_KEY = "__doc__"


@dataclass(frozen=True)
class ArraySpec:
    """What an array of predictions.npz holds."""

    name: str
    axes: str
    dtype: str
    unit: str
    meaning: str


# The one list: the file's own __doc__, report.json and docs/outputs.md (a test compares) follow it.
ARRAYS: tuple[ArraySpec, ...] = (
    ArraySpec("images", "T N H W 3", "uint8", "RGB, 0-255", "images as the network saw them"),
    ArraySpec("names", "T N", "str", "-", "name of each image"),
    ArraySpec("view_names", "N", "str", "-", "name of each view (camera)"),
    ArraySpec("times", "T", "float64", "seconds", "time of each time step; only where the source has a clock (videos)"),
    ArraySpec(
        "extrinsics",
        "T N 3 4",
        "float32",
        "scene unit",
        "camera from world [R|t], OpenCV axes: X_camera = R X_world + t",
    ),
    ArraySpec("intrinsics", "T N 3 3", "float32", "network pixels", "K for the images as the network saw them"),
    ArraySpec("intrinsics_original", "T N 3 3", "float32", "original pixels", "K for the images as they were given"),
    ArraySpec("depth", "T N H W", "float32", "scene unit", "z in camera coordinates, above 0"),
    ArraySpec("depth_conf", "T N H W", "float32", "-", "confidence of depth, 1 and up"),
    ArraySpec(
        "world_points", "T N H W 3", "float32", "scene unit", "world coordinates of each pixel, from the point head"
    ),
    ArraySpec("world_points_conf", "T N H W", "float32", "-", "confidence of world_points, 1 and up"),
    ArraySpec(
        "dynamic_mask", "T N h w", "float32", "[0, 1]", "1 where the scene moves, one value per patch of 14 x 14 pixels"
    ),
    ArraySpec("given_mask", "T N H W", "float32", "[0, 1]", "the mask that was handed in, 1 where the scene moves"),
    ArraySpec("query_points", "M 2", "float32", "network pixels", "(x, y) of the tracked points in time 0, view 0"),
    ArraySpec("tracks", "T N M 2", "float32", "network pixels", "(x, y) of each tracked point in each frame"),
    ArraySpec("track_vis", "T N M", "float32", "[0, 1]", "probability that the point is visible"),
    ArraySpec("track_conf", "T N M", "float32", "[0, 1]", "confidence of the track"),
    ArraySpec("original_size", "N 2", "int64", "pixels", "(height, width) of each view's original images"),
    ArraySpec("random_weights", "", "bool", "-", "True: the weights were random, the numbers mean nothing"),
    ArraySpec("weights", "", "str", "-", "which weights"),
    ArraySpec(DOC_KEY, "", "str", "-", "this table, as text"),
)


def describe_arrays(present: set[str] | None = None) -> str:
    """The table of arrays as text, one line an array; of those in ``present`` only, if given."""
    lines = [
        "Predictions: T times x N views, H x W pixels as the network saw them, h x w patches, M tracked points.",
        "Unproject: X_world = R^T (depth * K^-1 [x, y, 1]^T - t), x and y pixel indices from 0.",
        "The scene unit is arbitrary, one for all frames.",
    ]
    for spec in ARRAYS:
        if present is None or spec.name in present:
            shape = f"[{', '.join(spec.axes.split())}]"
            lines.append(f"{spec.name} {shape} {spec.dtype}, {spec.unit}: {spec.meaning}")
    return "\n".join(lines)


def npz_arrays(reconstruction: Reconstruction) -> dict[str, NDArray[Any]]:
    """All arrays of predictions.npz by name; those that do not exist are left out."""
    from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE

    arrays: dict[str, NDArray[Any]] = {}
    for spec in ARRAYS:
        value = getattr(reconstruction, spec.name, None)
        if spec.dtype.startswith(("float32", "uint8")) and value is not None:
            arrays[spec.name] = np.asarray(value, dtype=spec.dtype)
    arrays["names"] = np.array(reconstruction.names, dtype=np.str_)
    arrays["view_names"] = np.array(reconstruction.view_names, dtype=np.str_)
    if reconstruction.times is not None:
        arrays["times"] = np.array(reconstruction.times, dtype=np.float64)
    arrays["original_size"] = np.array([t.original_size for t in reconstruction.transforms], dtype=np.int64)
    arrays["random_weights"] = np.array(reconstruction.random_weights)
    arrays["weights"] = np.array(reconstruction.weights.description, dtype=np.str_)
    text = describe_arrays({*arrays, DOC_KEY})
    if reconstruction.random_weights:
        text = f"{RANDOM_WEIGHTS_NOTE}.\n{text}"
    arrays[DOC_KEY] = np.array(text, dtype=np.str_)
    return arrays


def write_npz(reconstruction: Reconstruction, path: Path) -> None:
    """Write predictions.npz; ``numpy.load(path)["__doc__"]`` explains it. Needs no pickle to read.

    Not compressed: floats of depth maps shrink by little and take a hundred times longer.
    """
    arrays = npz_arrays(reconstruction)
    # A keyword named like one of savez' own parameters would be taken for it.
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
