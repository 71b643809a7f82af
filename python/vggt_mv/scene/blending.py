"""Frames that several windows of a recording saw, as one: means weighted by confidence, one window after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vggt_mv.utils.rotation import mat_to_quat, quat_to_mat

__all__ = ["PendingFrames"]

Arrays = dict[str, NDArray[Any]]

# Predictions of a pixel count by the confidence of that pixel; all others by the mean confidence of their frame.
_CONFIDENCE = {
    "depth": "depth_conf",
    "depth_conf": "depth_conf",
    "world_points": "world_points_conf",
    "world_points_conf": "world_points_conf",
}
_FRAME = "frame"
_CAMERAS = "extrinsics"


class PendingFrames:
    """The frames that a later window may still see, as the weighted mean of the windows that have seen them so far.

    With a prediction x_k of window k and its weight w_k, ``sum_k w_k x_k / sum_k w_k``. The weight of a pixel's depth
    is its confidence, that of a pixel's world point the confidence of that; confidences are their own weight. Cameras,
    intrinsics and masks count by the mean confidence of their frame. The mean of rotations is that of their quaternions
    (Markley 2007: the eigenvector of ``sum w q q^T`` of largest eigenvalue, whatever the signs of the q), the mean of
    camera positions is taken in the world. Values that are not finite do not count. Images and given masks are the same
    in all windows.

    A frame that one window alone saw comes out as it went in, bit for bit.

    Args:
        start: time of the first frame to come.

    Example:
        >>> frames = PendingFrames(0)
        >>> for start, depth, confidence in ((0, 1.0, 1.0), (1, 4.0, 2.0)):
        ...     shape = (2, 1, 1, 1)
        ...     frames.add(start, {"depth": np.full(shape, depth), "depth_conf": np.full(shape, confidence)})
        >>> frames.pop(3)["depth"].ravel().tolist()
        [1.0, 3.0, 4.0]
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self._seen = np.zeros(0, dtype=np.int64)  # windows that saw a time
        self._values: Arrays = {}
        self._weights: Arrays = {}
        # Of each frame: camera position [.., 3] and sum of w q q^T [.., 4, 4], from which extrinsics are made at last.
        self._positions = np.zeros((0, 0, 3))
        self._rotations = np.zeros((0, 0, 4, 4))

    @property
    def stop(self) -> int:
        """One more than the last time."""
        return self.start + len(self._seen)

    def add(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Blend in what another window predicts for the times from ``start``: arrays [T, N, ...], in the common world.

        ``start`` must lie between ``self.start`` and ``self.stop``, and the window must not end before ``self.stop``.
        """
        times = len(next(iter(arrays.values())))
        shared = self.stop - start
        assert self.start <= start <= self.stop <= start + times, (self.start, start, self.stop, times)
        weights = _weights(arrays)
        new_weights = {name: _finite(array) for name, array in weights.items()}
        if _CAMERAS in arrays:
            positions, rotations = _positions_and_rotations(arrays[_CAMERAS], weights[_FRAME])
        if shared:
            self._blend(slice(len(self._seen) - shared, None), shared, arrays, new_weights)
            if _CAMERAS in arrays:
                old = slice(len(self._seen) - shared, None)
                fraction = _fraction(self._weights[_FRAME][old], new_weights[_FRAME][:shared])[..., None]
                self._positions[old] += fraction * (positions[:shared] - self._positions[old])
                self._rotations[old] += rotations[:shared]
            for name, weight in new_weights.items():
                self._weights[name][len(self._seen) - shared :] += weight[:shared]
            self._seen[len(self._seen) - shared :] += 1
        self._append(shared, arrays, new_weights)
        if _CAMERAS in arrays:
            self._positions = _joined(self._positions, positions[shared:])
            self._rotations = _joined(self._rotations, rotations[shared:])
        self._seen = np.concatenate([self._seen, np.ones(times - shared, dtype=np.int64)])

    def pop(self, stop: int) -> Arrays:
        """Take out the times before ``stop``: arrays [stop - start, N, ...] by name, with the dtypes that came in."""
        count = stop - self.start
        taken = {name: array[:count].copy() for name, array in self._values.items()}
        several = np.flatnonzero(self._seen[:count] > 1)
        if _CAMERAS in taken and len(several):
            taken[_CAMERAS][several] = _cameras(self._positions[several], self._rotations[several])
        self._values = {name: array[count:].copy() for name, array in self._values.items()}
        self._weights = {name: array[count:].copy() for name, array in self._weights.items()}
        self._positions, self._rotations = self._positions[count:].copy(), self._rotations[count:].copy()
        self._seen = self._seen[count:].copy()
        self.start = stop
        return taken

    def state(self) -> Arrays:
        """All that is in here, as arrays; ``from_state`` makes the same again."""
        return {
            "start": np.array(self.start),
            "seen": self._seen,
            "positions": self._positions,
            "rotations": self._rotations,
            **{f"value.{name}": array for name, array in self._values.items()},
            **{f"weight.{name}": array for name, array in self._weights.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]]) -> PendingFrames:
        """What ``state`` gave, as frames again."""
        frames = cls(int(state["start"]))
        frames._seen = state["seen"]
        frames._positions, frames._rotations = state["positions"], state["rotations"]
        frames._values = _with_prefix(state, "value.")
        frames._weights = _with_prefix(state, "weight.")
        return frames

    def _blend(self, old: slice, shared: int, arrays: Mapping[str, NDArray[Any]], weights: Arrays) -> None:
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                continue
            which = _weight_name(name, arrays)
            fraction = _fraction(self._weights[which][old], weights[which][:shared])
            value, new = self._values[name][old], array[:shared]
            fraction = fraction.reshape(*fraction.shape, *(1,) * (new.ndim - fraction.ndim)).astype(value.dtype)
            with np.errstate(invalid="ignore"):
                mean = value + fraction * (new - value)
            self._values[name][old] = np.where(
                np.isfinite(value), np.where(np.isfinite(new), mean, value), np.where(np.isfinite(new), new, value)
            )

    def _append(self, shared: int, arrays: Mapping[str, NDArray[Any]], weights: Arrays) -> None:
        for kept, added in ((self._values, arrays), (self._weights, weights)):
            for name, array in added.items():
                kept[name] = np.array(array[shared:]) if name not in kept else _joined(kept[name], array[shared:])


def _weight_name(name: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    confidence = _CONFIDENCE.get(name, _FRAME)
    return confidence if confidence in arrays else _FRAME


def _weights(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Weights by name: of the pixels [T, N, H, W], and of the frames [T, N]."""
    weights = {name: arrays[name] for name in ("depth_conf", "world_points_conf") if name in arrays}
    frames = next(iter(arrays.values())).shape[:2]
    confidence = next(iter(weights.values()), None)
    if confidence is None:
        return {_FRAME: np.ones(frames)}
    return {**weights, _FRAME: _finite(confidence).mean(axis=(2, 3), dtype=np.float64)}


def _finite(weights: NDArray[Any]) -> NDArray[Any]:
    """Weights that count: what is not finite, or below 0, counts nothing."""
    return np.where(np.isfinite(weights) & (weights > 0), weights, 0).astype(weights.dtype)


def _fraction(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    """The share of a new value in the mean; without any weight, none."""
    total = old + new
    return np.divide(new, total, out=np.zeros_like(total), where=total > 0)


def _positions_and_rotations(
    extrinsics: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cameras = extrinsics.astype(np.float64)
    positions = -(cameras[..., :3].swapaxes(-1, -2) @ cameras[..., 3:])[..., 0]
    quaternions = mat_to_quat(torch.from_numpy(np.ascontiguousarray(cameras[..., :3]))).numpy()
    outer = quaternions[..., :, None] * quaternions[..., None, :]
    return positions, weights[..., None, None] * outer


def _cameras(positions: NDArray[np.float64], rotations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Extrinsics [..., 3, 4] of camera positions [..., 3] and sums of w q q^T [..., 4, 4]."""
    usable = np.isfinite(rotations).all(axis=(-2, -1), keepdims=True)
    _, vectors = np.linalg.eigh(np.where(usable, rotations, np.eye(4)))
    matrices = quat_to_mat(torch.from_numpy(np.ascontiguousarray(vectors[..., -1]))).numpy()
    matrices = np.where(usable, matrices, np.nan)
    return np.concatenate([matrices, -matrices @ positions[..., None]], axis=-1)


def _joined(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    return np.array(second) if not len(first) else np.concatenate([first, second])


def _with_prefix(state: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
