"""Initial values of parameters."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["init_linear", "init_normal"]


def init_normal(tensor: Tensor, std: float) -> None:
    """Normal around 0, in place.

    Nothing happens on the meta device, where the first ``normal_`` of a process would import 800 modules of torch.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def init_linear(linear: nn.Linear, std: float) -> None:
    """Weights normal, biases zero, in place.

    Common code cuts weights of deviation 0.02 off at +-2: a hundred deviations, so never.
    """
    init_normal(linear.weight, std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
