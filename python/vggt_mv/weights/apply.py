"""Tensors into the model: all is checked before anything is written, and a failure leaves the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vggt_mv.weights import pages
from vggt_mv.weights.errors import AliasConflictError, TensorValueError, WeightsError, WeightsWarning
from vggt_mv.weights.files import dtype_name
from vggt_mv.weights.plan import FLOATS, LoadPlan, Step
from vggt_mv.weights.report import LoadReport
from vggt_mv.weights.spec import ModelSpec

__all__ = ["Finite", "LoadProgress", "apply_plan"]

LoadProgress = Callable[[str, int, int], None]  # (stage "check" or "write", bytes done, bytes in all)
Finite = Literal["warn", "raise", "skip"]

_READ_AHEAD = 256 << 20  # bytes of a mapped file that are asked for ahead of their use


def apply_plan(
    model: nn.Module,
    plan: LoadPlan,
    *,
    device: str | torch.device = "cpu",
    assign: bool = False,
    dtype: torch.dtype | None = None,
    finite: Finite = "warn",
    progress: LoadProgress | None = None,
) -> LoadReport:
    """Carry out a plan.

    First every tensor is read and checked: dtype, equality of tensors that a file names twice, NaN and Inf. Only then
    the model is written to, and whatever happens meanwhile (also an interrupt), it is put back as it was.

    Args:
        model: the model that the plan was made for, or one with the same names and shapes.
        plan: from `plan_load`, made with tensors.
        device: where tensors of the meta device are put. Other tensors of the model stay where they are.
        assign: put the file's own tensors into the model instead of copying their values. No memory is needed where
            dtype and device agree, but the model then reads from the mapped file: do not overwrite that file in place
            (`save_pretrained` is safe, ``torch.save`` to the same path is not). Tensors on the meta device are
            always assigned. Without `assign`, values are copied into the model's memory, and the old ones are kept
            until the load is complete: this takes the size of the loaded part once more for that long.
        dtype: floating-point dtype for what is assigned; None keeps the model's.
        finite: what a NaN or Inf does: a warning, an error, or ``"skip"`` the search for them.
        progress: called with ("check" or "write", bytes done, bytes in all).

    Returns:
        The report of the plan, with what was seen of values and dtypes.

    Raises:
        AliasConflictError: two names of one tensor in one file hold different values.
        TensorValueError: a dtype that cannot be used, or NaN/Inf with ``finite="raise"``.
        WeightsError: the plan is for another model, or was made from shapes.
    """
    return carry_out(model, plan, device=device, assign=assign, dtype=dtype, finite=finite, progress=progress)


def carry_out(
    model: nn.Module,
    plan: LoadPlan,
    *,
    device: str | torch.device = "cpu",
    assign: bool = False,
    dtype: torch.dtype | None = None,
    finite: Finite = "warn",
    progress: LoadProgress | None = None,
    own_files: bool = False,
) -> LoadReport:
    """`apply_plan`; `own_files` says that nobody else has the mapped tensors, so read pages are given back."""
    if finite not in ("warn", "raise", "skip"):
        raise WeightsError(f"finite must be 'warn', 'raise' or 'skip', got {finite!r}")
    if dtype is not None and dtype not in FLOATS:
        raise WeightsError(f"dtype must be one of {', '.join(map(dtype_name, FLOATS))}, got {dtype_name(dtype)}")
    device = torch.device(device)
    _check_model(model, plan)
    tensors = _Tensors(plan, own_files)
    slots = _slots(model)
    passing = {target for target, places in slots.items() if not places[0].get().is_meta}
    flags = _check_values(plan, tensors, finite, progress, passing)
    with torch.no_grad():
        writer = _Writer(model, slots, device, assign, dtype)
        changed = writer.write(plan, tensors, progress)
        _make_buffers(model, device)
    return _finish(plan, flags, changed, model)


class _Tensors:
    """The tensors of a plan's sources, and the way to give back the pages of mapped ones."""

    def __init__(self, plan: LoadPlan, own_files: bool) -> None:
        self._own_files = own_files
        self._sources = plan.sources
        for role, source in plan.sources.items():
            for key, value in source.file.tensors.items():
                if not isinstance(value, Tensor):
                    raise WeightsError(
                        f"the plan of {source.file.path} was made from shapes: {role} {key!r} has no values to load"
                    )
                if value.is_meta:
                    raise WeightsError(f"{source.file.path}: {key!r} is on the meta device and has no values")

    def get(self, role: str, key: str) -> Tensor:
        value: Tensor = self._sources[role].file.tensors[key]
        return value.detach()

    def path(self, role: str) -> str:
        return self._sources[role].file.path

    def in_file_order(self, steps: list[Step]) -> Iterator[Step]:
        """Steps by the place of their tensors in memory, which for a mapped file is their place on the disk.

        The disk is told what comes next, or it would wait for every page that the processor asks for.
        """
        order = sorted(steps, key=lambda step: (step.role, self.get(step.role, step.key).data_ptr()))
        announced, ahead = 0, 0
        for step in order:
            while announced < len(order) and ahead < _READ_AHEAD:
                coming = order[announced]
                if self._sources[coming.role].file.mapped:
                    pages.read_ahead(self.get(coming.role, coming.key))
                ahead += self.get(coming.role, coming.key).nbytes
                announced += 1
            ahead -= self.get(step.role, step.key).nbytes
            yield step

    def release(self, role: str, key: str) -> None:
        """Give back the pages of a mapped tensor that was read: the file still has them.

        Never where somebody else may have the tensor: what they wrote to it would be gone.
        """
        if self._own_files and self._sources[role].file.mapped:
            pages.drop(self.get(role, key))


