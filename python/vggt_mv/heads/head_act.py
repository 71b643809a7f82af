"""Activations that turn the heads' raw outputs into cameras, points, depth and confidence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.errors import VggtMvError

__all__ = [
    "activate_head",
    "activate_pose",
    "check_head_activations",
    "check_pose_activations",
    "inverse_log_transform",
]


def inverse_log_transform(y: Tensor) -> Tensor:
    """``sign(y) (exp(|y|) - 1)``: the inverse of ``sign(x) log(1 + |x|)``. Elementwise, any shape."""
    return torch.sign(y) * torch.expm1(y.abs())


def _unit(x: Tensor) -> Tensor:
    """``x / max(|x|, 1e-8)`` along the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def _norm_exp(x: Tensor) -> Tensor:
    """Keeps the direction, maps the length d to ``exp(d) - 1``; the last dimension is the vector."""
    return _unit(x) * torch.expm1(x.norm(dim=-1, keepdim=True))


def _xy_inv_log(x: Tensor) -> Tensor:
    """``z = inv_log(x_z)``; the other components are rays: ``(x_x z, x_y z, z)``."""
    z = inverse_log_transform(x[..., -1:])
    return torch.cat((x[..., :-1] * z, z), dim=-1)


def _identity(x: Tensor) -> Tensor:
    return x


_POSE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _identity,
    "inv_log": inverse_log_transform,
    "exp": torch.exp,
    "relu": F.relu,
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm_exp": _norm_exp,
    "norm": _unit,
    "exp": torch.exp,
    "relu": F.relu,
    "inv_log": inverse_log_transform,
    "xy_inv_log": _xy_inv_log,
    "sigmoid": torch.sigmoid,
    "linear": _identity,
}
_CONFIDENCE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "expp1": lambda c: 1.0 + c.exp(),
    "expp0": torch.exp,
    "sigmoid": torch.sigmoid,
}


def _check(argument: str, name: str, table: dict[str, Callable[[Tensor], Tensor]]) -> None:
    if name not in table:
        raise VggtMvError(f"{argument} must be one of {sorted(table)}, got {name!r}")


def check_pose_activations(trans_act: str, quat_act: str, fl_act: str) -> None:
    """Raises VggtMvError if one of the three is no activation of `activate_pose`."""
    for argument, name in (("trans_act", trans_act), ("quat_act", quat_act), ("fl_act", fl_act)):
        _check(argument, name, _POSE_ACTIVATIONS)


def check_head_activations(activation: str, conf_activation: str) -> None:
    """Raises VggtMvError if one of the two is no activation of `activate_head`."""
    _check("activation", activation, _ACTIVATIONS)
    _check("conf_activation", conf_activation, _CONFIDENCE_ACTIVATIONS)


def activate_pose(
    pred_pose_enc: Tensor, trans_act: str = "linear", quat_act: str = "linear", fl_act: str = "linear"
) -> Tensor:
    """Activates a pose encoding part by part.

    Args:
        pred_pose_enc: ``[..., 9]`` (or more fields of view): translation 3, quaternion 4, fields of view.
        trans_act, quat_act, fl_act: "linear", "inv_log" (``sign(y) expm1(|y|)``), "exp" or "relu", for the three parts.

    Returns:
        A new tensor of the shape of `pred_pose_enc`.

    Raises:
        VggtMvError: an unknown activation, or fewer than 8 components.

    Example:
        >>> import torch
        >>> activate_pose(torch.tensor([1.0, 2, 3, 0, 0, 0, 1, -0.5, 0.5]), fl_act="relu")[-2:].tolist()
        [0.0, 0.5]
    """
    check_pose_activations(trans_act, quat_act, fl_act)
    if pred_pose_enc.ndim < 1 or pred_pose_enc.shape[-1] < 8:
        raise VggtMvError(f"activate_pose: pred_pose_enc must be [..., 9], got {list(pred_pose_enc.shape)}")
    parts = (
        _POSE_ACTIVATIONS[trans_act](pred_pose_enc[..., :3]),
        _POSE_ACTIVATIONS[quat_act](pred_pose_enc[..., 3:7]),
        _POSE_ACTIVATIONS[fl_act](pred_pose_enc[..., 7:]),
    )
    return torch.cat(parts, dim=-1)


def activate_head(out: Tensor, activation: str = "norm_exp", conf_activation: str = "expp1") -> tuple[Tensor, Tensor]:
    """Activates a dense map whose last channel is the confidence.

    Args:
        out: ``[N, C, H, W]`` with C >= 2: C - 1 value channels, then one of confidence.
        activation: with v the value vector of a pixel,
            "linear" v, "exp" ``exp(v)``, "relu", "sigmoid", "inv_log" ``sign(v) expm1(|v|)`` (all elementwise),
            "norm" ``v / |v|``, "norm_exp" ``v / |v| * expm1(|v|)``, "xy_inv_log" ``(v_xy z, z)`` with ``z =
            inv_log(v_z)``.
        conf_activation: "expp1" ``1 + exp(c)``, "expp0" ``exp(c)``, "sigmoid".

    Returns:
        values ``[N, H, W, C - 1]`` and confidence ``[N, H, W]``.

    Raises:
        VggtMvError: an unknown activation, or `out` is not 4-D with at least two channels.

    Example:
        >>> import torch
        >>> depth, confidence = activate_head(torch.zeros(1, 2, 14, 28), activation="exp")
        >>> depth.shape, float(depth.max()), float(confidence.max())
        (torch.Size([1, 14, 28, 1]), 1.0, 2.0)
    """
    check_head_activations(activation, conf_activation)
    if out.ndim != 4 or out.shape[1] < 2:
        raise VggtMvError(
            f"activate_head: out must be [N, C, H, W] with C >= 2 (values, confidence), got {list(out.shape)}"
        )
    maps = out.permute(0, 2, 3, 1)
    return _ACTIVATIONS[activation](maps[..., :-1]), _CONFIDENCE_ACTIVATIONS[conf_activation](maps[..., -1])
