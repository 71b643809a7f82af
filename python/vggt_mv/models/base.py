"""What `VGGT` and `VGGT_MV` share: the aggregator, the heads, and the way from images to predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.camera_head import CameraHead
from vggt_mv.heads.dpt_head import DPTHead
from vggt_mv.heads.track_head import TrackHead
from vggt_mv.layers.precision import without_autocast
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.hub import PretrainedModel
from vggt_mv.models.inputs import check_image_values, check_images, check_mask_values
from vggt_mv.models.options import StageCallback, check_option_names, check_option_types, parameter_names
from vggt_mv.weights import pages
from vggt_mv.weights.inference import InferenceReport, optimize_for_inference

__all__ = ["VGGTBase"]


class VGGTBase(PretrainedModel):
    """An `Aggregator` and the heads that read it."""

    # Parts that run without autocast, in the dtype of their weights.
    HEADS = ("camera_head", "depth_head", "point_head", "track_head")

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        *,
        enable_camera: bool,
        enable_point: bool,
        enable_depth: bool,
        enable_track: bool,
        camera_head_options: Mapping[str, Any] | None,
        dpt_head_options: Mapping[str, Any] | None,
        track_head_options: Mapping[str, Any] | None,
        aggregator_options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        known = parameter_names(Aggregator.__init__)
        check_option_names(owner, aggregator_options, [*known, *parameter_names(type(self).__init__)])
        camera_options = _head_options(owner, "camera_head_options", camera_head_options, CameraHead)
        dpt_options = _head_options(owner, "dpt_head_options", dpt_head_options, DPTHead)
        track_options = _head_options(owner, "track_head_options", track_head_options, TrackHead)
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self._options = dict(aggregator_options)  # for save_pretrained, which needs them to be JSON
        self.aggregator = Aggregator(img_size, patch_size, embed_dim, **aggregator_options)
        # On either side of the concatenation of two attentions.
        width = 2 * embed_dim
        dense = {"dim_in": width, "patch_size": patch_size}
        point_options = {**dense, "output_dim": 4, "activation": "inv_log", "conf_activation": "expp1", **dpt_options}
        depth_options = {**dense, "output_dim": 2, "activation": "exp", "conf_activation": "expp1", **dpt_options}
        self.camera_head = CameraHead(**{"dim_in": width, **camera_options}) if enable_camera else None
        self.point_head = DPTHead(**point_options) if enable_point else None
        self.depth_head = DPTHead(**depth_options) if enable_depth else None
        self.track_head = TrackHead(**{**dense, **track_options}) if enable_track else None
        depth = self.aggregator.depth
        for name, layer in self._layers_read():
            if not 0 <= layer < depth:
                raise VggtMvError(
                    f"{owner}: {name} must read outputs in 0..depth-1 = 0..{depth - 1} (intermediate_layer_idx), "
                    f"got {layer}"
                )

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        *,
        release: bool = True,
        folder: str | Path | None = None,
        keep_freed: bool = True,
    ) -> InferenceReport:
        """Pack the weights of all Linears for a CPU, in the plain weights' place in memory.

        See `vggt_mv.weights.optimize_for_inference`.
        """
        return optimize_for_inference(self, dtype, release=release, folder=folder, keep_freed=keep_freed)

    def _layers_read(self, tracks: bool = True) -> list[tuple[str, int]]:
        """(head, output of the aggregator) for all that the heads read."""
        dense: list[tuple[str, DPTHead | None]] = [("point_head", self.point_head), ("depth_head", self.depth_head)]
        if tracks and self.track_head is not None:
            dense.append(("track_head", self.track_head.feature_extractor))
        layers = [("camera_head", self.aggregator.depth - 1)] if self.camera_head is not None else []
        return layers + [(n, layer) for n, head in dense if head is not None for layer in head.intermediate_layer_idx]

    def _predict(
        self,
        images: Tensor,
        query_points: Tensor | None,
        on_stage: StageCallback | None,
        dynamic_mask: Tensor | None = None,
        joint: bool = False,
        memory_state: Tensor | None = None,
        landmark_confidence: Tensor | None = None,
    ) -> dict[str, Any]:
        """Images of any rank to the dict of predictions; `joint` makes one sequence of times x views."""
        owner = type(self).__name__
        check_images(owner, images, self.patch_size)
        check_image_values(owner, images)
        if dynamic_mask is not None:
            check_mask_values(owner, dynamic_mask)
        if query_points is not None and self.track_head is None:
            raise VggtMvError(f"{owner}: query_points must be None for a model built with enable_track=False")
        per_pixel = {"dynamic_mask": dynamic_mask, "landmark_confidence": landmark_confidence}
        if images.ndim == 4:
            images = images.unsqueeze(0)
            per_pixel = {name: None if value is None else value.unsqueeze(0) for name, value in per_pixel.items()}
        grid = tuple(images.shape[1:-3])
        sequence = images.flatten(1, -4)
        if joint:
            per_pixel = {
                name: value.flatten(1, 2) if value is not None and value.ndim == 5 else value
                for name, value in per_pixel.items()
            }
        dense = {layer for name, layer in self._layers_read(tracks=query_points is not None) if name != "camera_head"}
        last = {layer for name, layer in self._layers_read() if name == "camera_head"}
        # Memory that one frame leaves is kept for the next one. Several frames have tensors of so many sizes that what
        # is kept would have room for few of them, and add to the peak.
        if several := sequence.shape[:2].numel() > 1:
            pages.trim_kept()
        outputs, patch_start_idx, *rest = self.aggregator(
            sequence if joint else images,
            keep_outputs=dense if self.aggregator.enable_dual_stream else dense | last,
            keep_pose_outputs=last,
            on_stage=on_stage,
            memory_state=memory_state,
            **per_pixel,
        )
        extras = (rest[0] if rest else None) or {}
        # The heads know one sequence, t-major. Cameras are the pose stream's business.
        outputs, pose = ([_flatten(x) for x in stream] for stream in (outputs, extras.get("pose", outputs)))
        if several:
            pages.trim_kept()
        # Depth and cameras are regressed: 16 bits would cost accuracy where there is little time to win.
        with without_autocast(images.device):
            predictions = self._run_heads(outputs, pose, sequence, patch_start_idx, query_points, on_stage)
        if "dynamic_mask" in extras:
            predictions["dynamic_mask"] = _flatten(extras["dynamic_mask"])
        predictions = {name: _unflatten(value, grid) for name, value in predictions.items()}
        if "memory_state" in extras:
            predictions["memory_state"] = extras["memory_state"]
        predictions["images"] = images
        return predictions

    def _run_heads(
        self,
        outputs: list[Tensor | None],
        pose: list[Tensor | None],
        images: Tensor,
        patch_start_idx: int,
        query_points: Tensor | None,
        on_stage: StageCallback | None,
    ) -> dict[str, Any]:
        """All heads there are, on frames ``[B, S]``: cameras from outputs `pose`, all others from `outputs`."""
        report = on_stage or (lambda stage, done, total: None)
        predictions: dict[str, Any] = {}
        if self.camera_head is not None:
            report("camera", 0, 1)
            predictions["pose_enc_list"] = self.camera_head(pose)
            predictions["pose_enc"] = predictions["pose_enc_list"][-1]
            report("camera", 1, 1)
        if self.depth_head is not None:
            report("depth", 0, 1)
            predictions["depth"], predictions["depth_conf"] = self.depth_head(outputs, images, patch_start_idx)
            report("depth", 1, 1)
        if self.point_head is not None:
            report("points", 0, 1)
            points, confidence = self.point_head(outputs, images, patch_start_idx)
            predictions["world_points"], predictions["world_points_conf"] = points, confidence
            report("points", 1, 1)
        if self.track_head is not None and query_points is not None:
            report("tracks", 0, 1)
            queries = query_points.unsqueeze(0) if query_points.ndim == 2 else query_points
            track_list, visibility, confidence = self.track_head(outputs, images, patch_start_idx, query_points=queries)
            predictions |= {"track_list": track_list, "track": track_list[-1], "vis": visibility}
            if confidence is not None:
                predictions["conf"] = confidence
            report("tracks", 1, 1)
        return predictions


def _head_options(owner: str, name: str, options: Mapping[str, Any] | None, head: type[nn.Module]) -> dict[str, Any]:
    options = dict(options or {})
    check_option_names(f"{owner}: {name}", options, parameter_names(head.__init__))
    check_option_types(f"{owner}: {name}", options, head.__init__)
    return options


def _flatten(x: Tensor | None) -> Tensor | None:
    """``[B, T, N, ., .]`` -> ``[B, S, ., .]``, t-major; what is a sequence stays."""
    return x.flatten(1, 2) if x is not None and x.ndim == 5 else x


def _unflatten(value: Any, grid: tuple[int, ...]) -> Any:
    """``[B, S, ...]`` -> ``[B, *grid, ...]``, also in lists."""
    if isinstance(value, list):
        return [_unflatten(item, grid) for item in value]
    return value.unflatten(1, grid) if len(grid) > 1 else value
