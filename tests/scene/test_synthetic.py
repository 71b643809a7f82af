"""The synthetic world: its ground truth against geometry computed in other ways."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vggt_mv.scene import SceneError, preprocess, synthetic_scene
from vggt_mv.scene.synthetic import SyntheticScene
from vggt_mv.scene.synthetic.arrays import Arrays
from vggt_mv.scene.synthetic.raycast import Body, Placed, cast
from vggt_mv.scene.synthetic.room import ROOM_HALF, ROOM_HEIGHT
from vggt_mv.scene.synthetic.textures import Texture
from vggt_mv.scene.synthetic.world import make_actors, make_cameras, rotation_about
from vggt_mv.utils.geometry import unproject_depth_map_to_point_map

PLAIN = Texture("checker", (0, 0, 0), (1, 1, 1), 0.1, 1)
# float32 of metres up to ten.
SINGLE = 2e-6


@pytest.fixture(scope="module")
def scene() -> SyntheticScene:
    return synthetic_scene(num_times=3, num_views=3, height=63, width=84, seed=4, antialias=1)


def project(scene: SyntheticScene, t: int, n: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [..., 2] and depth [...] of world points [..., 3]."""
    extrinsics, intrinsics = scene.extrinsics[t, n].astype(np.float64), scene.intrinsics[t, n].astype(np.float64)
    camera = points @ extrinsics[:, :3].T + extrinsics[:, 3]
    pixels = camera @ intrinsics.T
    return pixels[..., :2] / pixels[..., 2:], camera[..., 2]


# Rays ----------------------------------------------------------------------------------------------------------------


def random_rays(count: int, seed: int) -> np.ndarray:
    """Directions about -x, through most of the room."""
    rng = np.random.default_rng(seed)
    return np.stack([-np.ones(count), rng.uniform(-0.5, 0.5, count), rng.uniform(-0.45, 0.15, count)], axis=1)


def cast_rays(bodies: list[Placed], origin: tuple[float, float, float], rays: np.ndarray) -> tuple[np.ndarray, ...]:
    hits = cast(Arrays("numpy"), bodies, origin, (rays[:, 0], rays[:, 1], rays[:, 2]))
    return hits.depth, hits.ids, np.stack(hits.points, axis=1)


def test_sphere_against_the_roots_of_its_equation() -> None:
    centre, radius, origin = np.array([0.3, -0.2, 0.9]), 0.6, (3.0, 0.2, 1.4)
    body = Placed(Body("s", "sphere", (radius,) * 3, PLAIN), rotation_about((1, 2, 3), 0.7), centre)
    rays = random_rays(2000, 0)
    depth, ids, points = cast_rays([body], origin, rays)
    assert 50 < ids.sum() < 1900
    for ray, s, hit, point in zip(rays, depth, ids, points, strict=True):
        offset = np.array(origin) - centre
        roots = np.roots([ray @ ray, 2 * ray @ offset, offset @ offset - radius**2])
        meets = np.isreal(roots).all() and (roots.real > 0).all()
        assert bool(hit) == meets
        if meets:
            assert s == pytest.approx(roots.real.min(), rel=1e-9)
            assert np.linalg.norm(point - centre) == pytest.approx(radius, rel=1e-9)


def test_box_against_its_six_planes() -> None:
    half, centre, origin = np.array([0.5, 0.3, 0.4]), np.array([0.2, 0.1, 0.8]), np.array([3.0, -0.4, 1.6])
    rotation = rotation_about((0.3, -0.2, 1), 0.9)
    rays = random_rays(2000, 1)
    depth, ids, _ = cast_rays([Placed(Body("b", "box", tuple(half), PLAIN), rotation, centre)], tuple(origin), rays)
    assert 50 < ids.sum() < 1900
    for ray, s, hit in zip(rays, depth, ids, strict=True):
        crossings = []
        for axis, side in itertools.product(range(3), (-1, 1)):
            normal = rotation[:, axis] * side
            at = (normal @ centre + half[axis] - normal @ origin) / (normal @ ray)
            inside = np.delete(rotation.T @ (origin + at * ray - centre), axis)
            if at > 0 and (np.abs(inside) <= np.delete(half, axis)).all():
                crossings.append(at)
        assert bool(hit) == bool(crossings)
        if crossings:
            assert s == pytest.approx(min(crossings), rel=1e-9)


