"""The two models. `VGGT` reads one sequence of frames; `VGGT_MV` also synchronized views over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.models.base import VGGTBase
from vggt_mv.models.options import AggregatorOptions, StageCallback

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["VGGT", "VGGT_MV"]

_ATTENTIONS = ("alternating", "joint")


class VGGT(VGGTBase, library_name="vggt_mv", license="apache-2.0", tags=["3d-reconstruction"]):
    """Cameras, depth, points and tracks of one sequence of frames, in one pass.

    Args:
        img_size: side in pixels that the position embedding was made for.
        patch_size: side of a patch; height and width of images are multiples of it.
        embed_dim: features C of a token.
        enable_camera, enable_point, enable_depth, enable_track: which heads there are.
        camera_head_options, dpt_head_options, track_head_options: override arguments of `CameraHead`, of `DPTHead`
            (depth and points) and of `TrackHead`.
        aggregator_options: every option of `Aggregator`.

    The defaults are the 1.2-billion-parameter model; its state dict has the keys and shapes of the public checkpoint.

    Raises:
        VggtMvError: an unknown option (naming the nearest known one) or one out of its range.

    Example:
        >>> import torch
        >>> from vggt_mv.models.configs import build_model
        >>> model = build_model({"class": "VGGT", "img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2,
        ...                      "patch_embed": "conv", "enable_point": False, "enable_depth": False,
        ...                      "enable_track": False})
        >>> model(torch.rand(3, 3, 28, 42))["pose_enc"].shape
        torch.Size([1, 3, 9])
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        enable_camera: bool = True,
        enable_point: bool = True,
        enable_depth: bool = True,
        enable_track: bool = True,
        *,
        camera_head_options: Mapping[str, Any] | None = None,
        dpt_head_options: Mapping[str, Any] | None = None,
        track_head_options: Mapping[str, Any] | None = None,
        **aggregator_options: Unpack[AggregatorOptions],
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            enable_camera=enable_camera,
            enable_point=enable_point,
            enable_depth=enable_depth,
            enable_track=enable_track,
            camera_head_options=camera_head_options,
            dpt_head_options=dpt_head_options,
            track_head_options=track_head_options,
            aggregator_options=aggregator_options,
        )

    def forward(
        self, images: Tensor, query_points: Tensor | None = None, *, on_stage: StageCallback | None = None
    ) -> dict[str, Any]:
        """Predicts all that the heads give.

        Args:
            images: ``[S,3,H,W]`` or ``[B,S,3,H,W]``, RGB in [0, 1], H and W multiples of the patch size.
            query_points: ``[M,2]`` or ``[B,M,2]``, (x, y) in pixels of the first frame, to track through the others.
            on_stage: told of the progress: (stage, steps done, steps in all).

        Returns:
            A dict, with B = 1 for 4-D images, of what the heads there are give. ``pose_enc [B,S,9]`` (translation,
            quaternion x y z w, field of view h w in radians; see `pose_encoding_to_extri_intri`) and ``pose_enc_list``,
            of all iterations; ``depth [B,S,H,W,1]``, ``depth_conf [B,S,H,W]``; ``world_points [B,S,H,W,3]``,
            ``world_points_conf [B,S,H,W]``; with query points ``track [B,S,M,2]``, ``track_list``, ``vis [B,S,M]``,
            ``conf [B,S,M]``; ``images``. With a spatial mask head also ``dynamic_mask [B,S,H/p,W/p]``, 1 where the
            scene moves.

        Raises:
            VggtMvError: images of a wrong rank, size, dtype or range, or query points that do not fit.
        """
        if images.ndim == 6:
            raise VggtMvError(
                f"VGGT: images must be [S, 3, H, W] or [B, S, 3, H, W], got {list(images.shape)}; "
                "VGGT_MV takes [B, T, N, 3, H, W]"
            )
        return self._predict(images, query_points, on_stage)


