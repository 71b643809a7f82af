"""What is in the room and how it moves, and the cameras around it: all of it a function of seed and time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vggt_mv.scene.synthetic.raycast import Body, Placed
from vggt_mv.scene.synthetic.textures import Color, Texture

MAX_MOVING = 12

_ORBIT_RADIUS = 1.72
_MOVER_RADIUS = 0.34
_PERIOD_SECONDS = 4.0
_PALETTE: tuple[tuple[Color, Color], ...] = (
    ((0.85, 0.22, 0.18), (0.97, 0.90, 0.80)),
    ((0.12, 0.38, 0.66), (0.95, 0.80, 0.30)),
    ((0.10, 0.52, 0.42), (0.93, 0.93, 0.86)),
    ((0.96, 0.58, 0.12), (0.22, 0.18, 0.34)),
    ((0.52, 0.20, 0.52), (0.95, 0.78, 0.82)),
    ((0.20, 0.22, 0.26), (0.88, 0.86, 0.82)),
    ((0.94, 0.78, 0.16), (0.24, 0.36, 0.56)),
    ((0.36, 0.62, 0.82), (0.98, 0.98, 0.95)),
)

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Actor:
    """A body and where it is: ``pose(seconds)`` gives rotation [3, 3] and centre [3], world from body."""

    body: Body
    pose: Callable[[float], Pose]

    def at(self, seconds: float) -> Placed:
        return Placed(self.body, *self.pose(seconds))


def rotation_about(axis: tuple[float, float, float], angle: float) -> NDArray[np.float64]:
    """[3, 3], by Rodrigues' formula; the axis need not have length 1."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def make_actors(seed: int, num_moving: int) -> list[Actor]:
    """Five bodies that stand still in the middle of the room, and ``num_moving`` that move around them without
    collisions."""
    rng = np.random.default_rng([seed, 1])
    pairs = [_PALETTE[i % len(_PALETTE)] for i in rng.permutation(max(len(_PALETTE), 5 + num_moving))]
    actors = _static_actors(rng, pairs[:5])
    return actors + [_mover(rng, k, num_moving, pairs[5 + k]) for k in range(num_moving)]


