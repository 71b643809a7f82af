"""From images to a Reconstruction: the one function that runs a model, under the right modes, with a full account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.masks import MaskSource, read_masks
from vggt_mv.scene.preprocess import PreprocessedScene
from vggt_mv.scene.preprocess import preprocess as preprocess_scene
from vggt_mv.scene.reconstruction import ProgressCallback, Reconstruction
from vggt_mv.scene.running import ReconstructWarning, describe_backend, peak_rss_bytes, resolve_device, resolve_dtype
from vggt_mv.scene.session import (
    AttentionChoice,
    DtypeChoice,
    Layout,
    PreprocessMode,
    Session,
    Source,
    begin,
    check_attention,
    to_uint8,
)
from vggt_mv.scene.windows import reconstruct_in_windows, refuse_tracks

__all__ = [
    "ReconstructWarning",
    "check_attention",
    "describe_backend",
    "peak_rss_bytes",
    "reconstruct",
    "resolve_device",
    "resolve_dtype",
]


def reconstruct(
    source: Source,
    model: nn.Module,
    *,
    layout: Layout = "auto",
    attention: AttentionChoice = "auto",
    dtype: DtypeChoice = "float32",
    device: str | torch.device = "auto",
    max_frames: int | None = None,
    image_size: int | None = None,
    preprocess: PreprocessMode = "crop",
    query_points: Tensor | NDArray[Any] | Sequence[Sequence[float]] | None = None,
    dynamic_mask: MaskSource | None = None,
    window: int | None = None,
    stride: int | None = None,
    carry_memory: bool = True,
    allow_single: bool = False,
    progress: ProgressCallback | None = None,
) -> Reconstruction:
    """Reconstruct cameras, depth and points of a scene seen by N views over T times.

    Runs under ``torch.inference_mode`` with the model in evaluation mode, under autocast for ``dtype``; the model comes
    back in the mode and on the device it came with.

    Args:
        source: what ``open_scene`` takes (a folder, several folders or videos, a video, a list of images), a Scene, or
            images in [0, 1] in memory, [S, 3, H, W] for one sequence or [T, N, 3, H, W].
        model: a VGGT or VGGT_MV with float32 parameters.
        layout: whether the images of a single folder are views of one moment or times of one camera.
        attention: how the frames of a T x N grid see each other. "joint": all of them as one sequence. "alternating":
            views of one time, then times of one view, in turn. "auto": what the model's weights were trained for. A
            single folder or video is one sequence, which is always joint.
        dtype: what matrix products run in; the parameters stay float32. "auto": bfloat16 (float16 before Ampere) on a
            GPU, float32 elsewhere.
        device: "auto" is where the model is.
        max_frames: use at most this many times (or views of a folder), see ``open_scene``; not for scenes and images in
            memory.
        image_size: width (with "pad": longest side) of the images for the network; by default the model's own.
        preprocess: "crop" fits the width and crops tall images, "pad" fits the longest side and pads to a square.
        query_points: [M, 2] points (x, y) to track, in pixels of the original image of time 0, view 0.
        dynamic_mask: where the scene moves: a folder of masks named as the images, or an array, see
            ``masks.read_masks``; for a VGGT_MV. What it does is up to the model: with ``enable_dual_stream`` it mutes
            what moves for cameras and amplifies it for geometry, without it mutes it for camera and register tokens.
        window: for long recordings: run the model on windows of so many times, and put their results together, see
            ``vggt_mv.scene.windows``. The result lies in memory; ``windows.reconstruct_to_folder`` writes it to disk as
            it goes, in memory that does not depend on the length.
        stride: times from the beginning of a window to that of the next; by default half of ``window``.
        carry_memory: let the memory bank of a model with ``sparse_strategy="memory_bank"`` go on from window to window.
        allow_single: accept a scene of one image.
        progress: called with (stage, steps done, steps in all); stages are "check", "images", those of the model,
            "collect", and with a window "windows"; the others begin anew in each window then.

    Raises:
        VggtMvError: bad input, an option that model, device or dtype cannot follow, or not enough memory.

    Example:
        >>> from vggt_mv.models.configs import build_model                       # doctest: +SKIP
        >>> model = build_model("vggt_mv_demo")                                  # doctest: +SKIP
        >>> reconstruct("scene/", model).save("out/")                            # doctest: +SKIP
    """
    if window is not None:
        refuse_tracks(query_points)
    session = begin(
        source,
        model,
        layout=layout,
        attention=attention,
        dtype=dtype,
        device=device,
        max_frames=max_frames,
        image_size=image_size,
        preprocess=preprocess,
        query_points=query_points,
        dynamic_mask=dynamic_mask,
        allow_single=allow_single,
        progress=progress,
    )
    if window is None:
        if stride is not None:
            raise VggtMvError(f"stride={stride} (--stride) needs a window (--window), which it is the stride of")
        return _in_one_pass(session, query_points)
    return reconstruct_in_windows(session, window, stride, carry_memory=carry_memory)


def _in_one_pass(session: Session, query_points: Any) -> Reconstruction:
    """All frames at once."""
    scene, run = session.scene, session.run
    prepared = preprocess_scene(
        scene, image_size=session.network_size[1], mode=session.mode, on_frame=run.stage("images")
    )
    points = _query_points(query_points, prepared)
    mask = None if session.dynamic_mask is None else read_masks(session.dynamic_mask, scene, prepared.transforms)
    arrays: dict[str, NDArray[Any]] = dict(
        run.predict(session.model, prepared.images, points, session.attention["used"], scene.single_sequence, mask)
    )
    result = session.reconstruction({"images": to_uint8(prepared.images[0]), **arrays})
    result.report = session.report(arrays)
    return result


def _query_points(points: Any, prepared: PreprocessedScene) -> Tensor | None:
    """Query points in network pixels, [M, 2] float32."""
    if points is None:
        return None
    xy = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0:
        raise VggtMvError(f"query_points must be [M, 2] with at least one point, got shape {list(xy.shape)}")
    if not np.isfinite(xy).all():
        raise VggtMvError("query_points must be finite, got NaN or infinity")
    transform = prepared.transforms[0]
    network = transform.points_to_network(xy)
    (height, width), (shown_height, shown_width) = transform.original_size, transform.network_size
    for (x, y), (u, v) in zip(xy, network, strict=True):
        # Whole numbers are pixel centres: the image reaches half a pixel further.
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise VggtMvError(f"query_points must lie in the first image, {width}x{height} pixels, got ({x:g}, {y:g})")
        if not (-0.5 <= u <= shown_width - 0.5 and -0.5 <= v <= shown_height - 0.5):
            raise VggtMvError(
                f"query_points: ({x:g}, {y:g}) is cropped away from the first image; use preprocess='pad'"
            )
    return torch.from_numpy(network.astype(np.float32))
