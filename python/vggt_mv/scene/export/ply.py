"""points.ply: coloured points as binary PLY, readable by trimesh, Open3D, MeshLab, CloudCompare, Blender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import PointCloud

_PLY_TYPES = {"<f4": "float", "|u1": "uchar", "<u2": "ushort"}


def write_ply(cloud: PointCloud, path: Path, *, comments: Sequence[str] = ()) -> None:
    """Write a point cloud as little-endian binary PLY.

    Vertex properties: ``x y z`` float, ``red green blue`` uchar, ``confidence`` float (where the model predicts one),
    ``time view`` ushort. An empty cloud gives a file of no vertices.

    Args:
        comments: lines for the header; characters outside of ASCII are replaced, as the header is ASCII.
    """
    columns: list[tuple[str, str]] = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    columns += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    if cloud.confidence is not None:
        columns.append(("confidence", "<f4"))
    columns += [("time", "<u2"), ("view", "<u2")]
    vertices = np.empty(len(cloud), dtype=columns)
    for axis, name in enumerate("xyz"):
        vertices[name] = cloud.points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = cloud.colors[:, channel]
    if cloud.confidence is not None:
        vertices["confidence"] = cloud.confidence
    vertices["time"] = cloud.time
    vertices["view"] = cloud.view

    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {' '.join(comment.split())}" for comment in comments]
    lines.append(f"element vertex {len(vertices)}")
    lines += [f"property {_PLY_TYPES[vertices.dtype[name].str]} {name}" for name, _ in columns]
    lines.append("end_header\n")
    with path.open("wb") as file:
        file.write("\n".join(lines).encode("ascii", errors="replace"))
        vertices.tofile(file)
