"""The track head: feature maps by a dense head, points followed on them by the tracker."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vggt_mv.heads.dpt_head import DPTHead
from vggt_mv.heads.inputs import image_size
from vggt_mv.heads.track_modules.base_track_predictor import BaseTrackerPredictor, check_query_points

__all__ = ["TrackHead"]


class TrackHead(nn.Module):
    """Tracks of query points from the aggregator's outputs.

    Args:
        dim_in: features of a token, 2C.
        patch_size: side of a patch in pixels.
        features: channels of the feature maps, a multiple of 4.
        iters: iterations of the tracker unless a call says otherwise.
        predict_conf: predict a confidence, too.
        stride: image pixels per cell of the feature maps.
        corr_levels, corr_radius, hidden_size: see `BaseTrackerPredictor`.
        out_channels, intermediate_layer_idx: see `DPTHead`.
        depth, use_spaceatt, max_scale: see `BaseTrackerPredictor`.

    Raises:
        VggtMvError: a size that does not fit.

    Example:
        >>> import torch
        >>> head = TrackHead(8, features=8, corr_levels=2, corr_radius=1, hidden_size=16, out_channels=[4, 4, 8, 8],
        ...                  intermediate_layer_idx=[0, 1, 2, 3], depth=1)
        >>> outputs, images = [torch.zeros(1, 2, 5 + 6, 8) for _ in range(4)], torch.zeros(1, 2, 3, 28, 42)
        >>> queries = torch.tensor([[[20.0, 10.0]]])
        >>> track_list, visibility, confidence = head(outputs, images, 5, query_points=queries, iters=3)
        >>> len(track_list), track_list[-1].shape, visibility.shape, confidence.shape
        (3, torch.Size([1, 2, 1, 2]), torch.Size([1, 2, 1]), torch.Size([1, 2, 1]))
    """

    def __init__(
        self,
        dim_in: int,
        patch_size: int = 14,
        features: int = 128,
        iters: int = 4,
        predict_conf: bool = True,
        stride: int = 2,
        corr_levels: int = 7,
        corr_radius: int = 4,
        hidden_size: int = 384,
        *,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
        intermediate_layer_idx: Sequence[int] = (4, 11, 17, 23),
        depth: int = 6,
        use_spaceatt: bool = True,
        max_scale: float = 518,
    ) -> None:
        super().__init__()
        self.iters = iters
        self.feature_extractor = DPTHead(
            dim_in,
            patch_size=patch_size,
            features=features,
            out_channels=out_channels,
            intermediate_layer_idx=intermediate_layer_idx,
            pos_embed=False,
            feature_only=True,
            down_ratio=stride,
        )
        self.tracker = BaseTrackerPredictor(
            stride=stride,
            corr_levels=corr_levels,
            corr_radius=corr_radius,
            latent_dim=features,
            hidden_size=hidden_size,
            use_spaceatt=use_spaceatt,
            depth=depth,
            max_scale=max_scale,
            predict_conf=predict_conf,
        )

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor | None],
        images: Tensor,
        patch_start_idx: int,
        query_points: Tensor | None = None,
        iters: int | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Follows the query points through all frames.

        Args:
            aggregated_tokens_list: the aggregator's outputs ``[B, S, P, dim_in]``, any floating dtype; the entries that
                this head does not read may be None.
            images: ``[B, S, 3, H, W]``; only the size counts.
            patch_start_idx: index of the first patch token of a frame.
            query_points: ``[B, N, 2]`` (x, y) in frame 0, in image pixels. Required.
            iters: iterations of the tracker; default as constructed.

        Returns:
            tracks: list of ``[B, S, N, 2]`` in image pixels, one per iteration, the best last.
            visibility: ``[B, S, N]`` in [0, 1].
            confidence: likewise, or None without `predict_conf`.

        Raises:
            VggtMvError: missing query points, shapes that do not fit each other, or outputs that are missing.
        """
        batch = image_size("TrackHead", images)[0]
        # Before the expensive part.
        queries = check_query_points("TrackHead", query_points, batch)
        feature_maps = self.feature_extractor(aggregated_tokens_list, images, patch_start_idx)
        tracks, visibility, confidence = self.tracker(
            queries, feature_maps, iters=self.iters if iters is None else iters
        )
        return tracks, visibility, confidence
