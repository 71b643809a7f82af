"""A scene and a model that fit each other: all that is settled before the first frame is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.models.vggt import VGGT_MV
from vggt_mv.scene.masks import MaskSource
from vggt_mv.scene.preprocess import ViewTransform, plan_transforms
from vggt_mv.scene.reconstruction import ProgressCallback, Reconstruction
from vggt_mv.scene.running import Run, dtype_name, resolve_device
from vggt_mv.scene.sources import Scene, open_scene
from vggt_mv.weights import provenance_of

__all__ = [
    "AttentionChoice",
    "DtypeChoice",
    "Layout",
    "PreprocessMode",
    "Session",
    "Source",
    "begin",
    "check_attention",
    "to_uint8",
]

Source = str | Path | Sequence[str | Path] | Scene | Tensor | NDArray[Any]
Layout = Literal["auto", "views", "times"]
AttentionChoice = Literal["auto", "joint", "alternating"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
PreprocessMode = Literal["crop", "pad"]

# What each family of weights learnt. Random weights learnt nothing: the class's own form.
_LEARNT_ATTENTION = {
    "vggt": "joint",
    "page4d": "joint",
    "pi3": "joint",
    "vggt_mv": "alternating",
    "random": "alternating",
    "unknown": "joint",
}


@dataclass(frozen=True)
class Session:
    """A scene, a model, and how the one goes through the other.

    Attributes:
        attention: "requested", "used" and "reason", for the report.
        transforms: one per view.
        mode: of preprocessing.
        dynamic_mask: given by the caller, not yet read.
    """

    scene: Scene
    model: nn.Module
    run: Run
    attention: dict[str, str]
    transforms: list[ViewTransform]
    mode: PreprocessMode
    dynamic_mask: MaskSource | None

    @property
    def network_size(self) -> tuple[int, int]:
        """(H, W) of the images that the network sees."""
        return self.transforms[0].network_size

    def reconstruction(self, arrays: dict[str, NDArray[Any]], start: int = 0) -> Reconstruction:
        """Predictions [T, N, ...] by name, "images" (uint8) among them, of the times from ``start`` on.

        The report is left empty, see ``report``.
        """
        times = slice(start, start + len(arrays["images"]))
        scene, named = self.scene, dict[str, Any](arrays)
        return Reconstruction(
            names=scene.names[times],
            view_names=scene.view_names,
            times=None if scene.times is None else scene.times[times],
            transforms=self.transforms,
            weights=provenance_of(self.model),
            **named,
        )

    def report(self, predicted: Collection[str]) -> dict[str, Any]:
        """The account of the run so far; ``predicted`` are the names of arrays."""
        given = None if self.dynamic_mask is None else _describe_mask(self.dynamic_mask)
        return {
            "input": _describe_scene(self.scene),
            "preprocessing": {"mode": self.mode, "network_size": list(self.network_size)},
            "model": _describe_model(self.model),
            "dynamic_mask": {"given": given, "predicted": "dynamic_mask" in predicted},
            "attention": self.attention,
            **self.run.describe(),
        }


def begin(
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
    query_points: Any = None,
    dynamic_mask: MaskSource | None = None,
    allow_single: bool = False,
    progress: ProgressCallback | None = None,
) -> Session:
    """Open the source and check it, the model and all options; for the arguments see ``reconstruct``.

    Raises:
        VggtMvError: whatever can be found wrong before images are decoded.
    """
    check_attention(attention)
    _check_model(model, query_points, dynamic_mask)
    run = Run(resolve_device(device, model), dtype, progress)
    scene = _open(source, layout, max_frames, allow_single, run)
    used, reason = _choose_attention(attention, model, scene, run)
    size = getattr(model, "img_size", 518) if image_size is None else image_size
    return Session(
        scene=scene,
        model=model,
        run=run,
        attention={"requested": attention, "used": used, "reason": reason},
        transforms=plan_transforms(scene, image_size=size, mode=preprocess),
        mode=preprocess,
        dynamic_mask=dynamic_mask,
    )


def check_attention(attention: str) -> None:
    """Raise VggtMvError unless it is a choice of attention."""
    if attention not in ("auto", "joint", "alternating"):
        raise VggtMvError(f"attention must be 'auto', 'joint' or 'alternating', got {attention!r}")


def _open(source: Source, layout: Layout, max_frames: int | None, allow_single: bool, run: Run) -> Scene:
    if isinstance(source, Scene | Tensor | np.ndarray):
        if max_frames is not None:
            raise VggtMvError("max_frames is for files; of a scene or images in memory, choose the frames yourself")
        if not isinstance(source, Scene):
            return Scene.from_tensor(source, layout=layout, allow_single=allow_single)
        if layout != "auto":
            raise VggtMvError(f"layout={layout!r} is for files and images; a Scene has its layout already")
        return source
    return open_scene(
        source, layout=layout, max_frames=max_frames, allow_single=allow_single, on_frame=run.stage("check")
    )


def _check_model(model: nn.Module, query_points: Any, dynamic_mask: Any) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(dtype_name(dtype) for dtype in dtypes)) or "none"
        raise VggtMvError(
            f"model must have float32 parameters, got {found}; call model.float(): dtype says what to compute in"
        )
    if query_points is not None and getattr(model, "track_head", None) is None:
        raise VggtMvError("query_points were given, but the model has no track head; build it with enable_track=True")
    if dynamic_mask is not None and not isinstance(model, VGGT_MV):
        raise VggtMvError(f"dynamic_mask (--mask-dir) is for a VGGT_MV, got {type(model).__name__}, which takes none")


def _choose_attention(requested: str, model: nn.Module, scene: Scene, run: Run) -> tuple[str, str]:
    """("joint" or "alternating", why). Warns where a forced choice is not what the weights were trained for."""
    if scene.single_sequence:
        if requested == "alternating":
            run.warn("attention='alternating' is ignored: a single folder or video is one sequence")
        return "joint", "a single folder or video is one sequence"
    if not isinstance(model, VGGT_MV):
        if requested == "alternating":
            raise VggtMvError(
                f"attention='alternating' needs a VGGT_MV, got {type(model).__name__}; use 'joint' or 'auto'"
            )
        return "joint", f"{type(model).__name__} knows sequences only"
    family = provenance_of(model).family
    learnt = _LEARNT_ATTENTION[family]
    if family == "unknown":
        reason = "weights of unknown origin are taken for public ones, which learnt joint attention"
        if requested == "auto":
            run.warn(f"{reason}; if these did not, use attention='alternating' (--attention alternating)")
    elif family == "random":
        reason = "random weights learnt nothing; alternating is VGGT_MV's own form"
    else:
        reason = f"{family} weights learnt {learnt} attention"
        if requested not in ("auto", learnt):
            run.warn(f"attention={requested!r} was asked for, but {reason}: expect poor results")
    return (learnt, reason) if requested == "auto" else (requested, "asked for")


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[T, N, 3, H, W] in [0, 1] -> [T, N, H, W, 3]."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy()


def _describe_scene(scene: Scene) -> dict[str, Any]:
    return {
        "source": scene.source,
        "kind": scene.kind,
        "layout": scene.layout,
        "times": scene.num_times,
        "views": scene.num_views,
        "single_sequence": scene.single_sequence,
        "original_sizes": [list(size) for size in scene.image_sizes],
        "notes": scene.notes,
    }


def _describe_model(model: nn.Module) -> dict[str, Any]:
    aggregator = getattr(model, "aggregator", None)
    sparse = list(getattr(aggregator, "sparse_global_layers", ()))
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dual_stream": bool(getattr(aggregator, "enable_dual_stream", False)),
        "sparse_global": {"strategy": aggregator.sparse_strategy, "layers": sparse} if aggregator and sparse else None,
    }


def _describe_mask(dynamic_mask: MaskSource) -> str:
    return str(dynamic_mask) if isinstance(dynamic_mask, str | Path) else f"array {list(dynamic_mask.shape)}"
