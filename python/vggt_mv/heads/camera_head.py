"""The camera head: pose encodings from the camera tokens, refined in a few iterations.

    x = LayerNorm(camera tokens of the last output)
    each iteration, from x again, with e the embedding of the encoding so far (detached; a learnt one at first):
        shift, scale, gate = Linear(SiLU(e))
        y = gate * (LN(x) * (1 + scale) + shift) + x
        encoding += MLP(LayerNorm(trunk(y)))

The modulation is that of Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023 (adaptive layer norm).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.head_act import activate_pose, check_pose_activations
from vggt_mv.heads.inputs import select_output
from vggt_mv.layers.block import Block
from vggt_mv.layers.mlp import Mlp

__all__ = ["CameraHead"]

_ENCODING_WIDTHS = {"absT_quaR_FoV": 9}


class CameraHead(nn.Module):
    """Cameras from the aggregator's last output.

    Args:
        dim_in: features of a token, 2C.
        trunk_depth: number of blocks over the frames.
        pose_encoding_type: only ``"absT_quaR_FoV"``: translation 3, quaternion (x, y, z, w), fields of view h, w in
            radians.
        num_heads, mlp_ratio, init_values: of the blocks (see `Block`).
        trans_act, quat_act, fl_act: activations of the three parts of the encoding (see `activate_pose`).

    Raises:
        VggtMvError: an unknown encoding or activation.

    Example:
        >>> import torch
        >>> head = CameraHead(dim_in=32, trunk_depth=1, num_heads=4)
        >>> [encoding.shape for encoding in head([torch.zeros(1, 3, 11, 32)], num_iterations=2)]
        [torch.Size([1, 3, 9]), torch.Size([1, 3, 9])]
    """

    def __init__(
        self,
        dim_in: int = 2048,
        trunk_depth: int = 4,
        pose_encoding_type: str = "absT_quaR_FoV",
        num_heads: int = 16,
        mlp_ratio: float = 4,
        init_values: float = 0.01,
        trans_act: str = "linear",
        quat_act: str = "linear",
        fl_act: str = "relu",
    ) -> None:
        super().__init__()
        if pose_encoding_type not in _ENCODING_WIDTHS:
            raise VggtMvError(
                f"CameraHead: pose_encoding_type must be one of {list(_ENCODING_WIDTHS)}, got {pose_encoding_type!r}"
            )
        check_pose_activations(trans_act, quat_act, fl_act)
        self.dim_in = dim_in
        self.trunk_depth = trunk_depth
        self.target_dim = _ENCODING_WIDTHS[pose_encoding_type]
        self.trans_act = trans_act
        self.quat_act = quat_act
        self.fl_act = fl_act

        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, self.target_dim))
        self.trunk = nn.Sequential(
            *(
                Block(dim=dim_in, num_heads=num_heads, mlp_ratio=mlp_ratio, init_values=init_values)
                for _ in range(trunk_depth)
            )
        )
        self.token_norm = nn.LayerNorm(dim_in)
        self.trunk_norm = nn.LayerNorm(dim_in)
        self.embed_pose = nn.Linear(self.target_dim, dim_in)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim_in, 3 * dim_in))
        self.pose_branch = Mlp(in_features=dim_in, hidden_features=dim_in // 2, out_features=self.target_dim)

    def forward(self, aggregated_tokens_list: Sequence[Tensor | None], num_iterations: int = 4) -> list[Tensor]:
        """Predicts the cameras of all frames.

        Args:
            aggregated_tokens_list: the aggregator's outputs ``[B, S, P, dim_in]``, any floating dtype; only the last is
                read, and of it token 0 of each frame.
            num_iterations: number of refinements.

        Returns:
            The activated encodings ``[B, S, 9]`` of all iterations, the best last; dtype of the parameters. The
            gradient of each reaches its own iteration only.

        Raises:
            VggtMvError: a last output that is missing or has a wrong shape, or fewer than one iteration.
        """
        if num_iterations < 1:
            raise VggtMvError(f"CameraHead: num_iterations must be at least 1, got {num_iterations}")
        tokens = select_output("CameraHead", aggregated_tokens_list, -1, self.dim_in)
        if tokens.shape[2] < 1:
            raise VggtMvError(
                f"CameraHead: the last output must hold a camera token per frame, got {list(tokens.shape)}"
            )
        x = self.token_norm(tokens[:, :, 0].to(self.empty_pose_tokens.dtype))
        normed = F.layer_norm(x, (self.dim_in,), eps=1e-6)  # the same in every iteration
        encoding = x.new_zeros(*x.shape[:2], self.target_dim)
        known = self.empty_pose_tokens.expand_as(encoding)
        predictions = []
        for _ in range(num_iterations):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, dim=-1)
            y = gate * (normed * (1 + scale) + shift) + x
            encoding = encoding + self.pose_branch(self.trunk_norm(self.trunk(y)))
            predictions.append(activate_pose(encoding, self.trans_act, self.quat_act, self.fl_act))
            known = encoding.detach()
        return predictions
