"""Ray casting of boxes and spheres in a room: exact depth, points, objects and shaded colours.

Rays are ``origin + s direction`` with directions of unit depth in their camera, so that s is the depth. World axes: x,
y on the floor, z up, metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggt_mv.scene.synthetic.arrays import Arrays, Vector, add_scaled, dot, rotate, take
from vggt_mv.scene.synthetic.room import ROOM_HALF, ROOM_HEIGHT, room_color, room_normal
from vggt_mv.scene.synthetic.textures import Texture, flat_color, round_color, shade

_FAR = np.inf
_TINY = 1e-12
_LIGHT = np.array([1.3, -0.9, 2.75])
_AMBIENT = 0.55
_IN_SHADOW = 0.35
# Shadow rays start this many metres off their surface.
_LIFT = 1e-6


@dataclass(frozen=True)
class Body:
    """A box (``half`` extents) or a sphere (``half`` all equal to its radius), in its own axes around its centre."""

    name: str
    shape: str
    half: tuple[float, float, float]
    texture: Texture
    moving: bool = False

    @property
    def bounding_radius(self) -> float:
        return self.half[0] if self.shape == "sphere" else float(np.linalg.norm(self.half))


@dataclass(frozen=True)
class Placed:
    """A body somewhere: ``X_world = rotation X_local + centre``."""

    body: Body
    rotation: NDArray[np.float64]
    centre: NDArray[np.float64]

    def to_local(self, point: Vector) -> Vector:
        cx, cy, cz = self.centre.tolist()
        return rotate(self.rotation.T, (point[0] - cx, point[1] - cy, point[2] - cz))


@dataclass(frozen=True)
class Hits:
    """What P rays meet first: ``depth`` [P] float64, ``ids`` [P] (0: the room, k: body k - 1), world ``points``."""

    depth: Any
    ids: Any
    points: Vector


def cast(arrays: Arrays, bodies: Sequence[Placed], origin: Vector, directions: Vector) -> Hits:
    """Meet the room and all bodies with rays from one origin (three floats).

    Args:
        origin: three floats, inside the room and outside of all bodies.
        directions: three arrays [P].
    """
    depth = _room_exit(arrays, origin, directions)
    ids = arrays.floor_int(depth * 0.0)
    reach = dot(directions, directions)
    for number, placed in enumerate(bodies, start=1):
        index = _near(arrays, placed, origin, directions, reach)
        if len(index) == 0:
            continue
        rays = take(directions, index)
        met = _meet(arrays, placed.body, placed.to_local(origin), rotate(placed.rotation.T, rays))
        closer = met < depth[index]
        chosen = index[closer]
        depth[chosen] = met[closer]
        ids[chosen] = number
    return Hits(depth, ids, add_scaled(origin, directions, depth))


def colors(arrays: Arrays, bodies: Sequence[Placed], hits: Hits) -> Any:
    """Shaded colours ``[P, 3]`` in [0, 1]: texture x (ambient + diffuse light of one lamp, with shadows).

    Diffuse only, so that a surface point looks the same from everywhere.
    """
    result = arrays.stack([arrays.full_like(hits.depth, 0.0)] * 3)
    for number in range(len(bodies) + 1):
        index = arrays.indices(hits.ids == number)
        if len(index) == 0:
            continue
        points = take(hits.points, index)
        if number == 0:
            albedo, normal = room_color(arrays, points), room_normal(arrays, points)
        else:
            albedo, normal = _surface(arrays, bodies[number - 1], points)
        others = [placed for k, placed in enumerate(bodies, start=1) if k != number]
        lit = shade(albedo, _light(arrays, others, points, normal))
        result[index] = arrays.clip(arrays.stack(lit), 0.0, 1.0)
    return result


def _room_exit(arrays: Arrays, origin: Vector, directions: Vector) -> Any:
    """Depth at which rays from inside leave the room."""
    depth: Any = None
    for start, direction, low, high in zip(
        origin, directions, (-ROOM_HALF, -ROOM_HALF, 0.0), (ROOM_HALF, ROOM_HALF, ROOM_HEIGHT), strict=True
    ):
        safe = _not_zero(arrays, direction)
        wall = arrays.where(safe > 0, arrays.full_like(safe, high), arrays.full_like(safe, low))
        distance = (wall - start) / safe
        depth = distance if depth is None else arrays.minimum(depth, distance)
    return depth


def _meet(arrays: Arrays, body: Body, origin: Vector, directions: Vector) -> Any:
    """Depth at which rays in a body's axes enter it; infinite where they do not."""
    if body.shape == "sphere":
        a, b = dot(directions, directions), dot(origin, directions)
        c = dot(origin, origin) - body.half[0] ** 2
        discriminant = b * b - a * c
        depth = (-b - arrays.sqrt(arrays.clip(discriminant, 0.0, _FAR))) / a
        return arrays.where((discriminant > 0) & (depth > 0), depth, arrays.full_like(depth, _FAR))
    enter: Any = None
    leave: Any = None
    for start, direction, half in zip(origin, directions, body.half, strict=True):
        inverse = 1.0 / _not_zero(arrays, direction)
        one, other = (-half - start) * inverse, (half - start) * inverse
        near, far = arrays.minimum(one, other), arrays.maximum(one, other)
        enter = near if enter is None else arrays.maximum(enter, near)
        leave = far if leave is None else arrays.minimum(leave, far)
    return arrays.where((enter <= leave) & (enter > 0), enter, arrays.full_like(enter, _FAR))


