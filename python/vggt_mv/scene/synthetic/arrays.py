"""What NumPy and PyTorch spell differently, so that the ray caster is written once and gives the same numbers in both.

Vectors are tuples of three arrays: every operation is elementwise, in float64, in the order written. No matrix
products, no transcendental functions of arrays: those differ between libraries in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Backend = Literal["numpy", "torch"]
Vector = tuple[Any, Any, Any]


class Arrays:
    """Array functions of one library.

    Args:
        backend: "numpy" or "torch".
        device: where torch computes.
    """

    def __init__(self, backend: Backend, device: str = "cpu") -> None:
        self.backend = backend
        self.device = device
        self._constants: dict[str, Any] = {}
        if backend == "torch":
            import torch

            self.xp: Any = torch
        else:
            self.xp = np

    def array(self, values: NDArray[Any]) -> Any:
        return self.xp.from_numpy(np.ascontiguousarray(values)).to(self.device) if self.backend == "torch" else values

    def constant(self, name: str, make: Callable[[], NDArray[Any]]) -> Any:
        """An array that is made once."""
        if name not in self._constants:
            self._constants[name] = self.array(make())
        return self._constants[name]

    def numpy(self, values: Any) -> NDArray[Any]:
        return np.asarray(values.cpu().numpy() if self.backend == "torch" else values)

    def floor_int(self, values: Any) -> Any:
        floor = self.xp.floor(values)
        return floor.to(self.xp.int64) if self.backend == "torch" else floor.astype(np.int64)

    def floating(self, values: Any) -> Any:
        """float64 of whole numbers or truth values."""
        return values.to(self.xp.float64) if self.backend == "torch" else values.astype(np.float64)

    def single(self, values: Any) -> Any:
        """float32, in this library, of arrays of either."""
        if self.backend == "numpy":
            return np.asarray(values, dtype=np.float32)
        tensor = self.array(values) if isinstance(values, np.ndarray) else values
        return tensor.to(self.xp.float32)

    def channels_first(self, images: Any) -> Any:
        """[T, N, H, W, 3] -> [T, N, 3, H, W], laid out so in memory."""
        if self.backend == "torch":
            return images.permute(0, 1, 4, 2, 3).contiguous()
        return np.ascontiguousarray(images.transpose(0, 1, 4, 2, 3))

    def full_like(self, like: Any, value: float) -> Any:
        return self.xp.full_like(like, value)

    def indices(self, mask: Any) -> Any:
        """Flat positions where a flat mask is true."""
        return self.xp.where(mask)[0]

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return self.xp.where(condition, yes, no)

    def minimum(self, a: Any, b: Any) -> Any:
        return self.xp.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self.xp.maximum(a, b)

    def sqrt(self, values: Any) -> Any:
        return self.xp.sqrt(values)

    def abs(self, values: Any) -> Any:
        return self.xp.abs(values)

    def floor(self, values: Any) -> Any:
        return self.xp.floor(values)

    def clip(self, values: Any, low: float, high: float) -> Any:
        return self.xp.clip(values, low, high)

    def stack(self, values: Sequence[Any]) -> Any:
        """Along a new last dimension."""
        return self.xp.stack(list(values), -1)


def rotate(rotation: NDArray[np.float64], vector: Vector) -> Vector:
    """``rotation @ vector``."""
    x, y, z = vector
    r = rotation.tolist()
    return (
        r[0][0] * x + r[0][1] * y + r[0][2] * z,
        r[1][0] * x + r[1][1] * y + r[1][2] * z,
        r[2][0] * x + r[2][1] * y + r[2][2] * z,
    )


def dot(a: Vector, b: Vector) -> Any:
    """``a . b``."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def add_scaled(a: Vector, b: Vector, scale: Any) -> Vector:
    """``a + scale b``."""
    return a[0] + scale * b[0], a[1] + scale * b[1], a[2] + scale * b[2]


def take(vector: Vector, index: Any) -> Vector:
    """Some of the vectors, by position or mask."""
    return vector[0][index], vector[1][index], vector[2][index]
