"""Depth maps to 3-D points and back, and inverses of rigid transforms; for numpy arrays and torch tensors alike.

Axes are OpenCV's (x right, y down, z forward). ``extrinsic = [R | t]`` is camera-from-world, ``X_cam = R X_world +
t``; depth is the z coordinate in the camera, and the pixel in column u and row v lies at ``(u, v)``, both counted
from 0:

    X_cam = depth * K^-1 (u, v, 1)^T,    X_world = R^T (X_cam - t).

Every function returns numpy arrays for numpy input and torch tensors (same device, differentiable) for torch input,
except `unproject_depth_map_to_point_map`, which always returns numpy.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from vggt_mv.errors import VggtMvError

__all__ = [
    "closed_form_inverse_se3",
    "depth_to_world_coords_points",
    "project_world_points",
    "unproject_depth_map_to_point_map",
]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def _backend(function: str, **arrays: Any) -> ModuleType:
    """`torch` or `numpy`, whichever all of `arrays` belong to."""
    if all(isinstance(array, torch.Tensor) for array in arrays.values()):
        return torch
    if all(isinstance(array, np.ndarray) for array in arrays.values()):
        return np
    given = ", ".join(f"{name}: {type(array).__name__}" for name, array in arrays.items())
    raise VggtMvError(f"{function}: arguments must be all numpy arrays or all torch tensors, got {given}")


def _check_tail(function: str, name: str, array: Any, *tails: tuple[int, ...]) -> None:
    """The last dimensions of `array` must be one of `tails`."""
    if not any(array.ndim >= len(tail) and tuple(array.shape[-len(tail) :]) == tail for tail in tails):
        rules = " or ".join("[..., " + ", ".join(map(str, tail)) + "]" for tail in tails)
        raise VggtMvError(f"{function}: {name} must be {rules}, got {list(array.shape)}")


def _check_leading(function: str, expected: tuple[int, ...], owner: str, **leading: tuple[int, ...]) -> None:
    """Every argument in `leading` must have the leading dimensions of `owner`, or none at all."""
    for name, given in leading.items():
        if given not in (expected, ()):
            raise VggtMvError(
                f"{function}: {name} must have no leading dimensions or those of {owner}, {list(expected)}; "
                f"got {list(given)}"
            )


def _is_float(array: Any) -> bool:
    return (
        bool(array.is_floating_point()) if isinstance(array, torch.Tensor) else np.issubdtype(array.dtype, np.floating)
    )


def _to_common_dtype(*arrays: Any) -> list[Any]:
    """The arrays in the widest of their dtypes. (torch does not promote in matrix products.)"""
    if isinstance(arrays[0], torch.Tensor):
        dtype = functools.reduce(torch.promote_types, (array.dtype for array in arrays))
        return [array.to(dtype) for array in arrays]
    return [array.astype(np.result_type(*arrays), copy=False) for array in arrays]


def depth_to_world_coords_points(
    depth_map: Array, extrinsic: Array, intrinsic: Array, eps: float = 1e-8
) -> tuple[Array, Array, Array]:
    """World and camera coordinates of every pixel of depth maps.

    Args:
        depth_map: ``[..., H, W]``, z depth, floating point.
        extrinsic: ``[..., 3, 4]`` or ``[..., 4, 4]``, camera-from-world ``[R | t]``.
        intrinsic: ``[..., 3, 3]``, upper triangular; skew counts. `extrinsic` and `intrinsic` have the leading
            dimensions of `depth_map` or none.
        eps: depths up to `eps` are invalid.

    Returns:
        world ``[..., H, W, 3]``, camera ``[..., H, W, 3]``, valid ``[..., H, W]`` bool (``depth > eps``). Units are
        those of depth and translation.

    Raises:
        VggtMvError: a wrong shape, numpy mixed with torch, or integer depth.

    Example:
        >>> import numpy as np
        >>> depth = np.full((2, 3), 2.0)
        >>> K = np.array([[4.0, 0, 1], [0, 4, 0.5], [0, 0, 1]])
        >>> world, camera, valid = depth_to_world_coords_points(depth, np.eye(4)[:3], K)
        >>> world[1, 2].tolist(), bool(valid.all())
        ([0.5, 0.25, 2.0], True)
    """
    function = "depth_to_world_coords_points"
    xp = _backend(function, depth_map=depth_map, extrinsic=extrinsic, intrinsic=intrinsic)
    if depth_map.ndim < 2:
        raise VggtMvError(f"{function}: depth_map must be [..., H, W], got {list(depth_map.shape)}")
    if not _is_float(depth_map):
        raise VggtMvError(f"{function}: depth_map must be floating point, got {depth_map.dtype}")
    _check_tail(function, "extrinsic", extrinsic, (3, 4), (4, 4))
    _check_tail(function, "intrinsic", intrinsic, (3, 3))
    _check_leading(
        function,
        tuple(depth_map.shape[:-2]),
        "depth_map",
        extrinsic=tuple(extrinsic.shape[:-2]),
        intrinsic=tuple(intrinsic.shape[:-2]),
    )
    depth_map, extrinsic, intrinsic = _to_common_dtype(depth_map, extrinsic, intrinsic)
    height, width = depth_map.shape[-2:]
    if isinstance(depth_map, torch.Tensor):
        u = torch.arange(width, device=depth_map.device, dtype=depth_map.dtype)
        v = torch.arange(height, device=depth_map.device, dtype=depth_map.dtype)[:, None]
    else:
        u = np.arange(width, dtype=depth_map.dtype)
        v = np.arange(height, dtype=depth_map.dtype)[:, None]
    k = intrinsic[..., None, None]  # K[i, j] against [..., H, W]
    fx, skew, cx = k[..., 0, 0, :, :], k[..., 0, 1, :, :], k[..., 0, 2, :, :]
    fy, cy = k[..., 1, 1, :, :], k[..., 1, 2, :, :]
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    camera = xp.stack((x * depth_map, y * depth_map, depth_map + 0.0 * x), -1)
    rotation, translation = extrinsic[..., :3, :3], extrinsic[..., :3, 3]
    # Row vectors: X_world^T = (X_cam - t)^T R.
    world = (camera - translation[..., None, None, :]) @ rotation[..., None, :, :]
    return world, camera, depth_map > eps


def project_world_points(points: Array, extrinsic: Array, intrinsic: Array) -> tuple[Array, Array]:
    """Pixels and depths of world points: the inverse of `depth_to_world_coords_points`.

    Args:
        points: ``[..., M, 3]`` world coordinates, floating point. (A map ``[H, W, 3]`` is M = W points of H cameras
            unless the cameras have no leading dimensions.)
        extrinsic: ``[..., 3, 4]`` or ``[..., 4, 4]``, camera-from-world; leading dimensions of `points` or none.
        intrinsic: ``[..., 3, 3]``; likewise.

    Returns:
        pixels ``[..., M, 2]`` (u, v), and depth ``[..., M]``. Points with depth <= 0 lie behind the camera; their
        pixels mean nothing, and at depth 0 they are not finite.

    Raises:
        VggtMvError: a wrong shape, numpy mixed with torch, or integer points.

    Example:
        >>> import numpy as np
        >>> K = np.array([[4.0, 0, 1], [0, 4, 0.5], [0, 0, 1]])
        >>> pixels, depth = project_world_points(np.array([[0.5, 0.25, 2.0]]), np.eye(4)[:3], K)
        >>> pixels.tolist(), depth.tolist()
        ([[2.0, 1.0]], [2.0])
    """
    function = "project_world_points"
    _backend(function, points=points, extrinsic=extrinsic, intrinsic=intrinsic)
    if points.ndim < 2 or points.shape[-1] != 3:
        raise VggtMvError(f"{function}: points must be [..., M, 3], got {list(points.shape)}")
    if not _is_float(points):
        raise VggtMvError(f"{function}: points must be floating point, got {points.dtype}")
    _check_tail(function, "extrinsic", extrinsic, (3, 4), (4, 4))
    _check_tail(function, "intrinsic", intrinsic, (3, 3))
    leading = {"extrinsic": tuple(extrinsic.shape[:-2]), "intrinsic": tuple(intrinsic.shape[:-2])}
    _check_leading(function, tuple(points.shape[:-2]), "points", **leading)
    points, extrinsic, intrinsic = _to_common_dtype(points, extrinsic, intrinsic)
    rotation, translation = extrinsic[..., :3, :3], extrinsic[..., :3, 3]
    camera = points @ rotation.swapaxes(-1, -2) + translation[..., None, :]
    image = camera @ intrinsic.swapaxes(-1, -2)
    return image[..., :2] / image[..., 2:], camera[..., 2]


def unproject_depth_map_to_point_map(
    depth_map: np.ndarray | torch.Tensor,
    extrinsics_cam: np.ndarray | torch.Tensor,
    intrinsics_cam: np.ndarray | torch.Tensor,
) -> np.ndarray:
    """World points of the depth maps of S frames, as a numpy array.

    ``X_world = R^T (depth K^-1 (u, v, 1)^T - t)`` for every frame. Non-positive depths are not filtered.

    Args:
        depth_map: ``[S, H, W, 1]`` or ``[S, H, W]``, z depth, floating point; numpy, or torch on any device.
        extrinsics_cam: ``[S, 3, 4]`` (or ``[S, 4, 4]``) camera-from-world.
        intrinsics_cam: ``[S, 3, 3]``.

    Returns:
        ``[S, H, W, 3]`` numpy array; float64 if any argument is, else float32.

    Raises:
        VggtMvError: a wrong shape, or integer depth.

    Example:
        >>> import torch
        >>> depth = torch.ones(2, 14, 14, 1)
        >>> cameras, K = torch.eye(4)[:3].repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)
        >>> unproject_depth_map_to_point_map(depth, cameras, K)[1, 3, 5].tolist()  # row 3, column 5
        [5.0, 3.0, 1.0]
    """
    function = "unproject_depth_map_to_point_map"
    depth, extrinsics, intrinsics = (_as_numpy(array) for array in (depth_map, extrinsics_cam, intrinsics_cam))
    if depth.ndim == 4 and depth.shape[-1] == 1:
        depth = depth[..., 0]
    if depth.ndim != 3:
        raise VggtMvError(f"{function}: depth_map must be [S, H, W, 1] or [S, H, W], got {list(depth.shape)}")
    frames = depth.shape[0]
    for name, array, tails in (
        ("extrinsics_cam", extrinsics, ((3, 4), (4, 4))),
        ("intrinsics_cam", intrinsics, ((3, 3),)),
    ):
        if array.shape not in [(frames, *tail) for tail in tails]:
            rules = " or ".join(str([frames, *tail]) for tail in tails)
            raise VggtMvError(f"{function}: {name} must be {rules} for {frames} depth maps, got {list(array.shape)}")
    return depth_to_world_coords_points(depth, extrinsics, intrinsics)[0]


def _as_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """A numpy view or copy; half precision and bfloat16 (which numpy lacks) become float32."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.float16, torch.bfloat16) else array).numpy()
    return array.astype(np.float32) if array.dtype == np.float16 else array


