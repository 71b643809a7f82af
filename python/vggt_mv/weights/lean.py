"""Build a model around a checkpoint: no memory for weights that the file's own tensors replace in a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vggt_mv.weights.apply import LoadProgress, carry_out
from vggt_mv.weights.files import WeightsFile, open_weights
from vggt_mv.weights.plan import plan_load
from vggt_mv.weights.provenance import record_load
from vggt_mv.weights.report import LoadReport

__all__ = ["build_from_weights", "parameters_on_meta"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@contextmanager
def parameters_on_meta(keep: Callable[[int], bool] | None = None) -> Iterator[list[tuple[nn.Module, str]]]:
    """Parameters that modules register in this block are on the meta device; buffers are real.

    Building under ``torch.device("meta")`` would lose the buffers that no file holds, and fails where a constructor
    computes with numbers. Initialisation of meta tensors costs nothing. Acts on the calling thread alone.

    Args:
        keep: given the number of a registration (0, 1, ...), whether that parameter stays real.

    Yields:
        The list of registrations so far: (module, name of the parameter).

    Example:
        >>> with parameters_on_meta():
        ...     layer = nn.BatchNorm1d(4)
        >>> layer.weight.is_meta, layer.running_mean.is_meta
        (True, False)
    """
    thread = threading.get_ident()
    registered: list[tuple[nn.Module, str]] = []

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or threading.get_ident() != thread:
            return None
        registered.append((module, name))
        if parameter.is_meta or (keep is not None and keep(len(registered) - 1)):
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with _SkipNormal():
            yield registered
    finally:
        handle.remove()


class _SkipNormal(TorchFunctionMode):
    """``normal_`` of a meta tensor does nothing, but the first one imports 800 modules of torch: seconds and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_from_weights(
    build: Callable[[], ModelT],
    source: str | Path | WeightsFile,
    *,
    strict: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    unsafe_pickle: bool = False,
    progress: LoadProgress | None = None,
    **hub: Any,
) -> tuple[ModelT, LoadReport]:
    """A model with the weights of a checkpoint, at little more memory than the checkpoint takes.

    On the CPU the parameters *are* the mapped file (private pages: training never writes to it). Replacing the file by
    another is safe, overwriting its bytes in place while the model lives is not.

    Args:
        build: makes the model; called again where the file leaves tensors to their initial values.
        source: file, folder, shard index, hub id, or an opened file.
        strict: every tensor must have its counterpart. Else what the file lacks keeps its initial values, as reported.
        device: where the parameters go.
        dtype: floating-point dtype of the parameters; None keeps the model's. What differs in the file is converted,
            which the report says, and then needs memory.
        unsafe_pickle, progress: as for `load_pretrained_weights`.
        hub: ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only``.

    Returns:
        The model and the report.

    Raises:
        WeightsError: see its subclasses.
    """
    file = source if isinstance(source, WeightsFile) else open_weights(source, unsafe_pickle=unsafe_pickle, **hub)
    with parameters_on_meta() as registered:
        model = build()
    plan = plan_load(model, file)
    report = plan.report()
    if strict:
        report.raise_unless_strict()
    kept = {
        entry.target_key for entry in report.entries if entry.wins and entry.status in ("kept_init", "shape_mismatch")
    }
    if kept:
        model = _rebuild(build, model, registered, {name for name in kept if name is not None})
    report = carry_out(
        model,
        plan,
        device=device,
        assign=True,
        dtype=dtype,
        finite="raise" if strict else "warn",
        progress=progress,
        own_files=not isinstance(source, WeightsFile),
    )
    if torch.device(device).type != "cpu" or (dtype is not None and kept):
        model.to(device=device, dtype=dtype)  # buffers, and the parameters that keep their initial values
    record_load(model, report)
    return model, report


def _rebuild(
    build: Callable[[], ModelT], model: ModelT, registered: list[tuple[nn.Module, str]], kept: set[str]
) -> ModelT:
    """The model again, with real initial values for the parameters `kept` and the others on the meta device.

    Constructors register parameters in the same order every time, so a parameter is known by its number. Where that
    does not hold the model is built whole.
    """
    slots = {
        (id(module), name)
        for path, module in model.named_modules()
        for name in module._parameters
        if (f"{path}.{name}" if path else name) in kept
    }
    numbers = {number for number, (module, name) in enumerate(registered) if (id(module), name) in slots}
    try:
        with parameters_on_meta(numbers.__contains__) as again:
            rebuilt = build()
        names = [(type(module), name) for module, name in registered]
        whole = [(type(module), name) for module, name in again] == names
    except (RuntimeError, NotImplementedError):  # an initial value was computed from a meta tensor
        whole = False
    if whole:
        state = rebuilt.state_dict()
        if not any(state[name].is_meta for name in kept if name in state):
            return rebuilt
    return build()
