"""points.ply: coloured points as binary PLY, readable by trimesh, Open3D, MeshLab, CloudCompare, Blender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import PointCloud

_PLY_TYPES = {"<f4": "float", "|u1": "uchar", "<u2": "ushort", "<u4": "uint"}


def write_ply(cloud: PointCloud, path: Path, *, comments: Sequence[str] = ()) -> None:
    """Write a point cloud as little-endian binary PLY.

    Vertex properties: ``x y z`` float, ``red green blue`` uchar, ``confidence`` float (where the model predicts one),
    ``time view`` ushort. An empty cloud gives a file of no vertices.

    Args:
        comments: lines for the header; characters outside of ASCII are replaced, as the header is ASCII.
    """
    vertices = ply_vertices(cloud)
    with path.open("wb") as file:
        file.write(ply_header(vertices.dtype, len(vertices), comments))
        vertices.tofile(file)


def ply_vertices(cloud: PointCloud, *, first_time: int = 0, num_times: int = 0) -> NDArray[Any]:
    """The points as the records of a PLY file.

    Args:
        first_time: what time 0 of the cloud is called.
        num_times: in the whole file; beyond 65536 of them, ``time`` becomes uint.
    """
    columns: list[tuple[str, str]] = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    columns += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    if cloud.confidence is not None:
        columns.append(("confidence", "<f4"))
    columns += [("time", "<u2" if num_times <= 1 << 16 else "<u4"), ("view", "<u2")]
    vertices = np.empty(len(cloud), dtype=columns)
    for axis, name in enumerate("xyz"):
        vertices[name] = cloud.points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = cloud.colors[:, channel]
    if cloud.confidence is not None:
        vertices["confidence"] = cloud.confidence
    vertices["time"] = cloud.time.astype(np.int64) + first_time
    vertices["view"] = cloud.view
    return vertices


def ply_header(columns: np.dtype[Any], count: int, comments: Sequence[str]) -> bytes:
    """The header for ``count`` records of ``ply_vertices``."""
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {' '.join(comment.split())}" for comment in comments]
    lines.append(f"element vertex {count}")
    lines += [f"property {_PLY_TYPES[columns[name].str]} {name}" for name in columns.names or ()]
    lines.append("end_header\n")
    return "\n".join(lines).encode("ascii", errors="replace")


def made_by(weights: str, random: bool) -> list[str]:
    """Comments for the header: what made the file, and from which weights."""
    from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE

    comments = [
        "made by vggt_mv; world coordinates, OpenCV axes (x right, y down, z forward), arbitrary unit",
        f"weights: {weights}",
    ]
    return [*comments, RANDOM_WEIGHTS_NOTE] if random else comments