def test_room_is_closed() -> None:
    rng = np.random.default_rng(2)
    rays = rng.normal(size=(3000, 3))
    rays[:6] = np.concatenate([np.eye(3), -np.eye(3)])
    depth, ids, points = cast_rays([], (0.5, -1.0, 1.2), rays)
    assert (ids == 0).all()
    assert np.isfinite(depth).all()
    assert (depth > 0).all()
    walls = np.concatenate([ROOM_HALF - np.abs(points[:, :2]), points[:, 2:], ROOM_HEIGHT - points[:, 2:]], axis=1)
    assert np.abs(walls.min(axis=1)).max() < 1e-9
    assert points[0] == pytest.approx([ROOM_HALF, -1.0, 1.2])


def test_nothing_lies_before_what_a_pixel_sees(scene: SyntheticScene) -> None:
    """Steps along each ray stay outside of all bodies: asked of their inside, not of their intersections."""
    rng = np.random.default_rng(0)
    for t in range(3):
        bodies = [actor.at(float(scene.times[t])) for actor in make_actors(4, 3)]
        for n in range(3):
            extrinsics = scene.extrinsics[t, n].astype(np.float64)
            origin = -extrinsics[:, :3].T @ extrinsics[:, 3]
            y, x = rng.integers(0, 63, 400), rng.integers(0, 84, 400)
            seen = scene.world_points[t, n, y, x].astype(np.float64)
            for share in np.linspace(0.05, 0.995, 120):
                on_the_way = origin + share * (seen - origin)
                for body in bodies:
                    local = (on_the_way - body.centre) @ body.rotation
                    if body.body.shape == "sphere":
                        inside = np.linalg.norm(local, axis=1) < body.body.half[0] - 1e-4
                    else:
                        inside = (np.abs(local) < np.array(body.body.half) - 1e-4).all(axis=1)
                    assert not inside.any()


# Maps ----------------------------------------------------------------------------------------------------------------


def test_shapes_and_types(scene: SyntheticScene) -> None:
    assert scene.images.shape == (3, 3, 3, 63, 84)
    assert scene.depth.shape == scene.moving_mask.shape == scene.object_ids.shape == (3, 3, 63, 84)
    assert scene.world_points.shape == (3, 3, 63, 84, 3)
    assert (scene.extrinsics.shape, scene.intrinsics.shape) == ((3, 3, 3, 4), (3, 3, 3, 3))
    assert scene.object_poses.shape == (3, len(scene.object_names), 4, 4)
    assert scene.tracks.shape == (3, 3, 64, 2)
    assert (scene.visibility.shape, scene.points3d.shape, scene.query_points.shape) == ((3, 3, 64), (3, 64, 3), (64, 2))
    for name in ("images", "depth", "world_points", "extrinsics", "intrinsics", "tracks", "points3d", "times"):
        assert getattr(scene, name).dtype == np.float32, name
    assert scene.moving_mask.dtype == scene.visibility.dtype == np.bool_
    assert scene.object_ids.dtype == scene.track_objects.dtype == np.int64
    assert 0 <= scene.images.min() < scene.images.max() <= 1
    # A picture, not a patch of colour: every view has contrast.
    assert scene.images.std(axis=(3, 4)).min() > 0.1


def test_depth_and_cameras_unproject_to_the_world_points(scene: SyntheticScene) -> None:
    points = unproject_depth_map_to_point_map(
        scene.depth.reshape(9, 63, 84, 1), scene.extrinsics.reshape(9, 3, 4), scene.intrinsics.reshape(9, 3, 3)
    )
    assert np.abs(points.reshape(scene.world_points.shape) - scene.world_points).max() < 10 * SINGLE


def test_cameras_are_rigid_and_look_at_the_middle(scene: SyntheticScene) -> None:
    rotation = scene.extrinsics[..., :3].astype(np.float64)
    assert np.allclose(rotation @ rotation.swapaxes(-1, -2), np.eye(3), atol=1e-6)
    assert np.allclose(np.linalg.det(rotation), 1, atol=1e-6)
    for t, n in np.ndindex(3, 3):
        (x, y), depth = project(scene, t, n, np.array([0.0, 0.0, 0.5]))
        assert depth > 2
        assert abs(x - 42) < 8
        assert abs(y - 31.5) < 8
    # Down in the image is down in the world.
    assert (rotation[..., 1, 2] < 0).all()