def _check_model(model: nn.Module, plan: LoadPlan) -> None:
    spec = ModelSpec.of(model)
    for name, info in plan.spec.tensors.items():
        given = spec.tensors.get(name)
        if given is None or given.shape != info.shape:
            found = "absent" if given is None else str(list(given.shape))
            raise WeightsError(f"the plan is for another model: {name!r} is {list(info.shape)} there and {found} here")
    extra = next((name for name in spec.tensors if name not in plan.spec.tensors), None)
    if extra is not None:
        raise WeightsError(f"the plan is for another model: it does not know {extra!r}")


@dataclass
class _Flags:
    """What was seen of a tensor's values: (role, key) -> text."""

    non_finite: dict[tuple[str, str], str]


def _check_values(
    plan: LoadPlan, tensors: _Tensors, finite: Finite, progress: LoadProgress | None, passing: set[str]
) -> _Flags:
    """Read everything once, in the order of the files. Pages for `passing` targets are given back, to be read again."""
    flags = _Flags({})
    steps = [step for step in plan.steps if step.key]
    total = sum(tensors.get(step.role, step.key).nbytes for step in steps)
    total += sum(2 * tensors.get(role, one).nbytes for role, one, _ in plan.agreements)
    done = 0
    for role, one, other in plan.agreements:
        first, second = tensors.get(role, one), tensors.get(role, other)
        if not equal_values(first, second):
            raise AliasConflictError(
                f"{tensors.path(role)}: {one!r} and {other!r} are one tensor and must be equal, got other values; "
                f"remove one of them from the file"
            )
        done += 2 * first.nbytes
        tensors.release(role, other)
        _tell(progress, "check", done, total)
    for step in steps:
        _check_dtype(plan, step, tensors.get(step.role, step.key), tensors)
    for step in tensors.in_file_order(steps):
        tensor = tensors.get(step.role, step.key)
        if finite != "skip" and (found := non_finite_values(tensor)):
            if finite == "raise":
                raise TensorValueError(f"{tensors.path(step.role)}: {step.key!r} must be finite, got {found}")
            flags.non_finite[step.role, step.key] = found
        if step.target in passing:
            tensors.release(step.role, step.key)
        done += tensor.nbytes
        _tell(progress, "check", done, total)
    return flags


def _check_dtype(plan: LoadPlan, step: Step, tensor: Tensor, tensors: _Tensors) -> None:
    wanted = plan.spec.tensors[step.target].dtype or torch.float32
    if not (tensor.dtype in FLOATS if wanted.is_floating_point else tensor.dtype == wanted):
        raise TensorValueError(
            f"{tensors.path(step.role)}: {step.key!r} must be {dtype_name(wanted)}, got {dtype_name(tensor.dtype)}"
        )


