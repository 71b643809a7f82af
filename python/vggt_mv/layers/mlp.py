"""The feed-forward half of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vggt_mv.layers.linear import Linear

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``, by default with the exact (erf) GELU.

    Args:
        in_features: C.
        hidden_features: width between the two layers, by default C.
        out_features: by default C.
        act_layer: makes the activation.
        drop: dropout probability after each layer.
        bias: whether the layers have biases.

    Example:
        >>> import torch
        >>> Mlp(8, 32)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop: nn.Module = nn.Dropout(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        hidden = self.fc1(x, activation="gelu") if self._has_plain_gelu() else self.act(self.fc1(x))
        return self.drop(self.fc2(self.drop(hidden)))

    def _has_plain_gelu(self) -> bool:
        """Whether fc1 can apply the activation: nobody put other modules or hooks into their places."""
        hooks = (
            self.fc1._forward_hooks,
            self.fc1._backward_hooks,
            self.act._forward_hooks,
            self.act._forward_pre_hooks,
            self.act._backward_hooks,
        )
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        return exact and type(self.fc1) is Linear and not any(hooks)
