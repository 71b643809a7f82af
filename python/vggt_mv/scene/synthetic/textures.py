"""Procedural colours, functions of a point on a surface alone: every camera sees a point in one colour, and moving
objects carry theirs along.

Flat surfaces are coloured by two coordinates (u, v) in metres, spheres by their local point. Everything is built from
whole-number hashes, parity and interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vggt_mv.scene.synthetic.arrays import Arrays, Vector

Color = tuple[float, float, float]

_MASK = 0x7FFFFFFF
_TABLE_SIZE = 4096
_TABLE_STRIDES = (1, 197, 1571)


@dataclass(frozen=True)
class Texture:
    """Two colours in a pattern of cells of ``size`` metres, with fine noise that gives every place its own look."""

    pattern: str
    first: Color
    second: Color
    size: float
    seed: int
    grain: float = 0.25


def hashed(arrays: Arrays, i: Any, j: Any, k: Any, seed: int) -> Any:
    """A number in [0, 1) for whole numbers i, j, k (arrays or ints); neighbours are unrelated."""
    mixed = (i * 73856093) ^ (j * 19349663) ^ (k * 83492791) ^ (seed * 2654435)
    for multiplier in (1274126177, 668265263):
        mixed = ((mixed ^ (mixed >> 15)) & _MASK) * multiplier & _MASK
    return arrays.floating((mixed ^ (mixed >> 13)) & 0xFFFFFF) / float(1 << 24)


def noise(arrays: Arrays, point: Sequence[Any], cells_per_metre: float, seed: int) -> Any:
    """Smooth value noise in [0, 1] of points of a plane (two coordinates) or of space (three).

    Its random values come from a table, the place in it from a linear form of the cell: cheap, and equal values are
    some sixteen cells apart.
    """
    table = arrays.constant("noise", lambda: np.random.default_rng(0).random(_TABLE_SIZE))
    place: Any = 7919 * seed
    weights = []
    for coordinate, stride in zip(point, _TABLE_STRIDES, strict=False):
        scaled = coordinate * cells_per_metre
        corner = arrays.floor_int(scaled)
        fraction = scaled - arrays.floating(corner)
        place = place + stride * corner
        weights.append(fraction * fraction * (3.0 - 2.0 * fraction))

    def interpolated(offset: int, axis: int) -> Any:
        if axis < 0:
            return table[(place + offset) & (_TABLE_SIZE - 1)]
        low, high = interpolated(offset, axis - 1), interpolated(offset + _TABLE_STRIDES[axis], axis - 1)
        return low + weights[axis] * (high - low)

    return interpolated(0, len(weights) - 1)


def flat_color(arrays: Arrays, texture: Texture, u: Any, v: Any) -> Vector:
    """Colour of points (u, v) of a flat surface."""
    weight = _FLAT[texture.pattern](arrays, u / texture.size, v / texture.size, texture.seed)
    return _grained(arrays, texture, weight, (u, v))


def round_color(arrays: Arrays, texture: Texture, point: Vector, radius: float) -> Vector:
    """Colour of local points of a sphere."""
    x, y, z = (coordinate / radius for coordinate in point)
    weight = _ROUND[texture.pattern](arrays, x, y, z, texture.seed)
    return _grained(arrays, texture, weight, point)


def mix(first: Color | Vector, second: Color | Vector, weight: Any) -> Vector:
    """``first`` where weight is 0, ``second`` where it is 1."""
    a, b, c = (low + weight * (high - low) for low, high in zip(first, second, strict=True))
    return a, b, c


def shade(color: Color | Vector, factor: Any) -> Vector:
    """``factor color``."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def _grained(arrays: Arrays, texture: Texture, weight: Any, point: Sequence[Any]) -> Vector:
    grain = 0.6 * noise(arrays, point, 9.0, texture.seed) + 0.4 * noise(arrays, point, 31.0, texture.seed + 1)
    return shade(mix(texture.first, texture.second, weight), 1.0 - texture.grain + 2.0 * texture.grain * grain)


def _parity(arrays: Arrays, cell: Any) -> Any:
    return arrays.floating(cell & 1)


def _checker(arrays: Arrays, u: Any, v: Any, seed: int) -> Any:
    return _parity(arrays, arrays.floor_int(u) + arrays.floor_int(v))


def _stripes(arrays: Arrays, u: Any, v: Any, seed: int) -> Any:
    return _parity(arrays, arrays.floor_int(u + (0.5 * v if seed % 2 else 0.0)))


def _dots(arrays: Arrays, u: Any, v: Any, seed: int) -> Any:
    du, dv = u - arrays.floor(u) - 0.5, v - arrays.floor(v) - 0.5
    return arrays.floating(du * du + dv * dv < 0.1)


def _bricks(arrays: Arrays, u: Any, v: Any, seed: int) -> Any:
    row = arrays.floor_int(2.0 * v)
    along = u + 0.5 * _parity(arrays, row)
    brick = arrays.floor_int(along)
    joint = (along - arrays.floor(along) < 0.06) | (2.0 * v - arrays.floor(2.0 * v) < 0.12)
    tone = 0.45 * hashed(arrays, brick, row, 0, seed)
    return arrays.where(joint, arrays.full_like(tone, 1.0), tone)


def _rings(arrays: Arrays, u: Any, v: Any, seed: int) -> Any:
    return _parity(arrays, arrays.floor_int(arrays.sqrt(u * u + v * v)))


def _ball(arrays: Arrays, x: Any, y: Any, z: Any, seed: int) -> Any:
    """Six segments from pole to pole, and caps."""
    sides = (y > 0) ^ (0.866 * x + 0.5 * y > 0) ^ (0.866 * x - 0.5 * y > 0)
    return arrays.floating(sides | (arrays.abs(z) > 0.93))


def _sphere_checker(arrays: Arrays, x: Any, y: Any, z: Any, seed: int) -> Any:
    cells = arrays.floor_int(2.5 * x + 0.3) + arrays.floor_int(2.5 * y + 0.3) + arrays.floor_int(2.5 * z + 0.3)
    return _parity(arrays, cells)


def _spots(arrays: Arrays, x: Any, y: Any, z: Any, seed: int) -> Any:
    return arrays.floating(noise(arrays, (x, y, z), 2.6, seed) > 0.56)


_FLAT: dict[str, Callable[[Arrays, Any, Any, int], Any]] = {
    "checker": _checker,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
    "rings": _rings,
}
_ROUND: dict[str, Callable[[Arrays, Any, Any, Any, int], Any]] = {
    "ball": _ball,
    "checker": _sphere_checker,
    "spots": _spots,
}
