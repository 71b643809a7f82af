"""Which code runs an operator: the one place that chooses.

Three backends exist. `reference` is plain PyTorch and runs everything; `cpu` and `cuda` are this package's kernels and
run what `can_run_cpu` and `can_run_cuda` let through. `auto`, the default, takes the first of `ORDER` that can run the
tensors at hand. Naming a backend forces it: what it cannot run is then an error, not another backend.

The choice is one setting of the process, not of a thread, because autograd runs backward passes on threads of its own.
It starts from the environment variable `VGGT_MV_BACKEND`; `set_backend` and `backend` change it. It is read when an
operator runs, also inside a compiled graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._extension import extension

ORDER = ("cuda", "cpu", "reference")
NAMES = ("auto", *ORDER)

KernelLimits = Callable[..., "str | None"]


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run these tensors."""


@dataclass(frozen=True)
class Operator:
    """What the choice needs to know about an operator.

    Attributes:
        name: the operator's name in `torch.ops.vggt_mv`.
        limits: for each kernel backend that has a kernel of this operator, a function of the operator's tensors that
            returns None, or the reason why that kernel cannot run them. The first tensor decides the device.
        library: who brings the kernels, where it is not this package. Such an operator needs no compiled extension.
        falls_back: whether plain PyTorch runs what the kernels cannot also where a backend is asked for by name: for
            operators that PyTorch has itself, and whose kernels are for some sizes and devices only.
    """

    name: str
    limits: dict[str, KernelLimits] = field(default_factory=dict)
    library: str | None = None
    falls_back: bool = False


def can_run_reference(operator: Operator, *tensors: Tensor | None) -> str | None:
    """Plain PyTorch runs every operator, on every device and in every floating-point dtype."""
    return None


def can_run_cpu(operator: Operator, *tensors: Tensor | None) -> str | None:
    """Returns None where the CPU kernel runs these tensors, else the reason why not."""
    if tensors[0].device.type != "cpu":  # type: ignore[union-attr]
        return f"the tensors are on {tensors[0].device}"  # type: ignore[union-attr]
    if "cpu" not in operator.limits:
        return f"{operator.name} has no CPU kernel in this version"
    if operator.library is not None:
        return operator.limits["cpu"](*tensors)
    if extension is None:
        return "this build has no compiled kernels (vggt_mv_ext.build_info() says why)"
    return operator.limits["cpu"](*tensors)


def can_run_cuda(operator: Operator, *tensors: Tensor | None) -> str | None:
    """Returns None where the CUDA kernel runs these tensors, else the reason why not."""
    if tensors[0].device.type != "cuda":  # type: ignore[union-attr]
        return f"the tensors are on {tensors[0].device}"  # type: ignore[union-attr]
    if "cuda" not in operator.limits:
        return f"{operator.name} has no CUDA kernel in this version"
    if operator.library is not None:
        return operator.limits["cuda"](*tensors)
    if extension is None:
        return "this build has no compiled kernels (vggt_mv_ext.build_info() says why)"
    if not extension.has_cuda:
        return "this build has no CUDA kernels (vggt_mv_ext.build_info() says why)"
    return operator.limits["cuda"](*tensors)


CAN_RUN: dict[str, Callable[..., str | None]] = {
    "cuda": can_run_cuda,
    "cpu": can_run_cpu,
    "reference": can_run_reference,
}


def _checked_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: must be one of {', '.join(NAMES)}; got {name!r}")
    return name


_setting = _checked_name(os.environ.get("VGGT_MV_BACKEND") or "auto", "environment variable VGGT_MV_BACKEND")


def get_backend() -> str:
    """Returns the backend asked for: `auto` or the name of one."""
    return _setting


def set_backend(name: str) -> None:
    """Chooses the backend of every operator from now on, for the whole process.

    Args:
        name: `auto`, `reference`, `cpu` or `cuda`.

    Raises:
        ValueError: no such backend.
    """
    global _setting
    _setting = _checked_name(name, "set_backend, name")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend inside a `with` block, and restores the earlier choice after it.

    The setting is one for the process: threads that run at the same time see it too. A backward pass takes the backend
    that is chosen when it runs, so it belongs inside the block as well.

    Args:
        name: `auto`, `reference`, `cpu` or `cuda`.

    Raises:
        ValueError: no such backend.

    Example:
        >>> import vggt_mv_ext
        >>> with vggt_mv_ext.backend("reference"):
        ...     vggt_mv_ext.get_backend()
        'reference'
    """
    before = _setting
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def choose(operator: Operator, *tensors: Tensor | None) -> str:
    """Returns the backend that runs `operator` on `tensors` now.

    Raises:
        BackendError: the backend that was asked for by name cannot run them.
    """
    if _setting == "auto":
        for name in ORDER:
            if CAN_RUN[name](operator, *tensors) is None:
                return name
    reason = CAN_RUN[_setting](operator, *tensors)
    if reason is not None and operator.falls_back:
        return "reference"
    if reason is not None:
        raise BackendError(f"{operator.name}: backend {_setting!r} was asked for and cannot run this call: {reason}")
    return _setting


@dataclass(frozen=True)
class Explanation:
    """Which backend an operator takes for given tensors, and why not the others.

    Attributes:
        operator: the operator's name.
        setting: the backend asked for, `auto` or a name.
        backend: the backend that runs the call, or None where the one asked for cannot.
        passed_over: backend -> reason, for every backend that cannot run the call or was not asked for.
    """

    operator: str
    setting: str
    backend: str | None
    passed_over: dict[str, str]

    def __str__(self) -> str:
        """One line for the choice and one for each backend passed over."""
        lines = [f"{self.operator}: runs on {self.backend or 'nothing'} (asked for: {self.setting})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.passed_over.items()])


def explain_choice(operator: Operator, *tensors: Tensor | None) -> Explanation:
    """Works out what `choose` would do, without running anything."""
    chosen: str | None = None
    passed_over: dict[str, str] = {}
    for name in ORDER:
        reason = CAN_RUN[name](operator, *tensors)
        if reason is not None:
            passed_over[name] = reason
        elif _setting not in ("auto", name) and not (name == "reference" and operator.falls_back and chosen is None):
            passed_over[name] = f"{_setting} was asked for"
        elif chosen is not None:
            passed_over[name] = f"{chosen} comes first"
        else:
            chosen = name
    return Explanation(operator.name, _setting, chosen, passed_over)


def build_info() -> dict[str, Any]:
    """Describes this build: what was compiled, what was left out and why, and what this machine makes of it.

    Returns:
        A dictionary that JSON can hold: `kind` (`full` or `no_ext`), `version`, `reason` (why something is missing),
        `compiler`, `cuda` (None, or toolkit and architectures), `cpu_isas` (instruction sets compiled in), `cpu_isa`
        (the one in use), `setting` (the backend asked for). Keys that do not apply are absent.
    """
    from ._extension import build_record

    info = dict(build_record)
    info["setting"] = _setting
    if extension is not None:
        info.update(extension.build_info())
    return info