class VGGT_MV(VGGTBase, library_name="vggt_mv", license="apache-2.0", tags=["3d-reconstruction", "multi-view-video"]):
    """`VGGT` for T times x N synchronized views, and for single sequences with PAGE-4D's spatial mask.

    Args:
        img_size, patch_size, embed_dim, enable_camera, enable_point, enable_depth, enable_track, camera_head_options,
            dpt_head_options, track_head_options, aggregator_options: as for `VGGT`; `enable_spatial_mask` is True by
                default.
        enable_dual_stream: cameras from a pose stream that looks away from what moves, all else from a geometry stream
            that looks at it; see `Aggregator`.
        enable_sparse_global: frames of all times and views exchange information after some rounds; see `Aggregator`,
            also for ``sparse_strategy``, ``sparse_global_layers``, ``landmark_k`` and ``num_memory_tokens``.
        attention: what times x views of images mean. ``"alternating"``: attention over the views of a time and over the
            times of a view in turn, for weights that were trained so. ``"joint"``: all T N frames are one sequence,
            t-major, which is what VGGT, PAGE-4D and Pi3 weights know. Can be given to `forward`, too.

    Raises:
        VggtMvError: an unknown option (naming the nearest known one) or one out of its range.

    Example:
        >>> import torch
        >>> from vggt_mv.models.configs import build_model
        >>> model = build_model({"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_embed": "conv",
        ...                      "mask_layer": 0, "enable_point": False, "enable_depth": False, "enable_track": False,
        ...                      "enable_dual_stream": True, "enable_sparse_global": True})
        >>> predictions = model(torch.rand(1, 2, 3, 3, 28, 42))                       # 2 times, 3 views
        >>> predictions["pose_enc"].shape, predictions["dynamic_mask"].shape, predictions["memory_state"].shape
        (torch.Size([1, 2, 3, 9]), torch.Size([1, 2, 3, 2, 3]), torch.Size([2, 2, 1, 32, 32]))
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        enable_camera: bool = True,
        enable_point: bool = True,
        enable_depth: bool = True,
        enable_track: bool = True,
        *,
        enable_dual_stream: bool = False,
        enable_sparse_global: bool = False,
        attention: str = "alternating",
        camera_head_options: Mapping[str, Any] | None = None,
        dpt_head_options: Mapping[str, Any] | None = None,
        track_head_options: Mapping[str, Any] | None = None,
        **aggregator_options: Unpack[AggregatorOptions],
    ) -> None:
        aggregator_options.setdefault("enable_spatial_mask", True)
        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            enable_camera=enable_camera,
            enable_point=enable_point,
            enable_depth=enable_depth,
            enable_track=enable_track,
            camera_head_options=camera_head_options,
            dpt_head_options=dpt_head_options,
            track_head_options=track_head_options,
            aggregator_options={
                **aggregator_options,
                "enable_dual_stream": enable_dual_stream,
                "enable_sparse_global": enable_sparse_global,
            },
        )
        self.attention = _check_attention(attention)

    def forward(
        self,
        images: Tensor,
        query_points: Tensor | None = None,
        *,
        on_stage: StageCallback | None = None,
        dynamic_mask: Tensor | None = None,
        attention: str | None = None,
        memory_state: Tensor | None = None,
        landmark_confidence: Tensor | None = None,
    ) -> dict[str, Any]:
        """Predicts all that the heads give.

        Args:
            images: ``[S,3,H,W]``, ``[B,S,3,H,W]`` or ``[B,T,N,3,H,W]``, RGB in [0, 1], H and W multiples of the patch
                size.
            query_points: ``[M,2]`` or ``[B,M,2]``, (x, y) in pixels of the first frame (t = 0, n = 0).
            on_stage: told of the progress: (stage, steps done, steps in all).
            dynamic_mask: the images' shape without channels, in [0, 1], 1 where the scene moves; see
                `Aggregator.forward`.
            attention: ``"alternating"`` or ``"joint"`` for this call.
            memory_state: ``["memory_state"]`` of the predictions for the part of a recording before this one: the
                memory bank goes on from there.
            landmark_confidence: the images' shape without channels; chooses landmarks, see `Aggregator.forward`.

        Returns:
            A dict as `VGGT.forward` returns it, where frames of 6-D images have the leading dimensions ``[B,T,N]``.
            ``dynamic_mask`` is predicted for sequences, which times x views with joint attention are, and with dual
            stream also for times x views. With a memory bank there is ``memory_state [streams, layers, B, M, C]``.

        Raises:
            VggtMvError: images or mask of a wrong rank, size, dtype or range, or query points that do not fit.
        """
        attention = self.attention if attention is None else _check_attention(attention)
        joint = images.ndim == 6 and attention == "joint"
        return self._predict(images, query_points, on_stage, dynamic_mask, joint, memory_state, landmark_confidence)


def _check_attention(attention: str) -> str:
    if attention not in _ATTENTIONS:
        raise VggtMvError(f"VGGT_MV: attention must be one of {list(_ATTENTIONS)}, got {attention!r}")
    return attention