def _near(arrays: Arrays, placed: Placed, origin: Vector, directions: Vector, reach: Any) -> Any:
    """Positions of the rays whose line passes through the bounding sphere."""
    cx, cy, cz = placed.centre.tolist()
    to_centre = (cx - origin[0], cy - origin[1], cz - origin[2])
    along = dot(to_centre, directions)
    squared = dot(to_centre, to_centre) - placed.body.bounding_radius**2
    if squared <= 0:
        return arrays.indices(reach > 0)
    return arrays.indices((along > 0) & (along * along > squared * reach * (1 - 1e-9)))


def _surface(arrays: Arrays, placed: Placed, points: Vector) -> tuple[Vector, Vector]:
    """Colour and outward world normal of points on a body."""
    body = placed.body
    local = placed.to_local(points)
    if body.shape == "sphere":
        radius = body.half[0]
        normal = (local[0] / radius, local[1] / radius, local[2] / radius)
        return round_color(arrays, body.texture, local, radius), rotate(placed.rotation, normal)
    scaled = [arrays.abs(coordinate) / half for coordinate, half in zip(local, body.half, strict=True)]
    on_x = (scaled[0] >= scaled[1]) & (scaled[0] >= scaled[2])
    on_y = ~on_x & (scaled[1] >= scaled[2])
    # The two coordinates along the face.
    u = arrays.where(on_x, local[1], local[0])
    v = arrays.where(on_x | on_y, local[2], local[1])
    one, zero = arrays.full_like(u, 1.0), arrays.full_like(u, 0.0)
    faces = (on_x, on_y, ~on_x & ~on_y)
    nx, ny, nz = (
        arrays.where(face, arrays.where(coordinate > 0, one, -one), zero)
        for face, coordinate in zip(faces, local, strict=True)
    )
    return flat_color(arrays, body.texture, u, v), rotate(placed.rotation, (nx, ny, nz))


def _light(arrays: Arrays, others: Sequence[Placed], points: Vector, normal: Vector) -> Any:
    """Ambient + diffuse light at points, the lamp hidden by other bodies (convex bodies hide it from themselves)."""
    lx, ly, lz = _LIGHT.tolist()
    start = add_scaled(points, normal, _LIFT)
    to_light = (lx - start[0], ly - start[1], lz - start[2])
    squared = dot(to_light, to_light)
    diffuse = arrays.clip(dot(normal, to_light) / arrays.sqrt(squared), 0.0, 1.0)
    # Nearer surfaces are a little brighter, as under a real lamp.
    diffuse = diffuse * (1.7 / (0.8 + 0.07 * squared))
    lit = arrays.full_like(squared, 1.0)
    for placed in others:
        cx, cy, cz = placed.centre.tolist()
        to_centre = (cx - start[0], cy - start[1], cz - start[2])
        along = arrays.clip(dot(to_centre, to_light) / squared, 0.0, 1.0)
        miss = add_scaled(to_centre, to_light, -along)
        index = arrays.indices((dot(miss, miss) < placed.body.bounding_radius**2) & (diffuse > 0))
        if len(index) == 0:
            continue
        rays = rotate(placed.rotation.T, take(to_light, index))
        met = _meet(arrays, placed.body, placed.to_local(take(start, index)), rays)
        lit[index[met < 1.0]] = _IN_SHADOW
    return _AMBIENT + (1.0 - _AMBIENT) * diffuse * lit


def _not_zero(arrays: Arrays, values: Any) -> Any:
    """Directions along a plane meet it very far away instead of nowhere."""
    return arrays.where(arrays.abs(values) < _TINY, arrays.full_like(values, _TINY), values)
