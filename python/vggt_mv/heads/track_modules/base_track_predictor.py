"""The tracker: follows query points of the first frame through all frames, by iterative refinement."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.track_modules.blocks import UpdateTransformer
from vggt_mv.heads.track_modules.utils import (
    correlation_window,
    feature_pyramid,
    flow_embedding,
    sample_map,
    sampled_position_embedding,
)
from vggt_mv.layers.mlp import Mlp

__all__ = ["BaseTrackerPredictor"]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class BaseTrackerPredictor(nn.Module):
    """Tracks, visibility and confidence of query points, from feature maps.

    All points start at the query in every frame, with the feature sampled there in frame 0. An iteration looks at the
    correlation of each point's feature with the maps around it, on several scales, lets a transformer exchange this
    along time and across tracks, and moves points and features by what comes out.

    Args:
        stride: image pixels per cell of the feature maps.
        corr_levels: scales of the correlation; a map needs ``2 ** (corr_levels - 1)`` cells a side.
        corr_radius: r, cells looked at on each side of a point.
        latent_dim: F, channels of the feature maps, a multiple of 4.
        hidden_size: width of the transformer and of the correlation MLP.
        use_spaceatt: exchange across tracks.
        depth: layers of the transformer.
        max_scale: by which displacements are divided.
        predict_conf: predict a confidence, too.

    Raises:
        VggtMvError: a size that does not fit.

    Example:
        >>> import torch
        >>> tracker = BaseTrackerPredictor(stride=2, corr_levels=2, corr_radius=1, latent_dim=8, hidden_size=16,
        ...                                depth=1)
        >>> maps, queries = torch.zeros(1, 3, 8, 7, 10), torch.tensor([[[4.0, 6.0], [10.0, 2.0]]])
        >>> tracks, visibility, confidence = tracker(queries, maps, iters=2)
        >>> len(tracks), tracks[-1].shape, visibility.shape
        (2, torch.Size([1, 3, 2, 2]), torch.Size([1, 3, 2]))
    """

    def __init__(
        self,
        stride: int = 1,
        corr_levels: int = 5,
        corr_radius: int = 4,
        latent_dim: int = 128,
        hidden_size: int = 384,
        use_spaceatt: bool = True,
        depth: int = 6,
        max_scale: float = 518,
        predict_conf: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("stride", stride, 1),
            ("corr_levels", corr_levels, 1),
            ("corr_radius", corr_radius, 0),
            ("depth", depth, 0),
        ):
            if value < least:
                raise VggtMvError(f"BaseTrackerPredictor: {name} must be at least {least}, got {value}")
        if latent_dim < 4 or latent_dim % 4:
            raise VggtMvError(f"BaseTrackerPredictor: latent_dim must be a positive multiple of 4, got {latent_dim}")
        self.stride = stride
        self.corr_levels = corr_levels
        self.corr_radius = corr_radius
        self.latent_dim = latent_dim
        self.max_scale = max_scale
        self.predict_conf = predict_conf

        # [embedding of the displacement, the displacement twice, correlation, feature]
        self.token_dim = 3 * latent_dim + 4
        self.corr_mlp = Mlp(
            in_features=corr_levels * (2 * corr_radius + 1) ** 2, hidden_features=hidden_size, out_features=latent_dim
        )
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, self.token_dim))
        self.updateformer = UpdateTransformer(
            self.token_dim, hidden_size, latent_dim + 2, depth, space_attention=use_spaceatt
        )
        self.fmap_norm = nn.LayerNorm(latent_dim)
        self.ffeat_norm = nn.GroupNorm(1, latent_dim)
        self.ffeat_updater = nn.Sequential(nn.Linear(latent_dim, latent_dim), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(latent_dim, 1))
        if predict_conf:
            self.conf_predictor = nn.Sequential(nn.Linear(latent_dim, 1))

    def forward(
        self,
        query_points: Tensor,
        fmaps: Tensor | None = None,
        iters: int = 6,
        return_feat: bool = False,
        down_ratio: int = 1,
        apply_sigmoid: bool = True,
    ) -> tuple[list[Tensor], Tensor, Tensor | None] | tuple[list[Tensor], Tensor, Tensor | None, Tensor]:
        """Follows the points.

        Args:
            query_points: ``[B, N, 2]`` (x, y) in frame 0, in image pixels.
            fmaps: ``[B, S, F, h, w]`` feature maps of the frames, ``stride * down_ratio`` pixels a cell. Required.
            iters: number of iterations.
            return_feat: return the final features, too.
            down_ratio: further ratio of the image to the maps, on top of `stride`.
            apply_sigmoid: False returns the logits of visibility and confidence.

        Returns:
            tracks: list of ``[B, S, N, 2]`` in image pixels, one per iteration, the best last; frame 0 is the query.
            visibility: ``[B, S, N]`` in [0, 1].
            confidence: likewise, or None without `predict_conf`.
            features: ``[B, S, N, F]``, only with `return_feat`.

        Raises:
            VggtMvError: a missing argument, a wrong shape, maps too small for `corr_levels`, or no iteration.
        """
        fmaps = self._check(query_points, fmaps, iters, down_ratio)
        with _without_autocast(fmaps.device):  # the embedding's frequencies are far beyond the precision of bfloat16
            tracks, visibility, confidence, features = self._track(query_points, fmaps, iters, down_ratio)
        if apply_sigmoid:
            visibility = visibility.sigmoid()
            confidence = None if confidence is None else confidence.sigmoid()
        if return_feat:
            return tracks, visibility, confidence, features
        return tracks, visibility, confidence

    def _track(
        self, query_points: Tensor, fmaps: Tensor, iters: int, down_ratio: int
    ) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor]:
        """Tracks of all iterations, logits of visibility and confidence, features."""
        frames = fmaps.shape[1]
        scale = float(self.stride * down_ratio)
        dtype = self.fmap_norm.weight.dtype
        # Half precision has no room for pixel coordinates.
        queries = query_points.to(torch.promote_types(dtype, torch.float32)) / scale

        maps = self.fmap_norm(fmaps.to(dtype).permute(0, 1, 3, 4, 2))
        height, width = maps.shape[2:4]
        pyramid = feature_pyramid(maps.flatten(0, 1), self.corr_levels)
        start = queries.detach()
        features = sample_map(maps[:, 0], start)[:, None].expand(-1, frames, -1, -1)
        coords = start[:, None].expand(-1, frames, -1, -1)
        positions = sampled_position_embedding(start, height, width, self.token_dim)[:, None].to(dtype)
        # Row 0 marks the frame of the queries, row 1 all others.
        reference = self.query_ref_token[:, (torch.arange(frames, device=fmaps.device) > 0).long()]
        constant = positions + reference[:, :, None]

        tracks = []
        for _ in range(iters):
            coords = coords.detach()
            flow = coords - coords[:, :1]
            scaled = flow / self.max_scale
            embedding = flow_embedding(flow, self.latent_dim)
            motion = torch.cat((embedding, scaled, scaled), dim=-1).to(dtype)
            correlation = self.corr_mlp(self._correlation(features, pyramid, coords))
            tokens = torch.cat((motion, correlation, features), dim=-1) + constant
            delta = self.updateformer(tokens.transpose(1, 2)).transpose(1, 2)
            moved = coords[:, 1:] + delta[:, 1:, :, :2]
            coords = torch.cat((queries[:, None], moved), dim=1)
            normed = self.ffeat_norm(delta[..., 2:].reshape(-1, self.latent_dim))
            features = features + self.ffeat_updater(normed).view_as(features)
            tracks.append(coords * scale)

        visibility = self.vis_predictor(features).squeeze(-1)
        confidence = self.conf_predictor(features).squeeze(-1) if self.predict_conf else None
        return tracks, visibility, confidence, features

    def _correlation(self, features: Tensor, pyramid: list[Tensor], coords: Tensor) -> Tensor:
        """``[B, S, N, corr_levels (2r + 1)^2]``, levels in blocks from fine to coarse."""
        shape = features.shape[:3]
        features, coords = features.flatten(0, 1), coords.flatten(0, 1)

        def windows(features: Tensor, *pyramid: Tensor) -> Tensor:
            levels = [
                correlation_window(features, maps, coords / 2**level, self.corr_radius)
                for level, maps in enumerate(pyramid)
            ]
            return torch.cat(levels, dim=-1)

        if torch.is_grad_enabled() and (features.requires_grad or pyramid[0].requires_grad):
            # The gathered cells are many times larger than all else here and quick to gather again.
            correlation = checkpoint(windows, features, *pyramid, use_reentrant=False, preserve_rng_state=False)
        else:
            correlation = windows(features, *pyramid)
        return correlation.unflatten(0, shape[:2])

    def _check(self, query_points: Tensor, fmaps: Tensor | None, iters: int, down_ratio: int) -> Tensor:
        head = "BaseTrackerPredictor"
        if fmaps is None:
            raise VggtMvError(f"{head}: fmaps must be feature maps [B, S, F, h, w], got None")
        if fmaps.ndim != 5 or fmaps.shape[2] != self.latent_dim:
            raise VggtMvError(f"{head}: fmaps must be [B, S, {self.latent_dim}, h, w], got {list(fmaps.shape)}")
        check_query_points(head, query_points, fmaps.shape[0])
        if iters < 1:
            raise VggtMvError(f"{head}: iters must be at least 1, got {iters}")
        if down_ratio < 1:
            raise VggtMvError(f"{head}: down_ratio must be at least 1, got {down_ratio}")
        return fmaps


def check_query_points(head: str, query_points: Tensor | None, batch: int) -> Tensor:
    """The query points, if they are ``[batch, N, 2]`` with N >= 1.

    Raises:
        VggtMvError: they are missing or have another shape.
    """
    if query_points is None:
        raise VggtMvError(f"{head}: query_points must be [B, N, 2] pixel coordinates (x, y) in frame 0, got None")
    if (
        query_points.ndim != 3
        or query_points.shape[0] != batch
        or query_points.shape[2] != 2
        or not query_points.shape[1]
    ):
        raise VggtMvError(
            f"{head}: query_points must be [{batch}, N, 2] with N >= 1 (x, y in pixels of frame 0), "
            f"got {list(query_points.shape)}"
        )
    return query_points
