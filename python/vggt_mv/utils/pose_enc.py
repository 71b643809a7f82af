"""Cameras as the nine numbers that the camera head predicts, and back.

The encoding ``absT_quaR_FoV`` of a camera is ``(t (3), q (4), fov_h, fov_w)``: translation and rotation of the
camera-from-world transform ``[R | t]`` in OpenCV axes (x right, y down, z forward), the rotation as a quaternion
(x, y, z, w), and the two fields of view in radians. The principal point is the image centre and is not encoded:

    fov_h = 2 atan(H / (2 fy)),    fov_w = 2 atan(W / (2 fx)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.utils.rotation import mat_to_quat, quat_to_mat

__all__ = ["extri_intri_to_pose_encoding", "pose_encoding_to_extri_intri"]

_ENCODINGS = ("absT_quaR_FoV",)


def _check_encoding(function: str, pose_encoding_type: str) -> None:
    if pose_encoding_type not in _ENCODINGS:
        raise VggtMvError(
            f"{function}: pose_encoding_type must be one of {list(_ENCODINGS)}, got {pose_encoding_type!r}"
        )


def _height_and_width(function: str, image_size_hw: Sequence[int] | None) -> tuple[float, float]:
    if image_size_hw is None:
        raise VggtMvError(f"{function}: image_size_hw must be (height, width) in pixels, got None")
    size = tuple(float(side) for side in image_size_hw)
    if len(size) != 2 or not all(0 < side < float("inf") for side in size):
        raise VggtMvError(
            f"{function}: image_size_hw must be two positive sizes (height, width), got {tuple(image_size_hw)}"
        )
    return size[0], size[1]


def extri_intri_to_pose_encoding(
    extrinsics: Tensor,
    intrinsics: Tensor,
    image_size_hw: Sequence[int] | None = None,
    pose_encoding_type: str = "absT_quaR_FoV",
) -> Tensor:
    """Pose encoding of cameras. The principal point and the skew of `intrinsics` are not part of it.

    Args:
        extrinsics: ``[..., 3, 4]`` (or ``[..., 4, 4]``) camera-from-world ``[R | t]``, OpenCV axes.
        intrinsics: ``[..., 3, 3]``, focal lengths in pixels; leading dimensions as in `extrinsics`.
        image_size_hw: (height, width) of the image in pixels. Required, in spite of its default.
        pose_encoding_type: only ``"absT_quaR_FoV"``.

    Returns:
        ``[..., 9]``: t, q (x, y, z, w; w >= 0), fov_h, fov_w in radians. Computed in the wider of the two dtypes.

    Raises:
        VggtMvError: a wrong shape, missing or non-positive image size, or an unknown encoding.

    Example:
        >>> import torch
        >>> camera = torch.eye(4)[:3]
        >>> K = torch.tensor([[100.0, 0, 50], [0, 100, 100], [0, 0, 1]])
        >>> [round(value, 4) for value in extri_intri_to_pose_encoding(camera, K, (200, 100)).tolist()]
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.5708, 0.9273]
    """
    function = "extri_intri_to_pose_encoding"
    _check_encoding(function, pose_encoding_type)
    height, width = _height_and_width(function, image_size_hw)
    if extrinsics.ndim < 2 or extrinsics.shape[-1] != 4 or extrinsics.shape[-2] not in (3, 4):
        raise VggtMvError(f"{function}: extrinsics must be [..., 3, 4] or [..., 4, 4], got {list(extrinsics.shape)}")
    if intrinsics.ndim < 2 or intrinsics.shape[-2:] != (3, 3):
        raise VggtMvError(f"{function}: intrinsics must be [..., 3, 3], got {list(intrinsics.shape)}")
    if extrinsics.shape[:-2] != intrinsics.shape[:-2]:
        raise VggtMvError(
            f"{function}: extrinsics and intrinsics must have the same leading dimensions, "
            f"got {list(extrinsics.shape[:-2])} and {list(intrinsics.shape[:-2])}"
        )
    dtype = torch.promote_types(extrinsics.dtype, intrinsics.dtype)
    extrinsics, intrinsics = extrinsics.to(dtype), intrinsics.to(dtype)
    # atan2 with a positive first argument: a field of view in (0, pi) even where a focal length is 0.
    half = extrinsics.new_tensor((height / 2.0, width / 2.0))
    fov = 2.0 * torch.atan2(half, torch.stack((intrinsics[..., 1, 1], intrinsics[..., 0, 0]), dim=-1))
    return torch.cat((extrinsics[..., :3, 3], mat_to_quat(extrinsics[..., :3, :3]), fov), dim=-1)


def pose_encoding_to_extri_intri(
    pose_encoding: Tensor,
    image_size_hw: Sequence[int] | None = None,
    pose_encoding_type: str = "absT_quaR_FoV",
    build_intrinsics: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Cameras of a pose encoding.

    ``fy = (H / 2) / tan(fov_h / 2)``, ``fx = (W / 2) / tan(fov_w / 2)``, principal point ``(W / 2, H / 2)``. The
    quaternion need not have length 1. A field of view of 0, which the camera head's ReLU can give, makes an infinite
    focal length.

    Args:
        pose_encoding: ``[..., 9]``, e.g. ``predictions["pose_enc"]``.
        image_size_hw: (height, width) of the image in pixels; may be None only without intrinsics.
        pose_encoding_type: only ``"absT_quaR_FoV"``.
        build_intrinsics: False returns None in place of the intrinsics.

    Returns:
        extrinsics ``[..., 3, 4]`` (camera-from-world ``[R | t]``, OpenCV axes), intrinsics ``[..., 3, 3]`` or None;
        both of the dtype of the encoding.

    Raises:
        VggtMvError: a wrong shape, missing or non-positive image size, or an unknown encoding.

    Example:
        >>> import torch
        >>> encoding = torch.tensor([1.0, 2, 3, 0, 0, 0, 1, torch.pi / 2, torch.pi / 2])
        >>> extrinsic, intrinsic = pose_encoding_to_extri_intri(encoding, (200, 100))
        >>> extrinsic[:, 3].tolist(), intrinsic.round().tolist()
        ([1.0, 2.0, 3.0], [[50.0, 0.0, 50.0], [0.0, 100.0, 100.0], [0.0, 0.0, 1.0]])
    """
    function = "pose_encoding_to_extri_intri"
    _check_encoding(function, pose_encoding_type)
    if pose_encoding.ndim < 1 or pose_encoding.shape[-1] != 9:
        raise VggtMvError(f"{function}: pose_encoding must be [..., 9], got {list(pose_encoding.shape)}")
    rotation = quat_to_mat(pose_encoding[..., 3:7])
    extrinsics = torch.cat((rotation, pose_encoding[..., :3, None]), dim=-1)
    if not build_intrinsics:
        return extrinsics, None

    height, width = _height_and_width(function, image_size_hw)
    half = pose_encoding.new_tensor((height / 2.0, width / 2.0))
    focal_y, focal_x = (half / torch.tan(0.5 * pose_encoding[..., 7:9])).unbind(-1)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    entries = (focal_x, zero, one * (width / 2.0), zero, focal_y, one * (height / 2.0), zero, zero, one)
    return extrinsics, torch.stack(entries, dim=-1).unflatten(-1, (3, 3))