def make_cameras(
    seed: int, num_views: int, times: NDArray[np.float64], moving: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Camera-from-world rotations [T, N, 3, 3] and positions [T, N, 3] of a rig around the middle of the room.

    The rig's middle is on the side of +x; neighbours are 30 degrees apart, closer where a full circle would not do.
    ``moving``: every camera swings and bobs on its own, up to 8 degrees and 12 cm.
    """
    rng = np.random.default_rng([seed, 2])
    step = min(np.radians(30.0), 2 * np.pi / num_views)
    azimuths = step * (np.arange(num_views) - (num_views - 1) / 2) + rng.uniform(-0.06, 0.06, num_views)
    radii = rng.uniform(3.3, 3.55, num_views)
    heights = rng.uniform(1.35, 2.05, num_views)
    aims = np.add(rng.uniform(-0.12, 0.12, (num_views, 3)), (0, 0, 0.5))
    phases = rng.uniform(0, 2 * np.pi, num_views)
    rotations = np.empty((len(times), num_views, 3, 3))
    positions = np.empty((len(times), num_views, 3))
    for t, seconds in enumerate(times):
        for n in range(num_views):
            swing = np.sin(2 * np.pi * seconds / 5.0 + phases[n]) if moving else 0.0
            angle = azimuths[n] + np.radians(8.0) * swing
            height = heights[n] + 0.12 * swing
            positions[t, n] = radii[n] * np.cos(angle), radii[n] * np.sin(angle), height
            rotations[t, n] = _look_at(positions[t, n], aims[n])
    return rotations, positions


def _look_at(position: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Camera-from-world rotation, OpenCV axes: rows are right, down and forward in the world."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


def _static_actors(rng: np.random.Generator, pairs: list[tuple[Color, Color]]) -> list[Actor]:
    def texture(pattern: str, pair: tuple[Color, Color], size: float) -> Texture:
        return Texture(pattern, *pair, size, int(rng.integers(100, 1000)))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    table = (between(0.34, 0.40), between(0.26, 0.32), between(0.24, 0.30))
    turn = between(0, math.pi)
    ball = between(0.20, 0.26)
    # The tall one stands on the side away from the rig, the low ones to the left and right in front.
    spread = np.radians((70, 180, -70)) * rng.choice((-1, 1)) + rng.uniform(-0.3, 0.3, 3)
    around = np.stack([np.cos(spread), np.sin(spread)], axis=1) * rng.uniform(0.86, 1.0, (3, 1))
    globe = between(0.28, 0.34)
    pillar = (0.17, 0.17, between(0.55, 0.7))
    crate = (0.26, 0.22, 0.24)
    flat = [str(name) for name in rng.permutation(["checker", "bricks", "dots"])]
    placed = [
        (Body("table", "box", table, texture(flat[0], pairs[0], 0.16)), (0, 0, table[2]), turn),
        (Body("ball", "sphere", (ball,) * 3, texture("ball", pairs[1], 1)), (0.05, -0.03, 2 * table[2] + ball), turn),
        (Body("globe", "sphere", (globe,) * 3, texture("spots", pairs[2], 1)), (*around[0], globe), 1.0),
        (Body("pillar", "box", pillar, texture(flat[1], pairs[3], 0.13)), (*around[1], pillar[2]), spread[1] + 0.4),
        (Body("crate", "box", crate, texture(flat[2], pairs[4], 0.12)), (*around[2], crate[2]), spread[2] + 0.9),
    ]
    return [
        Actor(body, _standing(rotation_about((0.2 * (body.shape == "sphere"), 0, 1), angle), np.array(centre)))
        for body, centre, angle in placed
    ]


def _standing(rotation: NDArray[np.float64], centre: NDArray[np.float64]) -> Callable[[float], Pose]:
    return lambda seconds: (rotation, centre)


def _mover(rng: np.random.Generator, k: int, num_moving: int, pair: tuple[Color, Color]) -> Actor:
    """Number k of the movers, each in its own sector of the orbit: a rolling ball, a sliding box or a bouncing ball."""
    sector = min(2 * math.pi / num_moving, math.radians(95.0 if num_moving < 3 else 75.0))
    # Body and a gap must fit between the ends of the swing and the sector's.
    swing = min(0.65, max(0.0, sector / 2 - (_MOVER_RADIUS + 0.04) / _ORBIT_RADIUS))
    # Spread about the side away from the rig, where all of its cameras see them.
    middle = math.pi + (k - (num_moving - 1) / 2) * sector
    phase = float(rng.uniform(0, 2 * math.pi))
    kind = ("roller", "slider", "bouncer")[k % 3]
    number = k // 3 + 1
    seed = int(rng.integers(100, 1000))

    def along(seconds: float) -> float:
        return middle + swing * math.sin(2 * math.pi * seconds / _PERIOD_SECONDS + phase)

    def place(angle: float, height: float) -> NDArray[np.float64]:
        return np.array([_ORBIT_RADIUS * np.cos(angle), _ORBIT_RADIUS * np.sin(angle), height])

    if kind == "slider":
        half = (float(rng.uniform(0.20, 0.23)), float(rng.uniform(0.17, 0.21)), float(rng.uniform(0.20, 0.25)))

        def slide(seconds: float) -> Pose:
            turned = rotation_about((0, 0, 1), 1.1 * seconds + phase)
            return turned, place(along(seconds), half[2])

        return Actor(Body(f"slider{number}", "box", half, Texture("checker", *pair, 0.11, seed), moving=True), slide)
    radius = float(rng.uniform(0.27, 0.33))

    def roll(seconds: float) -> Pose:
        angle = along(seconds)
        # Without slipping: the turn is the way gone over the radius, about the horizontal axis across the way.
        rolled = _ORBIT_RADIUS * (angle - middle) / radius
        outward = (float(np.cos(angle)), float(np.sin(angle)), 0.0)
        return rotation_about(outward, -rolled) @ rotation_about((0, 0, 1), angle), place(angle, radius)

    def bounce(seconds: float) -> Pose:
        up = 0.9 * abs(math.sin(2 * math.pi * seconds / 1.6 + phase))
        return rotation_about((1, 0.4, 0.3), 2.2 * seconds + phase), place(along(seconds), radius + up)

    body = Body(f"{kind}{number}", "sphere", (radius,) * 3, Texture("ball", *pair, 1, seed), moving=True)
    if kind == "bouncer":
        body = Body(f"{kind}{number}", "sphere", (radius,) * 3, Texture("checker", *pair, 1, seed), moving=True)
        return Actor(body, bounce)
    return Actor(body, roll)