def test_points_lie_on_the_things_that_the_ids_name(scene: SyntheticScene) -> None:
    actors = make_actors(4, 3)
    assert scene.object_names == ["room", *(actor.body.name for actor in actors)]
    for k, actor in enumerate(actors, start=1):
        t, n, y, x = np.nonzero(scene.object_ids == k)
        assert len(t) > 0, actor.body.name
        poses = scene.object_poses[t, k].astype(np.float64)
        offset = scene.world_points[t, n, y, x] - poses[:, :3, 3]
        local = (offset[:, None, :] @ poses[:, :3, :3])[:, 0]
        if actor.body.shape == "sphere":
            surface = np.linalg.norm(local, axis=1) / actor.body.half[0]
        else:
            surface = (np.abs(local) / actor.body.half).max(axis=1)
        assert np.abs(surface - 1).max() < 1e-5


def test_views_agree_where_they_see_the_same(scene: SyntheticScene) -> None:
    """Unproject by depth, project into another view: depth and colour agree where nothing is in the way."""
    shuffled = np.random.default_rng(0)
    for t in range(3):
        for a, b in itertools.permutations(range(3), 2):
            pixels, depth = project(scene, t, b, scene.world_points[t, a].astype(np.float64))
            x, y = (np.round(pixels[..., i]).astype(int) for i in (0, 1))
            inside = (depth > 0) & (x >= 1) & (x < 83) & (y >= 1) & (y < 62)
            other = scene.depth[t, b][y.clip(0, 62), x.clip(0, 83)]
            same = inside & (np.abs(depth - other) < 0.01 * depth)
            assert same.sum() > 400
            mine = scene.images[t, a][:, same]
            theirs = scene.images[t, b][:, y[same], x[same]]
            difference = np.abs(mine - theirs).mean(axis=0)
            control = np.abs(mine - shuffled.permutation(theirs, axis=1)).mean(axis=0)
            # Nearest neighbours differ at the edges of patterns, not elsewhere.
            assert np.median(difference) < 0.035
            assert np.median(difference) < 0.25 * np.median(control)
            # Some points are hidden from the other view; none lies before all that it sees there and around there.
            steps = itertools.product((-1, 0, 1), repeat=2)
            nearest = np.min([scene.depth[t, b][(y + i).clip(0, 62), (x + j).clip(0, 83)] for i, j in steps], axis=0)
            assert (inside & (depth > 1.05 * other)).sum() > 10
            assert not (inside & (depth < 0.97 * nearest)).any()


def test_masks_mark_exactly_what_moves(scene: SyntheticScene) -> None:
    moving = np.array(scene.object_moving)
    assert [name for name, moves in zip(scene.object_names, moving, strict=True) if moves] == [
        "roller1",
        "slider1",
        "bouncer1",
    ]
    assert np.array_equal(scene.moving_mask, moving[scene.object_ids])
    assert scene.moving_mask.any(axis=(2, 3)).sum() >= 6
    # The cameras stand still: whatever the geometry of a pixel does is the doing of a body in the mask.
    for t in (0, 1):
        changed = np.abs(scene.depth[t + 1] - scene.depth[t]) > SINGLE
        masked = scene.moving_mask[t + 1] | scene.moving_mask[t]
        assert not (changed & ~masked).any()
        assert changed.any()
    for k, moves in enumerate(moving):
        travelled = np.abs(np.diff(scene.object_poses[:, k], axis=0)).max(axis=(1, 2))
        assert (travelled > 0.02).all() if moves else (travelled == 0).all()


def test_poses_are_rigid(scene: SyntheticScene) -> None:
    rotation = scene.object_poses[..., :3, :3].astype(np.float64)
    assert np.allclose(rotation @ rotation.swapaxes(-1, -2), np.eye(3), atol=1e-6)
    assert np.allclose(np.linalg.det(rotation), 1, atol=1e-6)
    assert np.array_equal(scene.object_poses[:, 0], np.tile(np.eye(4), (3, 1, 1)))


# Tracks --------------------------------------------------------------------------------------------------------------


def test_tracks_start_at_pixels_of_the_first_view(scene: SyntheticScene) -> None:
    query = scene.query_points
    x, y = query.round().astype(int).T
    assert np.abs(query - query.round()).max() < 1e-4
    assert len({*zip(x.tolist(), y.tolist(), strict=True)}) == 64
    assert np.array_equal(scene.object_ids[0, 0, y, x], scene.track_objects)
    assert np.abs(scene.world_points[0, 0, y, x] - scene.points3d[0]).max() < SINGLE
    assert scene.visibility[0, 0].all()
    moving = np.array(scene.object_moving)[scene.track_objects]
    assert moving.sum() == 32


