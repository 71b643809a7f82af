"""The room around the scene: a floor of planks with a rug, four walls with panels and pictures, a ceiling."""

from __future__ import annotations

from typing import Any

from vggt_mv.scene.synthetic.arrays import Arrays, Vector, take
from vggt_mv.scene.synthetic.textures import Color, Texture, flat_color, hashed, mix, noise, shade

ROOM_HALF = 4.0
ROOM_HEIGHT = 3.0

_WOOD: Color = (0.66, 0.47, 0.30)
_WOOD_DARK: Color = (0.45, 0.29, 0.17)
_CEILING: Color = (0.86, 0.84, 0.80)
_RUG = Texture("rings", (0.62, 0.16, 0.18), (0.90, 0.80, 0.62), 0.24, 7)
_RUG_RADIUS = 1.45
_PANEL_HEIGHT = 1.0
_PLANK_WIDTH, _PLANK_LENGTH = 0.3, 1.7
# Upper wall, panels below, for +x, -x, +y, -y.
_WALLS: tuple[tuple[Color, Color], ...] = (
    ((0.80, 0.72, 0.58), (0.36, 0.46, 0.50)),
    ((0.60, 0.70, 0.74), (0.72, 0.62, 0.48)),
    ((0.74, 0.64, 0.62), (0.30, 0.40, 0.36)),
    ((0.68, 0.72, 0.60), (0.50, 0.36, 0.34)),
)
# Pictures on each wall: centre along the wall, half width, centre height, half height, what is painted.
_PICTURES: tuple[tuple[float, float, float, float, Texture], ...] = (
    (-2.3, 0.75, 1.85, 0.50, Texture("bricks", (0.75, 0.30, 0.20), (0.92, 0.88, 0.80), 0.42, 11)),
    (-0.4, 0.55, 1.85, 0.65, Texture("rings", (0.16, 0.28, 0.52), (0.93, 0.78, 0.30), 0.14, 12)),
    (1.2, 0.50, 1.90, 0.42, Texture("checker", (0.15, 0.15, 0.17), (0.92, 0.92, 0.90), 0.17, 13)),
    (2.8, 0.60, 1.80, 0.55, Texture("stripes", (0.20, 0.48, 0.40), (0.94, 0.72, 0.52), 0.15, 14)),
)
_PICTURE_FRAME: Color = (0.22, 0.16, 0.11)


def room_normal(arrays: Arrays, points: Vector) -> Vector:
    """Inward normals of points on the room's surfaces."""
    zero, one = arrays.full_like(points[0], 0.0), arrays.full_like(points[0], 1.0)
    faces = _faces(arrays, points)
    return (
        arrays.where(faces[1], one, arrays.where(faces[0], -one, zero)),
        arrays.where(faces[3], one, arrays.where(faces[2], -one, zero)),
        arrays.where(faces[4], one, arrays.where(faces[5], -one, zero)),
    )


def room_color(arrays: Arrays, points: Vector) -> Vector:
    """Colours of points on the room's surfaces."""
    result = [arrays.full_like(points[0], 0.0) for _ in range(3)]
    for face, mask in enumerate(_faces(arrays, points)):
        index = arrays.indices(mask)
        if len(index) == 0:
            continue
        x, y, z = take(points, index)
        if face < 4:
            # Left to right as seen from inside.
            along = (y, -y, -x, x)[face]
            color = _wall(arrays, face, along, z)
        elif face == 4:
            color = _floor(arrays, x, y)
        else:
            color = shade(_CEILING, 0.92 + 0.08 * noise(arrays, (x, y), 2.0, 5))
        for channel, values in zip(result, color, strict=True):
            channel[index] = values
    return result[0], result[1], result[2]


def _faces(arrays: Arrays, points: Vector) -> list[Any]:
    """Masks of +x, -x, +y, -y, floor, ceiling; each point belongs to the surface that it is nearest to."""
    x, y, z = points
    distances = [ROOM_HALF - x, ROOM_HALF + x, ROOM_HALF - y, ROOM_HALF + y, z, ROOM_HEIGHT - z]
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = arrays.minimum(nearest, distance)
    masks, taken = [], nearest < nearest
    for distance in distances:
        mask = (distance <= nearest) & ~taken
        taken = taken | mask
        masks.append(mask)
    return masks


def _floor(arrays: Arrays, x: Any, y: Any) -> Vector:
    row = arrays.floor_int(y / _PLANK_WIDTH)
    along = x + _PLANK_LENGTH * hashed(arrays, row, 0, 0, 1)
    plank = arrays.floor_int(along / _PLANK_LENGTH)
    tone = hashed(arrays, row, plank, 0, 2)
    fibre = noise(arrays, (x * 1.5 + 3.7 * arrays.floating(row), y * 26.0), 1.0, 3)
    wood = shade(mix(_WOOD_DARK, _WOOD, 0.35 + 0.65 * tone), 0.78 + 0.34 * fibre)
    across = y / _PLANK_WIDTH - arrays.floor(y / _PLANK_WIDTH)
    lengthwise = along / _PLANK_LENGTH - arrays.floor(along / _PLANK_LENGTH)
    joint = (across < 0.035) | (lengthwise < 0.008)
    wood = shade(wood, 1.0 - 0.45 * arrays.floating(joint))
    on_rug = arrays.floating(x * x + y * y < _RUG_RADIUS**2)
    return mix(wood, flat_color(arrays, _RUG, x, y), on_rug)


def _wall(arrays: Arrays, face: int, along: Any, z: Any) -> Vector:
    upper, lower = _WALLS[face]
    point = (along, z)
    plaster = 0.86 + 0.16 * noise(arrays, point, 1.7, 20 + face) + 0.08 * noise(arrays, point, 23.0, 30 + face)
    panel = along / 0.5 - arrays.floor(along / 0.5)
    groove = arrays.floating((panel < 0.05) | (panel > 0.95))
    wood_noise = noise(arrays, (along * 14.0, z * 1.5), 1.0, 40 + face)
    panels = shade(lower, (0.8 + 0.3 * wood_noise) * (1.0 - 0.4 * groove))
    color = mix(shade(upper, plaster), panels, arrays.floating(z < _PANEL_HEIGHT))
    rail = arrays.floating((arrays.abs(z - _PANEL_HEIGHT) < 0.04) | (z < 0.12))
    color = mix(color, _CEILING, 0.85 * rail)
    for number in range(len(_PICTURES)):
        centre, half_width, height, half_height, _ = _PICTURES[number]
        painted = _PICTURES[(number + face) % len(_PICTURES)][-1]
        du, dv = arrays.abs(along - centre), arrays.abs(z - height)
        framed = arrays.floating((du < half_width + 0.06) & (dv < half_height + 0.06))
        color = mix(color, _PICTURE_FRAME, framed)
        index = arrays.indices((du < half_width) & (dv < half_height))
        if len(index) == 0:
            continue
        inside = flat_color(arrays, painted, along[index] - centre, z[index] - height)
        for channel, values in zip(color, inside, strict=True):
            channel[index] = values
    return color
