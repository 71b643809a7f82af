"""One run of a model: where and in what it computes, under which modes, and the account of it."""

from __future__ import annotations

import contextlib
import datetime
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vggt_mv_ext
from vggt_mv.errors import VggtMvError
from vggt_mv.models.vggt import VGGT_MV
from vggt_mv.scene.reconstruction import ProgressCallback
from vggt_mv.utils.pose_enc import pose_encoding_to_extri_intri

__all__ = [
    "ReconstructWarning",
    "Run",
    "describe_backend",
    "dtype_name",
    "evaluation",
    "peak_rss_bytes",
    "resolve_device",
    "resolve_dtype",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ReconstructWarning(UserWarning):
    """A reconstruction that goes on, with something that its caller should know. One line each; the report has them."""


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


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held since it started, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Run:
    """One run: where and in what it computes, and the account of it."""

    def __init__(self, device: torch.device, dtype: str, progress: ProgressCallback | None) -> None:
        self.device = device
        self.dtype = resolve_dtype(dtype, device)
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.memory_state: Tensor | None = None
        self.started = self.last = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        warnings.warn(message, ReconstructWarning, stacklevel=5)

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
        memory_state: Tensor | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """What a Reconstruction holds of the model's predictions for images [1, T, N, 3, H, W], mask [T, N, H, W].

        ``memory_state`` is what a memory bank starts from; what it ends with is ``self.memory_state``.
        """
        _, times, views, _, height, width = images.shape
        as_grid = isinstance(model, VGGT_MV) and not single_sequence
        frames = images if as_grid else images.flatten(1, 2)
        options: dict[str, Any] = {"attention": attention} if as_grid else {}
        if mask is not None:
            given = torch.from_numpy(mask)[None].to(self.device)
            options["dynamic_mask"] = given if as_grid else given.flatten(1, 2)
        if memory_state is not None:
            options["memory_state"] = memory_state.to(self.device)
        try:
            with evaluation(model, self.device), torch.inference_mode(), self.precision():
                points = None if query_points is None else query_points.to(self.device)
                predictions = model(frames.to(self.device), points, on_stage=self.on_stage, **options)
                self.memory_state = predictions.get("memory_state")
                arrays = _collect(predictions, (times, views), (height, width), leading=3 if as_grid else 2)
        except vggt_mv_ext.BackendError as error:
            raise VggtMvError(f"{error}; choose another backend, or 'auto' (VGGT_MV_BACKEND)") from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise VggtMvError(
                f"out of memory on {self.device}: {times * views} frames ({times} times x {views} views) of "
                f"{width}x{height} pixels with {attention} attention in {dtype_name(self.dtype)} are too much; use "
                "fewer frames (max_frames, --max-frames), smaller images (image_size, --image-size) or bfloat16 "
                "(--dtype)"
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
            "dtype": dtype_name(self.dtype),
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
    image = torch.zeros(1, 16, 16, 16, device=device)  # heads are float32
    calls = {
        "residual_scale_norm": (x, x, vector, vector, vector),
        "qk_norm_rope": (qkv, vector, vector, vector, vector),
        "alternating_attention": (qkv,),
        "dual_stream_attention": (qkv,),
        "memory_write": (qkv,),
        "memory_read": (qkv,),
        "landmark_attention": (qkv,),
        "block_dilated_attention": (qkv,),
        "conv3x3": (image, image.new_zeros(16, 16, 3, 3)),
        "packed_linear": (torch.zeros(1024, 64, device=device, dtype=dtype), weight),
    }
    chosen = {}
    for operator, tensors in calls.items():
        explanation = vggt_mv_ext.explain(operator, *tensors)
        chosen[operator] = {"backend": explanation.backend, "passed_over": explanation.passed_over}
    return {"operators": chosen, "build": vggt_mv_ext.build_info()}


@contextlib.contextmanager
def evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # The CPU allocator has no exception of its own.
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without its module: "float32"."""
    return str(dtype).removeprefix("torch.")