def test_tracks_stay_on_their_things(scene: SyntheticScene) -> None:
    poses = scene.object_poses[:, scene.track_objects].astype(np.float64)
    offset = scene.points3d - poses[..., :3, 3]
    local = (offset[..., None, :] @ poses[..., :3, :3])[..., 0, :]
    assert np.abs(local - local[:1]).max() < 10 * SINGLE
    moving = np.array(scene.object_moving)[scene.track_objects]
    travelled = np.linalg.norm(scene.points3d[1:] - scene.points3d[:-1], axis=-1)
    assert (travelled[:, ~moving] == 0).all()
    assert travelled[:, moving].min() > 0.01


def test_tracks_are_the_projections_of_their_points(scene: SyntheticScene) -> None:
    for t, n in np.ndindex(3, 3):
        pixels, depth = project(scene, t, n, scene.points3d[t].astype(np.float64))
        front = depth > 1e-2
        assert np.abs(pixels[front] - scene.tracks[t, n, front]).max() < 2e-3
        assert np.isnan(scene.tracks[t, n, depth < 0]).all()


def test_visibility_agrees_with_the_depth_maps(scene: SyntheticScene) -> None:
    """Around a visible point some pixel sees its surface; around a hidden one all pixels see something nearer."""
    seen = hidden = 0
    for t, n in np.ndindex(3, 3):
        _, depth = project(scene, t, n, scene.points3d[t].astype(np.float64))
        x, y = scene.tracks[t, n].T
        for m in range(64):
            framed = -0.5 <= x[m] < 83.5 and -0.5 <= y[m] < 62.5 and depth[m] > 0
            if not framed:
                assert not scene.visibility[t, n, m]
                continue
            rows = slice(max(0, int(np.floor(y[m]))), int(np.floor(y[m])) + 2)
            columns = slice(max(0, int(np.floor(x[m]))), int(np.floor(x[m])) + 2)
            around = scene.depth[t, n, rows, columns]
            if scene.visibility[t, n, m]:
                assert scene.track_objects[m] in scene.object_ids[t, n, rows, columns]
                assert around.max() > depth[m] * 0.97
                seen += 1
            elif (around < depth[m] * 0.97).all():
                hidden += 1
    assert seen > 200
    assert hidden > 15


def test_points_behind_a_camera_have_no_pixel() -> None:
    """A full circle of cameras: what the first sees at its side of the room is behind others."""
    scene = synthetic_scene(num_times=1, num_views=12, height=28, width=42, antialias=1, field_of_view=110)
    behind = np.isnan(scene.tracks).any(axis=-1)
    assert behind.any()
    assert not scene.visibility[behind].any()


# Sameness ------------------------------------------------------------------------------------------------------------

ARRAYS = [
    "images",
    "depth",
    "moving_mask",
    "object_ids",
    "world_points",
    "extrinsics",
    "intrinsics",
    "object_poses",
    "tracks",
    "visibility",
    "points3d",
    "track_objects",
    "times",
]


def test_a_seed_is_a_scene() -> None:
    def make(seed: int) -> SyntheticScene:
        return synthetic_scene(2, 2, 28, 42, seed=seed, antialias=1, num_tracks=8)

    one, same, other = make(7), make(7), make(8)
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(same, name), equal_nan=name == "tracks"), name
    assert np.abs(one.images - other.images).mean() > 0.05
    assert np.abs(one.extrinsics - other.extrinsics).max() > 0.01
    assert np.abs(one.object_poses - other.object_poses).max() > 0.01


def test_more_times_continue_the_film() -> None:
    short = synthetic_scene(1, 2, 28, 42, antialias=1, moving_cameras=True)
    long = synthetic_scene(3, 2, 28, 42, antialias=1, moving_cameras=True)
    assert np.array_equal(short.images[0], long.images[0])
    assert np.array_equal(short.tracks[0], long.tracks[0], equal_nan=True)


@pytest.mark.parametrize("antialias", [1, 2])
def test_torch_gives_the_numbers_of_numpy(antialias: int) -> None:
    options = {"num_times": 2, "num_views": 2, "height": 35, "width": 49, "seed": 3, "antialias": antialias}
    with_numpy = synthetic_scene(**options, backend="numpy", num_moving=4)
    with_torch = synthetic_scene(**options, backend="torch", num_moving=4)
    for name in ARRAYS:
        tensor = getattr(with_torch, name)
        assert isinstance(tensor, torch.Tensor), name
        assert np.array_equal(tensor.numpy(), getattr(with_numpy, name), equal_nan=name == "tracks"), name
    assert with_torch.object_names == with_numpy.object_names


