"""Quaternions (x, y, z, w: scalar last) and rotation matrices, both differentiable.

A quaternion ``q = (v, w)`` and its rotation of a column vector ``p`` are linked by

    R p = p + (2 / q.q) (w (v x p) + v x (v x p)),

which needs no unit quaternion: ``q`` and ``c q`` give the same matrix for every real ``c != 0``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_mv.errors import VggtMvError

__all__ = ["mat_to_quat", "quat_to_mat"]


def quat_to_mat(quaternions: Tensor) -> Tensor:
    """Rotation matrices of quaternions.

    Args:
        quaternions: ``[..., 4]``, floating point, (x, y, z, w). Any non-zero length; a zero quaternion, which is no
            rotation, gives non-finite entries.

    Returns:
        ``[..., 3, 3]``, dtype of the input.

    Raises:
        VggtMvError: the last dimension is not 4, or the dtype is not floating point.

    Example:
        >>> import torch
        >>> quat_to_mat(torch.tensor([0.0, 0.0, 3.0, 3.0])).round().int().tolist()  # 90 degrees about z
        [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    if quaternions.ndim < 1 or quaternions.shape[-1] != 4:
        raise VggtMvError(f"quat_to_mat: quaternions must be [..., 4] (x, y, z, w), got {list(quaternions.shape)}")
    if not quaternions.is_floating_point():
        raise VggtMvError(f"quat_to_mat: quaternions must be floating point, got {quaternions.dtype}")
    x, y, z, w = quaternions.unbind(-1)
    s = 2.0 / (quaternions * quaternions).sum(-1)
    rows = (
        1.0 - s * (y * y + z * z),
        s * (x * y - z * w),
        s * (x * z + y * w),
        s * (x * y + z * w),
        1.0 - s * (x * x + z * z),
        s * (y * z - x * w),
        s * (x * z - y * w),
        s * (y * z + x * w),
        1.0 - s * (x * x + y * y),
    )
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def mat_to_quat(matrix: Tensor) -> Tensor:
    """Unit quaternions of rotation matrices, with ``w >= 0``.

    The outer product ``4 q q^T`` is linear in the entries of ``R``. Each of its rows is ``4 q_i q``, a multiple of the
    quaternion; the row with the largest diagonal entry has ``|q_i| >= 1/2`` and is normalised. So no root is taken near
    zero and no quotient loses digits, whichever component is small, and the gradient is finite everywhere. For a
    half-turn (``w = 0``) ``q`` and ``-q`` are equally right and either may come out.

    Args:
        matrix: ``[..., 3, 3]`` rotation matrices, floating point.

    Returns:
        ``[..., 4]``, (x, y, z, w), of length 1, dtype of the input.

    Raises:
        VggtMvError: the last two dimensions are not 3 x 3, or the dtype is not floating point.

    Example:
        >>> import torch
        >>> mat_to_quat(torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])).abs().tolist()  # half-turn about x
        [1.0, 0.0, 0.0, 0.0]
    """
    if matrix.ndim < 2 or matrix.shape[-2:] != (3, 3):
        raise VggtMvError(f"mat_to_quat: matrix must be [..., 3, 3], got {list(matrix.shape)}")
    if not matrix.is_floating_point():
        raise VggtMvError(f"mat_to_quat: matrix must be floating point, got {matrix.dtype}")
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in matrix.unbind(-2))
    xx = 1.0 + m00 - m11 - m22
    yy = 1.0 - m00 + m11 - m22
    zz = 1.0 - m00 - m11 + m22
    ww = 1.0 + m00 + m11 + m22
    xy, xz, yz = m10 + m01, m02 + m20, m21 + m12
    xw, yw, zw = m21 - m12, m02 - m20, m10 - m01
    outer = torch.stack((xx, xy, xz, xw, xy, yy, yz, yw, xz, yz, zz, zw, xw, yw, zw, ww), dim=-1).unflatten(-1, (4, 4))
    best = torch.stack((xx, yy, zz, ww), dim=-1).argmax(dim=-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = row / row.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
