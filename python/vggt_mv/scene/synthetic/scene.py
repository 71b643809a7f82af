"""synthetic_scene: T times x N views of a small world, with everything that a reconstruction tries to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggt_mv.errors import SceneError
from vggt_mv.scene.sources import Scene
from vggt_mv.scene.synthetic.arrays import Arrays, Backend, Vector
from vggt_mv.scene.synthetic.raycast import Placed, cast, colors
from vggt_mv.scene.synthetic.world import MAX_MOVING, Actor, make_actors, make_cameras

Floats = NDArray[np.float64]
# Relative; hits are exact to about 1e-12.
_DEPTH_TOLERANCE = 1e-6
# Metres; no surface comes nearer to a camera.
_NEAR = 1e-3


@dataclass(frozen=True)
class SyntheticScene:
    """T times x N views and their ground truth, NumPy arrays or torch tensors as ``synthetic_scene`` was asked.

    World: metres, z up, floor at z = 0. Cameras: OpenCV (x right, y down, z forward), ``X_camera = R X_world + t``.
    Pixels: whole numbers are pixel centres; the principal point is (W/2, H/2), as ``vggt_mv.utils.pose_enc`` has it.
    Floats are float32.

    Attributes:
        images: [T, N, 3, H, W] in [0, 1], RGB.
        depth: [T, N, H, W], z in the camera at each pixel's centre; every pixel sees something.
        moving_mask: [T, N, H, W] bool, True on bodies that move (not on their shadows).
        object_ids: [T, N, H, W] int64, index into ``object_names``; 0 is the room.
        world_points: [T, N, H, W, 3], what each pixel sees.
        extrinsics: [T, N, 3, 4], camera from world.
        intrinsics: [T, N, 3, 3].
        object_poses: [T, K, 4, 4], world from body, of the K entries of ``object_names``; identity for the room.
        tracks: [T, N, M, 2], pixels (x, y) of M surface points that move with their bodies; also outside of the image,
            NaN behind the camera. ``tracks[0, 0]`` are whole pixels: the query points.
        visibility: [T, N, M] bool, True where the point is in the image and nothing hides it.
        points3d: [T, M, 3], the points in the world.
        track_objects: [M] int64, index into ``object_names``.
        times: [T] seconds.
        object_names: names of the K things in the world, the room first.
        object_moving: which of them move.
        seed: what it was made from.
    """

    images: Any
    depth: Any
    moving_mask: Any
    object_ids: Any
    world_points: Any
    extrinsics: Any
    intrinsics: Any
    object_poses: Any
    tracks: Any
    visibility: Any
    points3d: Any
    track_objects: Any
    times: Any
    object_names: list[str]
    object_moving: list[bool]
    seed: int

    @property
    def num_times(self) -> int:
        return int(self.images.shape[0])

    @property
    def num_views(self) -> int:
        return int(self.images.shape[1])

    @property
    def query_points(self) -> Any:
        """[M, 2]: the tracks in the first view at the first time, pixels (x, y)."""
        return self.tracks[0, 0]

    def to_scene(self) -> Scene:
        """The images as ``reconstruct`` and ``preprocess`` take them."""
        return Scene.from_tensor(self.images, allow_single=True)

    def save(
        self, folder: str | Path, *, overwrite: bool = False, on_frame: Callable[[int, int], None] | None = None
    ) -> Path:
        """Write images, masks, cameras and ground truth; see ``vggt_mv.scene.synthetic.files``.

        Args:
            folder: new or empty, unless ``overwrite`` and it holds an earlier synthetic scene and nothing else.
            on_frame: called with (images written, images in all).

        Raises:
            VggtMvError: a folder that is not empty, or cannot be written. Nothing is left half written.
        """
        from vggt_mv.scene.synthetic.files import save_synthetic_scene

        return save_synthetic_scene(self, folder, overwrite=overwrite, on_frame=on_frame)


def synthetic_scene(
    num_times: int = 3,
    num_views: int = 4,
    height: int = 126,
    width: int = 168,
    seed: int = 0,
    num_moving: int = 3,
    *,
    moving_cameras: bool = False,
    num_tracks: int = 64,
    antialias: int = 2,
    field_of_view: float = 64.0,
    seconds_per_time: float = 0.4,
    backend: Backend = "numpy",
    device: str = "cpu",
    on_frame: Callable[[int, int], None] | None = None,
) -> SyntheticScene:
    """Ray-cast a room with standing and moving bodies, seen by a rig of cameras.

    Args:
        num_times: T time steps.
        num_views: N cameras around the middle of the room, static unless ``moving_cameras``.
        height, width: of the images, any size.
        seed: bodies, colours, paths and cameras follow from it. More times continue the same film.
        num_moving: bodies that move, 0 to 12; five more stand still.
        moving_cameras: every camera swings a little around the scene.
        num_tracks: M surface points to track, half of them on moving bodies where the first view sees any.
        antialias: colours are the mean of ``antialias**2`` rays per pixel; depth, masks and points belong to the
            pixel's centre.
        field_of_view: horizontal, degrees.
        seconds_per_time: time between steps; bodies go to and fro in four seconds.
        backend: "numpy" or "torch": who computes, and what the arrays are. Same numbers.
        device: of torch.
        on_frame: called with (images done, images in all).

    Raises:
        SceneError: an argument out of its range.

    Example:
        >>> scene = synthetic_scene(num_times=2, num_views=3, height=28, width=42)
        >>> scene.images.shape, scene.depth.shape
        ((2, 3, 3, 28, 42), (2, 3, 28, 42))
        >>> scene.object_names
        ['room', 'table', 'ball', 'globe', 'pillar', 'crate', 'roller1', 'slider1', 'bouncer1']
    """
    _check_counts(num_times=num_times, num_views=num_views, height=height, width=width, antialias=antialias)
    _check_ranges(seed, num_moving, num_tracks, height * width, field_of_view, backend)
    arrays = Arrays(backend, device)
    times: Floats = np.arange(num_times, dtype=np.float64) * seconds_per_time
    actors = make_actors(seed, num_moving)
    rotations, positions = make_cameras(seed, num_views, times, moving_cameras)
    focal = width / 2 / np.tan(np.radians(field_of_view) / 2)
    lens = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    rig = _Rig(rotations, positions, lens, height, width)
    images, depth, ids, world_points = _render_all(arrays, actors, times, rig, antialias, on_frame)
    poses = _object_poses(actors, times)
    moving = np.array([False, *(actor.body.moving for actor in actors)])
    pixels, owners = _choose_tracks(seed, arrays.numpy(ids[0, 0]), moving, num_tracks)
    points3d = _move_with(poses, owners, arrays.numpy(world_points[0, 0])[pixels[:, 1], pixels[:, 0]])
    tracks, visibility = _track(arrays, actors, times, rig, points3d)
    single = arrays.single
    return SyntheticScene(
        images=single(images),
        depth=single(depth),
        moving_mask=arrays.array(moving)[ids],
        object_ids=ids,
        world_points=single(world_points),
        extrinsics=single(np.concatenate([rotations, -rotations @ positions[..., None]], axis=-1)),
        intrinsics=single(np.tile(lens, (num_times, num_views, 1, 1))),
        object_poses=single(poses),
        tracks=single(tracks),
        visibility=arrays.array(visibility),
        points3d=single(points3d),
        track_objects=arrays.array(owners),
        times=single(times),
        object_names=["room", *(actor.body.name for actor in actors)],
        object_moving=moving.tolist(),
        seed=seed,
    )


@dataclass(frozen=True)
class _Rig:
    """All cameras at all times: rotations [T, N, 3, 3] and positions [T, N, 3], one lens."""

    rotations: Floats
    positions: Floats
    intrinsics: Floats
    height: int
    width: int

    def origin(self, t: int, n: int) -> Vector:
        x, y, z = self.positions[t, n].tolist()
        return x, y, z

    def directions(self, arrays: Arrays, t: int, n: int, x: Floats, y: Floats) -> Vector:
        """World directions of unit depth through pixels."""
        fx, fy, cx, cy = (self.intrinsics[i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        camera = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones_like(x)], axis=-1)
        world = camera @ self.rotations[t, n]
        return arrays.array(world[:, 0]), arrays.array(world[:, 1]), arrays.array(world[:, 2])


def _render_all(
    arrays: Arrays,
    actors: Sequence[Actor],
    times: Floats,
    rig: _Rig,
    antialias: int,
    on_frame: Callable[[int, int], None] | None,
) -> tuple[Any, Any, Any, Any]:
    """Images [T,N,3,H,W], depth and ids [T,N,H,W], points [T,N,H,W,3]."""
    num_times, num_views = rig.positions.shape[:2]
    rendered: list[tuple[Any, Any, Any, Any]] = []
    for t, seconds in enumerate(times):
        placed = [actor.at(seconds) for actor in actors]
        for n in range(num_views):
            rendered.append(_render(arrays, placed, rig, t, n, antialias))
            if on_frame is not None:
                on_frame(len(rendered), num_times * num_views)
    images, depth, ids, points = (arrays.xp.stack(list(part)) for part in zip(*rendered, strict=True))
    size = (num_times, num_views, rig.height, rig.width)
    return (
        arrays.channels_first(images.reshape(*size, 3)),
        depth.reshape(size),
        ids.reshape(size),
        points.reshape(*size, 3),
    )


def _render(
    arrays: Arrays, placed: Sequence[Placed], rig: _Rig, t: int, n: int, antialias: int
) -> tuple[Any, Any, Any, Any]:
    """Colours [P, 3], depth and ids [P] and points [P, 3] of one image, rows first."""
    y, x = (part.ravel().astype(np.float64) for part in np.mgrid[: rig.height, : rig.width])
    centre = cast(arrays, placed, rig.origin(t, n), rig.directions(arrays, t, n, x, y))
    total: Any = 0.0
    steps = (np.arange(antialias) + 0.5) / antialias - 0.5
    for dy in steps:
        for dx in steps:
            rays = rig.directions(arrays, t, n, x + dx, y + dy)
            hits = centre if dx == dy == 0 else cast(arrays, placed, rig.origin(t, n), rays)
            total = total + colors(arrays, placed, hits)
    return total / float(antialias**2), centre.depth, centre.ids, arrays.stack(centre.points)


def _object_poses(actors: Sequence[Actor], times: Floats) -> Floats:
    """[T, K, 4, 4] world from body, the room first."""
    poses = np.tile(np.eye(4), (len(times), len(actors) + 1, 1, 1))
    for t, seconds in enumerate(times):
        for k, actor in enumerate(actors, start=1):
            poses[t, k, :3, :3], poses[t, k, :3, 3] = actor.pose(seconds)
    return poses


def _choose_tracks(
    seed: int, ids: NDArray[np.int64], moving: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """M different pixels (x, y) of the first image and the things they see: half on moving bodies, as far as there are
    so many."""
    rng = np.random.default_rng([seed, 3])
    order = rng.permutation(ids.size)
    on_moving = moving[ids.ravel()[order]]
    half = min(count // 2, int(on_moving.sum()))
    still = order[~on_moving][: count - half]
    chosen = np.concatenate([order[on_moving][: count - len(still)], still])
    y, x = np.divmod(chosen, ids.shape[1])
    return np.stack([x, y], axis=1), ids.ravel()[chosen]


def _move_with(poses: Floats, owners: NDArray[np.int64], points: Floats) -> Floats:
    """[T, M, 3]: points of time 0 on things, carried along by them."""
    moved = poses @ np.linalg.inv(poses[0])
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return np.asarray((moved[:, owners] @ homogeneous[:, :, None])[:, :, :3, 0])


def _track(
    arrays: Arrays, actors: Sequence[Actor], times: Floats, rig: _Rig, points3d: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Pixels [T, N, M, 2] and visibility [T, N, M] of world points: a ray cast through each tells what hides it."""
    num_times, num_views = rig.positions.shape[:2]
    tracks = np.full((num_times, num_views, points3d.shape[1], 2), np.nan)
    visibility = np.zeros(tracks.shape[:3], dtype=bool)
    for t, n in np.ndindex(num_times, num_views):
        placed = [actor.at(times[t]) for actor in actors]
        inside = (points3d[t] - rig.positions[t, n]) @ rig.rotations[t, n].T
        depth = inside[:, 2]
        front = np.flatnonzero(depth > _NEAR)
        projected = (inside[front] / depth[front, None]) @ rig.intrinsics.T
        x, y = projected[:, 0], projected[:, 1]
        hits = cast(arrays, placed, rig.origin(t, n), rig.directions(arrays, t, n, x, y))
        open_way = arrays.numpy(hits.depth) >= depth[front] * (1 - _DEPTH_TOLERANCE)
        framed = (x >= -0.5) & (x < rig.width - 0.5) & (y >= -0.5) & (y < rig.height - 0.5)
        tracks[t, n, front] = projected[:, :2]
        visibility[t, n, front] = open_way & framed
    return tracks, visibility


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise SceneError(f"synthetic_scene: {name} must be at least 1, got {value}")


def _check_ranges(seed: int, num_moving: int, num_tracks: int, pixels: int, field_of_view: float, backend: str) -> None:
    if seed < 0:
        raise SceneError(f"synthetic_scene: seed must be at least 0, got {seed}")
    if not 0 <= num_moving <= MAX_MOVING:
        raise SceneError(f"synthetic_scene: num_moving must be in [0, {MAX_MOVING}], got {num_moving}")
    if not 0 <= num_tracks <= pixels:
        raise SceneError(
            f"synthetic_scene: num_tracks must be in [0, {pixels}], the pixels of an image, got {num_tracks}"
        )
    if not 10 <= field_of_view <= 140:
        raise SceneError(f"synthetic_scene: field_of_view must be in [10, 140] degrees, got {field_of_view:g}")
    if backend not in ("numpy", "torch"):
        raise SceneError(f"synthetic_scene: backend must be 'numpy' or 'torch', got {backend!r}")