def test_antialiasing_changes_colours_only(scene: SyntheticScene) -> None:
    smooth = synthetic_scene(num_times=3, num_views=3, height=63, width=84, seed=4, antialias=3)
    for name in ARRAYS[1:]:
        assert np.array_equal(getattr(smooth, name), getattr(scene, name), equal_nan=True), name
    assert 0.001 < np.abs(smooth.images - scene.images).mean() < 0.08
    # Fewer hard edges.
    assert np.abs(np.diff(smooth.images)).mean() < 0.95 * np.abs(np.diff(scene.images)).mean()


def test_cameras_move_when_asked(scene: SyntheticScene) -> None:
    assert np.array_equal(scene.extrinsics[0], scene.extrinsics[2])
    moving = synthetic_scene(3, 2, 28, 42, antialias=1, moving_cameras=True, num_moving=0)
    assert np.abs(moving.extrinsics[0] - moving.extrinsics[1]).max(axis=(1, 2)).min() > 1e-3
    points = unproject_depth_map_to_point_map(moving.depth[1, ..., None], moving.extrinsics[1], moving.intrinsics[1])
    assert np.abs(points - moving.world_points[1]).max() < 10 * SINGLE


def test_without_movers_time_stands_still() -> None:
    still = synthetic_scene(2, 2, 28, 42, antialias=1, num_moving=0)
    assert not still.moving_mask.any()
    assert np.array_equal(still.images[0], still.images[1])
    assert not any(still.object_moving)


@pytest.mark.parametrize("num_moving", [1, 2, 3, 7, 12])
def test_bodies_never_touch_and_cameras_stay_outside(num_moving: int) -> None:
    """Upright boxes and spheres do not overlap if their shadows at noon do not, or one is wholly above the other."""
    for seed, seconds in itertools.product(range(4), np.linspace(0, 4, 21)):
        bodies = [actor.at(float(seconds)) for actor in make_actors(seed, num_moving)]
        for one, other in itertools.combinations(bodies, 2):
            if (one.body.name, other.body.name) == ("table", "ball"):
                continue
            reach = sum(
                body.body.half[0] if body.body.shape == "sphere" else float(np.hypot(*body.body.half[:2]))
                for body in (one, other)
            )
            assert np.linalg.norm(one.centre[:2] - other.centre[:2]) > reach, (one.body.name, other.body.name, seed)
        _, positions = make_cameras(seed, 12, np.array([seconds]), moving=True)
        for body in bodies:
            assert np.linalg.norm(positions - body.centre, axis=-1).min() > body.body.bounding_radius + 0.3
        assert np.abs(positions[..., :2]).max() < ROOM_HALF - 0.2
        assert max(float(body.centre[2] + body.body.half[2]) for body in bodies) < ROOM_HEIGHT


def test_on_the_table_lies_the_ball() -> None:
    table, ball = (actor.at(0.0) for actor in make_actors(0, 0)[:2])
    assert ball.centre[2] - ball.body.half[0] == pytest.approx(2 * table.body.half[2])


def test_to_scene_can_be_preprocessed(scene: SyntheticScene) -> None:
    result = preprocess(scene.to_scene(), image_size=84)
    assert result.images.shape == (1, 3, 3, 3, 56, 84)


def test_progress() -> None:
    calls: list[tuple[int, int]] = []
    synthetic_scene(2, 2, 14, 14, antialias=1, num_tracks=4, on_frame=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 4) for i in range(1, 5)]


def test_one_pixel_and_no_tracks() -> None:
    scene = synthetic_scene(1, 1, 1, 1, num_tracks=0, num_moving=0)
    assert scene.images.shape == (1, 1, 3, 1, 1)
    assert scene.tracks.shape == (1, 1, 0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_times": 0}, "num_times must be at least 1, got 0"),
        ({"num_views": -1}, "num_views must be at least 1, got -1"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"antialias": 0}, "antialias must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_moving": 13}, r"num_moving must be in \[0, 12\], got 13"),
        ({"num_tracks": 21169}, r"num_tracks must be in \[0, 21168\], the pixels of an image, got 21169"),
        ({"field_of_view": 180}, r"field_of_view must be in \[10, 140\] degrees, got 180"),
        ({"backend": "jax"}, "backend must be 'numpy' or 'torch', got 'jax'"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(SceneError, match=f"^synthetic_scene: {message}$"):
        synthetic_scene(**options)