def closed_form_inverse_se3(se3: Array, R: Array | None = None, T: Array | None = None) -> Array:
    """Inverses of rigid transforms: ``[R | t]^-1 = [R^T | -R^T t]``.

    Args:
        se3: ``[N, 3, 4]`` or ``[N, 4, 4]``, floating point. The last row of a 4 x 4 matrix is taken to be (0, 0, 0, 1).
        R: ``[N, 3, 3]`` rotations to use in place of those in `se3`.
        T: ``[N, 3, 1]`` (or ``[N, 3]``) translations to use in place of those in `se3`.

    Returns:
        ``[N, 4, 4]``, of the kind and dtype of `se3`.

    Raises:
        VggtMvError: a wrong shape or integer matrices.

    Example:
        >>> import numpy as np
        >>> pose = np.array([[[0.0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7]]])
        >>> closed_form_inverse_se3(pose)[0, :3, 3].tolist()
        [-6.0, 5.0, -7.0]
    """
    function = "closed_form_inverse_se3"
    given = {"se3": se3, **({} if R is None else {"R": R}), **({} if T is None else {"T": T})}
    xp = _backend(function, **given)
    if se3.ndim != 3 or tuple(se3.shape[1:]) not in ((3, 4), (4, 4)):
        raise VggtMvError(f"{function}: se3 must be [N, 3, 4] or [N, 4, 4], got {list(se3.shape)}")
    if not _is_float(se3):
        raise VggtMvError(f"{function}: se3 must be floating point, got {se3.dtype}")
    count = se3.shape[0]
    rotation = se3[:, :3, :3] if R is None else R
    translation = se3[:, :3, 3] if T is None else T
    if tuple(rotation.shape) != (count, 3, 3):
        raise VggtMvError(f"{function}: R must be [{count}, 3, 3], got {list(rotation.shape)}")
    if tuple(translation.shape) not in ((count, 3), (count, 3, 1)):
        raise VggtMvError(f"{function}: T must be [{count}, 3, 1] or [{count}, 3], got {list(translation.shape)}")
    transposed = rotation.swapaxes(1, 2)
    top = xp.concatenate((transposed, -(transposed @ translation.reshape(count, 3, 1))), 2)
    bottom = xp.zeros_like(top[:, :1])
    bottom[:, :, 3] = 1.0
    return xp.concatenate((top, bottom), 1)