def equal_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values; two NaN of the same bits are the same."""
    if first.shape != second.shape:
        return False
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride() and first.dtype == second.dtype:
        return True
    if first.dtype != second.dtype:
        return torch.equal(first.double(), second.double())
    return torch.equal(_bits(first), _bits(second))  # bits: a NaN equals itself


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def non_finite_values(tensor: Tensor) -> str:
    """``"3 NaN, 1 Inf"``, or nothing. A finite sum has finite terms: one pass, no temporary."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return ""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32))):
        return ""
    counts = {"NaN": int(tensor.isnan().sum()), "Inf": int(tensor.isinf().sum())}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _tell(progress: LoadProgress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


@dataclass(frozen=True)
class _Slot:
    """A place that holds a tensor: an attribute of a module."""

    module: nn.Module
    name: str

    def get(self) -> Tensor:
        value = self._dict()[self.name]
        assert isinstance(value, Tensor)
        return value

    def put(self, tensor: Tensor) -> None:
        self._dict()[self.name] = tensor

    def _dict(self) -> Any:
        parameters = self.module._parameters
        return parameters if self.name in parameters else self.module._buffers


def _slots(model: nn.Module) -> dict[str, list[_Slot]]:
    """Canonical name -> every place that holds the tensor (tied weights have several)."""
    spec = ModelSpec.of(model)
    places: dict[int, list[_Slot]] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append(_Slot(module, name))
    found = {}
    for canonical, actual in spec.names.items():
        path, _, leaf = actual.rpartition(".")
        try:
            slot = _Slot(model.get_submodule(path), leaf)
            found[canonical] = places[id(slot.get())]
        except (AttributeError, KeyError):
            raise WeightsError(f"the model lists {actual!r} in its state dict and has no such attribute") from None
    return found


class _Writer:
    """Writes tensors into a model and remembers how to undo it."""

    def __init__(
        self,
        model: nn.Module,
        slots: dict[str, list[_Slot]],
        device: torch.device,
        assign: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._slots = slots
        self._device = device
        self._assign = assign
        self._dtype = dtype
        self._undo: list[Callable[[], object]] = []
        self._owned: set[int] = set()  # addresses that a tensor of the model already uses

    def write(
        self, plan: LoadPlan, tensors: _Tensors, progress: LoadProgress | None
    ) -> dict[tuple[str, str], tuple[str, str]]:
        """Carry out every step; returns (role, key) -> (dtype before, dtype after) of what was converted."""
        changed = {}
        sizes = [plan.spec.tensors[step.target].nbytes for step in plan.steps]
        total, done = sum(sizes), 0
        try:
            for step, size in zip(plan.steps, sizes, strict=True):
                if step.copied_from:
                    self._put(step.target, self._slots[step.copied_from][0].get().detach().clone())
                else:
                    tensor = tensors.get(step.role, step.key)
                    value = tensor if step.adaptation is None else step.adaptation(tensor)
                    before, after = tensor.dtype, self._put(step.target, value)
                    if before != after:
                        changed[step.role, step.key] = dtype_name(before), dtype_name(after)
                    if not self._is_view_of(step.target, tensor):
                        tensors.release(step.role, step.key)
                done += size
                _tell(progress, "write", done, total)
        except BaseException:
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            self._undo.clear()
        return changed

    def _put(self, target: str, value: Tensor) -> torch.dtype:
        """Write one tensor; returns the dtype that the model holds then."""
        slots = self._slots[target]
        old = slots[0].get()
        if old.is_meta:
            self._replace(slots, old, self._own(value, old.dtype, self._device))
        elif self._assign and isinstance(old, nn.Parameter) and self._target_dtype(old.dtype) == old.dtype:
            previous = old.data
            self._undo.append(lambda: setattr(old, "data", previous))
            old.data = self._own(value, old.dtype, old.device)
        elif self._assign:
            self._replace(slots, old, self._own(value, old.dtype, old.device))
        else:
            # What is kept for an undo lies in main memory: an accelerator may have no room for a second model.
            kept = old.detach().clone() if old.device.type == "cpu" else old.detach().cpu()
            self._undo.append(lambda: old.copy_(kept))
            old.copy_(value)
        return slots[0].get().dtype

    def _target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _own(self, value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`value` ready to be part of the model: converted where needed, and sharing memory with no other part."""
        value = value.to(device=device, dtype=self._target_dtype(dtype)).contiguous()
        if value.numel() and value.data_ptr() in self._owned:
            value = value.clone()
        self._owned.add(value.data_ptr())
        return value

    def _replace(self, slots: list[_Slot], old: Tensor, value: Tensor) -> None:
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for slot in slots:
            self._undo.append(lambda slot=slot: slot.put(old))  # type: ignore[misc]
            slot.put(new)

    def _is_view_of(self, target: str, tensor: Tensor) -> bool:
        """Whether the model's tensor is the file's own memory now, whose pages must stay."""
        return self._slots[target][0].get().data_ptr() == tensor.data_ptr()


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Make the buffers that no file holds, where a model was built on the meta device: modules know how."""
    for module in model.modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            reset = getattr(module, "reset_buffers", None)
            if callable(reset):
                reset(device)


def _finish(
    plan: LoadPlan, flags: _Flags, changed: Mapping[tuple[str, str], tuple[str, str]], model: nn.Module
) -> LoadReport:
    report = plan.report()
    entries = []
    for entry in report.entries:
        where = (entry.source or "", entry.source_key or "")
        found = []
        if entry.wins and where in flags.non_finite:
            found.append(flags.non_finite[where])
        if entry.wins and where in changed:
            found.append(f"converted from {changed[where][0]} to {changed[where][1]}")
            entry = replace(entry, target_dtype=changed[where][1])
        entries.append(replace(entry, warning="; ".join(found)) if found else entry)
    notes, lines = list(report.notes), list(report.warnings)
    kinds: dict[tuple[str, str], int] = {}
    for pair in changed.values():
        kinds[pair] = kinds.get(pair, 0) + 1
    notes += [f"{count} tensors were converted from {before} to {after}" for (before, after), count in kinds.items()]
    if flags.non_finite:
        (role, key), found_text = next(iter(flags.non_finite.items()))
        lines.append(
            f"{len(flags.non_finite)} tensors of {plan.sources[role].file.path} hold NaN or Inf, "
            f"such as {key!r} ({found_text})"
        )
    if left := list(_on_meta(model)):
        lines.append(f"{len(left)} tensors are still without values on the meta device, such as {left[0]!r}")
    for line in lines:
        warnings.warn(line, WeightsWarning, stacklevel=3)
    return LoadReport(entries, sources=report.sources, model=report.model, notes=notes, warnings=lines, applied=True)


def _on_meta(model: nn.Module) -> Iterator[str]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            yield name
