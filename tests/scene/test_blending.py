"""PendingFrames: weighted means over windows, frames of one window untouched, states that go on."""

from __future__ import annotations

from typing import Any

import numpy as np

from vggt_mv.scene.blending import PendingFrames
from vggt_mv.scene.evaluate import rotation_angles


def rotation(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def predictions(seed: int, times: int, views: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    frames = (times, views)
    cameras = np.stack([np.c_[rotation(t % 3, 50 * t), [t, 0, 1]] for t in range(times * views)])
    return {
        "images": rng.integers(0, 255, (*frames, 4, 5, 3), dtype=np.uint8),
        "extrinsics": cameras.reshape(*frames, 3, 4).astype(np.float32),
        "intrinsics": rng.uniform(1, 2, (*frames, 3, 3)).astype(np.float32),
        "depth": rng.uniform(1, 2, (*frames, 4, 5)).astype(np.float32),
        "depth_conf": rng.uniform(1, 5, (*frames, 4, 5)).astype(np.float32),
        "world_points": rng.normal(size=(*frames, 4, 5, 3)).astype(np.float32),
        "world_points_conf": rng.uniform(1, 5, (*frames, 4, 5)).astype(np.float32),
        "dynamic_mask": rng.uniform(0, 1, (*frames, 2, 2)).astype(np.float32),
    }


def test_frames_of_one_window_stay_to_the_last_bit() -> None:
    frames, given = PendingFrames(0), predictions(0, 3)
    frames.add(0, given)
    first, rest = frames.pop(1), frames.pop(3)
    for name, array in given.items():
        np.testing.assert_array_equal(np.concatenate([first[name], rest[name]]), array)
        assert first[name].dtype == array.dtype


def test_means_are_weighted_by_confidence() -> None:
    """Three windows over time 2, against the formula in float64."""
    parts = [predictions(seed, 3) for seed in range(3)]
    for part in parts[1:]:
        part["images"] = parts[0]["images"]
    frames = PendingFrames(0)
    for start, part in enumerate(parts):
        frames.add(start, part)
    assert (frames.start, frames.stop) == (0, 5)
    result = frames.pop(5)
    at = [(part, 2 - start) for start, part in enumerate(parts)]
    for name, weight in (("depth", "depth_conf"), ("depth_conf", "depth_conf"), ("world_points", "world_points_conf")):
        w = np.stack([part[weight][t] for part, t in at]).astype(np.float64)
        x = np.stack([part[name][t] for part, t in at]).astype(np.float64)
        w = w.reshape(*w.shape, *(1,) * (x.ndim - w.ndim))
        np.testing.assert_allclose(result[name][2], (w * x).sum(0) / w.sum(0), rtol=2e-6, atol=1e-6)
    w = np.stack([part["depth_conf"][t].mean((1, 2)) for part, t in at]).astype(np.float64)
    for name in ("intrinsics", "dynamic_mask"):
        x = np.stack([part[name][t] for part, t in at]).astype(np.float64)
        np.testing.assert_allclose(
            result[name][2], np.einsum("kn,kn...->n...", w, x) / w.sum(0)[:, None, None], rtol=2e-6
        )
    np.testing.assert_array_equal(result["depth"][0], parts[0]["depth"][0])
    np.testing.assert_array_equal(result["depth"][4], parts[2]["depth"][2])


def test_cameras_turn_half_way_and_stand_half_way() -> None:
    first, second = predictions(0, 1, 1), predictions(0, 1, 1)
    for part, degrees, place in ((first, 170.0, [0, 0, 0]), (second, 190.0, [2, 4, 0])):
        turned = rotation(1, degrees)
        part["extrinsics"][0, 0] = np.c_[turned, -turned @ place]
        part["depth_conf"][:] = 2.0
    frames = PendingFrames(0)
    frames.add(0, first)
    frames.add(0, second)
    camera = frames.pop(1)["extrinsics"][0, 0].astype(np.float64)
    # 170 and 190 degrees: the mean of their entries would do, that of w >= 0 quaternions would not.
    assert rotation_angles(camera[:, :3], rotation(1, 180.0)) < 1e-4
    np.testing.assert_allclose(-camera[:, :3].T @ camera[:, 3], [1, 2, 0], atol=1e-6)


def test_confidence_pulls_cameras() -> None:
    first, second = predictions(0, 1, 1), predictions(0, 1, 1)
    first["extrinsics"][0, 0] = np.c_[np.eye(3), [0, 0, 0]]
    second["extrinsics"][0, 0] = np.c_[rotation(2, 10.0), [0, 0, 0]]
    first["depth_conf"][:], second["depth_conf"][:] = 9.0, 1.0
    frames = PendingFrames(0)
    frames.add(0, first)
    frames.add(0, second)
    camera = frames.pop(1)["extrinsics"][0, 0].astype(np.float64)
    assert abs(float(rotation_angles(camera[:, :3], np.eye(3))) - 1.0) < 0.01


def test_what_is_not_finite_does_not_count() -> None:
    first, second = predictions(0, 1), predictions(1, 1)
    first["depth"][0, 0, 0, 0], second["depth"][0, 1, 0, 0] = np.nan, np.inf
    second["depth_conf"][0, 0, 1, 1] = np.nan
    frames = PendingFrames(0)
    frames.add(0, first)
    frames.add(0, second)
    depth = frames.pop(1)["depth"]
    assert depth[0, 0, 0, 0] == second["depth"][0, 0, 0, 0]
    assert depth[0, 1, 0, 0] == first["depth"][0, 1, 0, 0]
    assert depth[0, 0, 1, 1] == first["depth"][0, 0, 1, 1]


def test_a_state_goes_on_to_the_last_bit() -> None:
    results = []
    for through_state in (False, True):
        frames, taken = PendingFrames(0), []
        for start in range(0, 8, 2):
            frames.add(start, predictions(start, 5))
            taken.append(frames.pop(start + 2))
            if through_state:
                frames = PendingFrames.from_state({name: array.copy() for name, array in frames.state().items()})
        taken.append(frames.pop(frames.stop))
        results.append({name: np.concatenate([part[name] for part in taken]) for name in taken[0]})
    assert len(results[0]["depth"]) == 11
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])
