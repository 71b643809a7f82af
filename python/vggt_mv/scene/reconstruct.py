"""From images to a Reconstruction: the one function that runs a model, under the right modes, with a full account."""

from __future__ import annotations

import contextlib
import datetime
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vggt_mv_ext
from vggt_mv.errors import VggtMvError
from vggt_mv.models.vggt import VGGT_MV
from vggt_mv.scene.masks import MaskSource, read_masks
from vggt_mv.scene.preprocess import PreprocessedScene
from vggt_mv.scene.preprocess import preprocess as preprocess_scene
from vggt_mv.scene.reconstruction import ProgressCallback, Reconstruction
from vggt_mv.scene.sources import Scene, open_scene
from vggt_mv.utils.pose_enc import pose_encoding_to_extri_intri
from vggt_mv.weights import provenance_of

Source = str | Path | Sequence[str | Path] | Scene | Tensor | NDArray[Any]
Layout = Literal["auto", "views", "times"]
AttentionChoice = Literal["auto", "joint", "alternating"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
PreprocessMode = Literal["crop", "pad"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What each family of weights learnt. Random weights learnt nothing: the class's own form.
_LEARNT_ATTENTION = {
    "vggt": "joint",
    "page4d": "joint",
    "pi3": "joint",
    "vggt_mv": "alternating",
    "random": "alternating",
    "unknown": "joint",
}


class ReconstructWarning(UserWarning):
    """A reconstruction that goes on, with something that its caller should know. One line each; the report has them."""


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
        allow_single: accept a scene of one image.
        progress: called with (stage, steps done, steps in all); stages are "check", "images", those of the model, and
            "collect".

    Raises:
        VggtMvError: bad input, an option that model, device or dtype cannot follow, or not enough memory.

    Example:
        >>> from vggt_mv.models.configs import build_model                       # doctest: +SKIP
        >>> model = build_model("vggt_mv_demo")                                  # doctest: +SKIP
        >>> reconstruct("scene/", model).save("out/")                            # doctest: +SKIP
    """
    check_attention(attention)
    _check_model(model, query_points, dynamic_mask)
    run = _Run(resolve_device(device, model), dtype, progress)
    scene = _open(source, layout, max_frames, allow_single, run)
    used, reason = _choose_attention(attention, model, scene, run)
    prepared = preprocess_scene(
        scene,
        image_size=getattr(model, "img_size", 518) if image_size is None else image_size,
        mode=preprocess,
        on_frame=run.stage("images"),
    )
    points = _query_points(query_points, prepared)
    mask = None if dynamic_mask is None else read_masks(dynamic_mask, scene, prepared.transforms)
    arrays = run.predict(model, prepared.images, points, used, scene.single_sequence, mask)
    return Reconstruction(
        images=_to_uint8(prepared.images[0]),
        names=scene.names,
        view_names=scene.view_names,
        times=scene.times,
        transforms=prepared.transforms,
        weights=provenance_of(model),
        report={
            "input": _describe_scene(scene),
            "preprocessing": {"mode": preprocess, "network_size": list(prepared.network_size)},
            "model": _describe_model(model),
            "dynamic_mask": {
                "given": None if dynamic_mask is None else _describe_mask(dynamic_mask),
                "predicted": "dynamic_mask" in arrays,
            },
            "attention": {"requested": attention, "used": used, "reason": reason},
            **run.describe(),
        },
        **arrays,
    )


def resolve_device(device: str | torch.device, model: nn.Module | None = None) -> torch.device:
    """The device that a name means; "auto" is the model's, or without a model a GPU if there is one.

    Raises:
        VggtMvError: a device that does not exist here.
    """
    if device == "auto":
        if model is not None:
            return next(model.parameters()).device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = repr(str(device))
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise VggtMvError(f"device {shown} is not a device; use 'cpu', 'cuda', 'cuda:1', ... or 'auto'") from error
    if place.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU"
            raise VggtMvError(f"device {shown}: {why}; use 'cpu' or 'auto'")
        if place.index is not None and place.index >= torch.cuda.device_count():
            raise VggtMvError(f"device {shown}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    elif place.type != "cpu":
        try:
            torch.zeros(1, device=place).cpu()
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            raise VggtMvError(
                f"device {shown}: this torch cannot compute on it; use 'cpu', 'cuda' or 'auto'"
            ) from error
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means on a device; "auto" is bfloat16 (float16 before Ampere) on CUDA, float32 elsewhere.

    Raises:
        VggtMvError: an unknown name, or a dtype that the device does not compute in.
    """
    bf16_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if bf16_gpu else torch.float16
    if dtype not in _DTYPES:
        raise VggtMvError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {str(dtype)!r}")
    if dtype == "float16" and device.type == "cpu":
        raise VggtMvError("dtype 'float16' is not supported on device 'cpu'; use float32 or bfloat16")
    if dtype == "bfloat16" and device.type == "cuda" and not bf16_gpu:
        name = torch.cuda.get_device_name(device)
        raise VggtMvError(f"dtype 'bfloat16' is not supported on {name}; use float16 or float32")
    return _DTYPES[dtype]


def check_attention(attention: str) -> None:
    """Raise VggtMvError unless it is a choice of attention."""
    if attention not in ("auto", "joint", "alternating"):
        raise VggtMvError(f"attention must be 'auto', 'joint' or 'alternating', got {attention!r}")


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held since it started, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Run:
    """One run: where and in what it computes, and the account of it."""

    def __init__(self, device: torch.device, dtype: str, progress: ProgressCallback | None) -> None:
        self.device = device
        self.dtype = resolve_dtype(dtype, device)
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.started = self.last = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        warnings.warn(message, ReconstructWarning, stacklevel=4)

    def on_stage(self, stage: str, done: int, total: int) -> None:
        """A step of a stage is done: the time since the step before was its."""
        if self.device.type == "cuda" and done == total:
            torch.cuda.synchronize(self.device)  # else a stage's work would count for the next one
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
        if self.progress is not None:
            self.progress(stage, done, total)

    def stage(self, name: str) -> Any:
        return lambda done, total: self.on_stage(name, done, total)

    def precision(self) -> torch.autocast:
        """Autocast for the dtype of this run, whatever the caller's autocast is."""
        if self.dtype == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.dtype)

    def predict(
        self,
        model: nn.Module,
        images: Tensor,
        query_points: Tensor | None,
        attention: str,
        single_sequence: bool,
        mask: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """What a Reconstruction holds of the model's predictions for images [1, T, N, 3, H, W], mask [T, N, H, W]."""
        _, times, views, _, height, width = images.shape
        as_grid = isinstance(model, VGGT_MV) and not single_sequence
        frames = images if as_grid else images.flatten(1, 2)
        options: dict[str, Any] = {"attention": attention} if as_grid else {}
        if mask is not None:
            given = torch.from_numpy(mask)[None].to(self.device)
            options["dynamic_mask"] = given if as_grid else given.flatten(1, 2)
        try:
            with _evaluation(model, self.device), torch.inference_mode(), self.precision():
                points = None if query_points is None else query_points.to(self.device)
                predictions = model(frames.to(self.device), points, on_stage=self.on_stage, **options)
                arrays = _collect(predictions, (times, views), (height, width), leading=3 if as_grid else 2)
        except vggt_mv_ext.BackendError as error:
            raise VggtMvError(f"{error}; choose another backend, or 'auto' (VGGT_MV_BACKEND)") from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise VggtMvError(
                f"out of memory on {self.device}: {times * views} frames ({times} times x {views} views) of "
                f"{width}x{height} pixels with {attention} attention in {_name(self.dtype)} are too much; use fewer "
                "frames (max_frames, --max-frames), smaller images (image_size, --image-size) or bfloat16 (--dtype)"
            ) from error
        if query_points is not None:
            arrays["query_points"] = query_points.numpy()
        if mask is not None:
            arrays["given_mask"] = mask
        self.on_stage("collect", 1, 1)
        return arrays

    def describe(self) -> dict[str, Any]:
        """The part of the report that concerns how it ran."""
        memory = {"process_peak_resident": peak_rss_bytes()}
        device = str(self.device)
        if self.device.type == "cuda":
            memory["cuda_peak_allocated"] = torch.cuda.max_memory_allocated(self.device)
            device = f"{device} ({torch.cuda.get_device_name(self.device)})"
        seconds = {stage: round(value, 4) for stage, value in self.seconds.items()}
        return {
            "dtype": _name(self.dtype),
            "device": device,
            "threads": torch.get_num_threads(),
            "backend": describe_backend(self.device, self.dtype),
            "seconds": {**seconds, "total": round(self.last - self.started, 4)},
            "memory_bytes": memory,
            "warnings": self.warnings,
            "versions": {
                "vggt_mv": vggt_mv_ext.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def describe_backend(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Which code runs each operator on such tensors, why not other code, and what this build holds."""
    x = torch.zeros(1, 1, 1, 8, 64, device=device, dtype=dtype)
    qkv = torch.zeros(1, 1, 1, 8, 3, 1, 64, device=device, dtype=dtype)
    vector = torch.zeros(64, device=device, dtype=dtype)
    weight = nn.Parameter(torch.zeros(64, 64, device=device), requires_grad=False)
    calls = {
        "residual_scale_norm": (x, x, vector, vector, vector),
        "qk_norm_rope": (qkv, vector, vector, vector, vector),
        "alternating_attention": (qkv,),
        "dual_stream_attention": (qkv,),
        "memory_write": (qkv,),
        "memory_read": (qkv,),
        "landmark_attention": (qkv,),
        "block_dilated_attention": (qkv,),
        "packed_linear": (torch.zeros(1024, 64, device=device, dtype=dtype), weight),
    }
    chosen = {}
    for operator, tensors in calls.items():
        explanation = vggt_mv_ext.explain(operator, *tensors)
        chosen[operator] = {"backend": explanation.backend, "passed_over": explanation.passed_over}
    return {"operators": chosen, "build": vggt_mv_ext.build_info()}


@contextlib.contextmanager
def _evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in evaluation mode on a device; afterwards every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    home = next(model.parameters()).device
    moves = home.type != device.type or (device.index is not None and home.index != device.index)
    try:
        model.eval()
        if moves:
            model.to(device)
        yield
    finally:
        if moves:
            model.to(home)
        for module, training in modes:
            module.training = training


def _open(source: Source, layout: Layout, max_frames: int | None, allow_single: bool, run: _Run) -> Scene:
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
        found = ", ".join(sorted(_name(dtype) for dtype in dtypes)) or "none"
        raise VggtMvError(
            f"model must have float32 parameters, got {found}; call model.float(): dtype says what to compute in"
        )
    if query_points is not None and getattr(model, "track_head", None) is None:
        raise VggtMvError("query_points were given, but the model has no track head; build it with enable_track=True")
    if dynamic_mask is not None and not isinstance(model, VGGT_MV):
        raise VggtMvError(f"dynamic_mask (--mask-dir) is for a VGGT_MV, got {type(model).__name__}, which takes none")


def _choose_attention(requested: str, model: nn.Module, scene: Scene, run: _Run) -> tuple[str, str]:
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


def _to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[T, N, 3, H, W] in [0, 1] -> [T, N, H, W, 3]."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy()


def _collect(
    predictions: dict[str, Any], grid: tuple[int, int], image_size: tuple[int, int], leading: int
) -> dict[str, NDArray[np.float32]]:
    """Predictions as float32 arrays [T, N, ...] under the names of a Reconstruction; `leading` dimensions are
    frames'."""
    names = {
        "depth": "depth",
        "depth_conf": "depth_conf",
        "world_points": "world_points",
        "world_points_conf": "world_points_conf",
        "dynamic_mask": "dynamic_mask",
        "tracks": "track",
        "track_vis": "vis",
        "track_conf": "conf",
    }
    values = {name: predictions[key] for name, key in names.items() if predictions.get(key) is not None}
    if predictions.get("pose_enc") is not None:
        # In float32: a rotation in half precision would not be one.
        extrinsics, intrinsics = pose_encoding_to_extri_intri(predictions["pose_enc"].float(), image_size)
        values.update(extrinsics=extrinsics, intrinsics=intrinsics)
    arrays = {}
    for name, value in values.items():
        array = value.detach().float().cpu().numpy()
        array = array.reshape(*grid, *array.shape[leading:])
        arrays[name] = array[..., 0] if name == "depth" else array
    return arrays


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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # The CPU allocator has no exception of its own.
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
