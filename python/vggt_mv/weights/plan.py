"""The plan of a load: which tensor of which file goes where. Looks at names, shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from vggt_mv.weights import rules
from vggt_mv.weights.adapt import Adaptation, adaptation_for
from vggt_mv.weights.errors import AliasConflictError, TensorValueError, UnknownSchemeError, WeightsError
from vggt_mv.weights.files import WeightsFile, dtype_name
from vggt_mv.weights.reasons import PI3_NO_PART, SourceView, absence, likely_cause, unexpected
from vggt_mv.weights.report import FILLED, Cause, Entry, LoadReport, SourceSummary, Status
from vggt_mv.weights.spec import ModelSpec, Selection, TensorInfo, tensor_info

__all__ = ["FLOATS", "LoadPlan", "Prefer", "SourceName", "Step", "plan_load"]

SourceName = Literal["auto", "vggt", "page4d", "vggt_mv", "pi3"]
Prefer = Literal["checkpoint", "pi3"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NOT_SELECTED = "not selected by only="
EPS_NOTE = "Pi3's block LayerNorms were trained with eps 1e-6; these blocks compute with 1e-5"


@dataclass(frozen=True)
class Step:
    """One tensor to write: `target` (canonical), from a file's `key` or as a copy of the model's `copied_from`."""

    target: str
    role: str = ""
    key: str = ""
    adaptation: Adaptation | None = None
    copied_from: str = ""


@dataclass
class Source:
    """One file of a load, under the role it has there."""

    role: str
    file: WeightsFile
    view: SourceView
    infos: dict[str, TensorInfo]


@dataclass
class LoadPlan:
    """What `apply_plan` will do; `report()` says it before it is done.

    Attributes:
        spec: the model that the plan was made for.
        entries: one for every tensor of every source, one that wins for every tensor of the model.
        steps: what to write, in the order of the model.
        agreements: (role, name, other name) of the tensors that a file holds twice and that must be equal.
        sources: the files, by role.
    """

    spec: ModelSpec
    entries: list[Entry]
    steps: list[Step]
    agreements: list[tuple[str, str, str]]
    sources: dict[str, Source]
    selection: Selection
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self) -> LoadReport:
        """The account of what would be done."""
        return LoadReport(
            self.entries,
            sources=[_summary(source) for source in self.sources.values()],
            model=self.spec.label,
            notes=self.notes,
            warnings=self.warnings,
        )

    def winner(self, name: str) -> Entry:
        """The entry that decides what the model's tensor `name` (or an alias of it) holds.

        Raises:
            WeightsError: the model has no such tensor.
        """
        actual = self.spec.names.get(self.spec.aliases.get(name, rules.canonical_name(name)))
        for entry in self.entries:
            if entry.wins and entry.target_key == actual:
                return entry
        raise WeightsError(f"the model has no tensor {name!r}")


def plan_load(
    model: nn.Module | Mapping[str, Any] | ModelSpec,
    state_dict: Mapping[str, Any] | WeightsFile | None = None,
    source: SourceName = "auto",
    *,
    pi3: Mapping[str, Any] | WeightsFile | None = None,
    only: str | Sequence[str] | None = None,
    prefer: Prefer = "checkpoint",
    load_encoder: bool = False,
) -> LoadPlan:
    """Plan a load without touching a tensor.

    Args:
        model: a module (also on the meta device), or a mapping name -> shape or tensor.
        state_dict: a mapping name -> tensor or shape, wrapped or not, or a file from `open_weights`.
        source: the family of `state_dict`; ``"auto"`` tells it from the names.
        pi3: a Pi3 checkpoint to combine with it.
        only: modules, ranges of blocks or tensors to restrict the load to; see `Selection`.
        prefer: which source wins where both have a tensor.
        load_encoder: take Pi3's image encoder too.

    Returns:
        The plan, with an entry for every tensor.

    Raises:
        UnknownSchemeError: the names are of no known scheme.
        AliasConflictError: a file names one tensor twice, with two shapes.
        TensorValueError: a tensor of a dtype that cannot be used (integers where floats belong, ...).
        WeightsError: an argument is wrong, or there is nothing to load.

    Example:
        >>> plan = plan_load({"aggregator.camera_token": [1, 2, 1, 8]}, {"module.camera_token": [1, 2, 1, 8]})
        >>> plan.report()["loaded"]
        1
    """
    if prefer not in ("checkpoint", "pi3"):
        raise WeightsError(f"prefer must be 'checkpoint' or 'pi3', got {prefer!r}")
    if source not in ("auto", *rules.FAMILIES):
        raise WeightsError(f"source must be 'auto' or one of {', '.join(rules.FAMILIES)}, got {source!r}")
    spec = ModelSpec.of(model)
    sources: dict[str, Source] = {}
    if state_dict is not None:
        first = _source(state_dict, source, spec)
        sources[first.role] = first
    if pi3 is not None:
        second = _source(pi3, "auto", spec)
        if second.role != "pi3":
            raise WeightsError(f"pi3_path must be a Pi3 checkpoint, but {second.file.path} is {_label(second)}")
        if "pi3" in sources:
            raise WeightsError(f"both files are Pi3 checkpoints: {sources['pi3'].file.path} and {second.file.path}")
        sources["pi3"] = second
    if not sources:
        raise WeightsError("nothing to load: give checkpoint_path, pi3_path or both")
    planner = _Planner(spec, sources, Selection(only, spec), prefer, load_encoder)
    return planner.plan()


def _source(value: Mapping[str, Any] | WeightsFile, source: SourceName, spec: ModelSpec) -> Source:
    file = value if isinstance(value, WeightsFile) else WeightsFile.of_mapping(value)
    infos = {key: tensor_info(key, tensor) for key, tensor in file.tensors.items()}
    if not infos:
        raise WeightsError(f"{file.path} holds no tensors")
    found = rules.detect(infos, file.metadata)
    if source != "auto":
        found = rules.Detection(source, found.scope, found.known, found.total)
    elif found.family is None:
        shared = sum(rules.canonical_name(key) in spec.tensors for key in infos)
        if shared < rules.KNOWN_SHARE * len(infos):
            raise UnknownSchemeError(_unknown(file.path, list(infos)))
    role = "pi3" if found.family == "pi3" else "checkpoint"
    return Source(role, file, SourceView(found), infos)


def _unknown(path: str, names: list[str]) -> str:
    prefix = rules.foreign_prefix(names)
    if prefix is not None:
        return (
            f"{path}: the {len(names)} tensor names are of no known scheme because of the prefix {prefix!r}; "
            f"remove it from the names (known prefixes: {', '.join(rules.PREFIXES)})"
        )
    nearest = ", ".join(f"{name} ({known} of {len(names)} names)" for name, known in rules.nearest_schemes(names))
    return (
        f"{path}: weights of another model, such as {names[0]!r}; nearest known schemes: {nearest}; give "
        "weights of VGGT, PAGE-4D, VGGT_MV or Pi3"
    )


def _label(source: Source) -> str:
    return source.view.detection.label


def _summary(source: Source) -> SourceSummary:
    file = source.file
    dtypes: dict[str, int] = {}
    for info in source.infos.values():
        if info.dtype is not None:
            dtypes[dtype_name(info.dtype)] = dtypes.get(dtype_name(info.dtype), 0) + 1
    prefixes = dict.fromkeys(prefix for key in source.infos for prefix in rules.peel(key)[1])
    return SourceSummary(
        role=source.role,
        path=file.path,
        family=_label(source),
        tensors=len(source.infos),
        format=file.format,
        nbytes=sum(info.nbytes for info in source.infos.values() if info.dtype is not None),
        dtypes=dtypes,
        container=file.container,
        prefixes=tuple(prefixes),
        recorded_family=source.view.detection.recorded,
    )


@dataclass
class _Candidate:
    """A tensor of a source that the model has a place for."""

    role: str
    key: str
    info: TensorInfo
    alias: bool
    twins: list[_Candidate] = field(default_factory=list)  # the same tensor under further names of the same file


class _Planner:
    def __init__(
        self,
        spec: ModelSpec,
        sources: dict[str, Source],
        selection: Selection,
        prefer: Prefer,
        load_encoder: bool,
    ) -> None:
        self.spec = spec
        self.sources = sources
        self.selection = selection
        self.load_encoder = load_encoder
        self.order = sorted(sources, key=lambda role: role != prefer)
        self.parts = {part: spec.depth_of(part) for part in spec.parts()}
        self.entries: list[Entry] = []
        self.steps: list[Step] = []
        self.agreements: list[tuple[str, str, str]] = []
        self.statuses: dict[str, Status] = {}  # canonical -> status of the winner, once known

    def plan(self) -> LoadPlan:
        candidates = {role: self._match(source) for role, source in self.sources.items()}
        unmatched = self.entries
        self.entries = []
        copies: list[str] = []
        for target in self.spec.tensors:
            found = [candidates[role][target] for role in self.order if target in candidates[role]]
            if found:
                self._decide(target, found)
            elif self._is_copy(target):
                copies.append(target)  # decided last: what is copied may come after it in the model
            else:
                self._keep(target)
        for target in copies:
            self._copy(target)
        self.entries += unmatched
        notes = [note for source in self.sources.values() for note in source.file.notes]
        if any(entry.source == "pi3" and entry.status == "remapped" and entry.wins for entry in self.entries):
            notes.append(EPS_NOTE)
        if self.selection.items is not None:
            notes.append(f"only={list(self.selection.items)}")
        return LoadPlan(
            self.spec,
            self.entries,
            self.steps,
            self.agreements,
            self.sources,
            self.selection,
            notes,
            self._warnings(),
        )

    def _match(self, source: Source) -> dict[str, _Candidate]:
        """Candidates by target; every tensor that is none gets its entry here."""
        pi3 = source.role == "pi3"
        matched: dict[str, list[_Candidate]] = {}
        for key, info in source.infos.items():
            encoder, known = False, False
            if pi3:
                target, encoder = rules.pi3_target(key)
                known = target is None and rules.is_pi3_name(key)
            else:
                target = rules.canonical_name(key)
            if target is not None:
                source.view.add(target)
            entry = Entry("unexpected", source.role, key, source_shape=info.shape, source_dtype=_dtype(info))
            if target is None or target not in self.spec.tensors:
                reason = PI3_NO_PART if known else unexpected(target or key, self.spec, self.parts)
                self.entries.append(replace(entry, reason=reason, known=known))
            elif target not in self.selection:
                self.entries.append(replace(entry, status="excluded", reason=NOT_SELECTED, **self._target(target)))
            elif encoder and not self.load_encoder:
                self.entries.append(
                    replace(entry, status="excluded", reason="load_encoder=False", **self._target(target))
                )
            else:
                alias = not pi3 and rules.has_alias(key)
                matched.setdefault(target, []).append(_Candidate(source.role, key, info, alias))
        return {target: self._merge(source, found) for target, found in matched.items()}

    def _merge(self, source: Source, found: list[_Candidate]) -> _Candidate:
        """One candidate of the names that a file has for one tensor: the canonical name, the others as its twins."""
        found.sort(key=lambda candidate: (candidate.alias, len(candidate.key)))
        first, *twins = found
        for twin in twins:
            if twin.info.shape != first.info.shape:
                raise AliasConflictError(
                    f"{source.file.path}: {first.key!r} and {twin.key!r} are one tensor and must be equal, "
                    f"got shapes {list(first.info.shape)} and {list(twin.info.shape)}"
                )
            self.agreements.append((source.role, first.key, twin.key))
        first.twins = twins
        return first

    def _decide(self, target: str, found: list[_Candidate]) -> None:
        """Entries for a tensor that at least one source has: the winner first."""
        wanted = self.spec.tensors[target]
        fits = [self._fit(target, candidate, wanted) for candidate in found]
        winner = next((i for i, (fit, _) in enumerate(fits) if fit), None)
        order = sorted(range(len(found)), key=lambda i: i != (winner or 0))
        for i in order:
            candidate, (fit, adaptation) = found[i], fits[i]
            wins = i == (winner or 0)
            status: Status
            if not fit:
                status = "shape_mismatch"
                reason = f"{list(candidate.info.shape)} in the file, {list(wanted.shape)} in the model"
            elif not wins:
                status, reason = "overridden", f"taken from the {found[winner or 0].role} file"
            else:
                status, reason = self._how(candidate, adaptation)
                self._check_dtype(target, candidate, wanted)
                self.steps.append(Step(target, candidate.role, candidate.key, adaptation))
            self._add(target, candidate, status, reason, wins=wins)
            if wins:
                self.statuses[target] = status
            for twin in candidate.twins:
                same = f"same values as {candidate.key}"
                self._add(target, twin, "aliased" if status in FILLED else status, same, wins=False)

    def _fit(self, target: str, candidate: _Candidate, wanted: TensorInfo) -> tuple[bool, Adaptation | None]:
        if candidate.info.shape == wanted.shape:
            return True, None
        adaptation = adaptation_for(target, candidate.info.shape, wanted.shape, pi3=candidate.role == "pi3")
        return adaptation is not None, adaptation

    @staticmethod
    def _how(candidate: _Candidate, adaptation: Adaptation | None) -> tuple[Status, str]:
        if adaptation is not None:
            return "adapted", adaptation.reason
        if candidate.role == "pi3":
            return "remapped", "Pi3 name"
        if candidate.alias:
            return "aliased", "alias"
        return "loaded", ""

    def _check_dtype(self, target: str, candidate: _Candidate, wanted: TensorInfo) -> None:
        given = candidate.info.dtype
        if given is None:
            return
        expected = torch.float32 if wanted.dtype is None else wanted.dtype
        if given in FLOATS if expected.is_floating_point else given == expected:
            return
        rule = "a float dtype (" + ", ".join(map(dtype_name, FLOATS)) + ")"
        if not expected.is_floating_point:
            rule = dtype_name(expected)
        path = self.sources[candidate.role].file.path
        raise TensorValueError(f"{path}: {candidate.key!r} must have {rule}, got {dtype_name(given)}")

    def _is_copy(self, target: str) -> bool:
        """Whether this is a stream's block that no source knows: it starts as a copy of the single stream's."""
        part = rules.module_of(target)
        return rules.single_stream_name(target) is not None and not any(
            part in source.view.depths for source in self.sources.values()
        )

    def _copy(self, target: str) -> None:
        origin = rules.single_stream_name(target)
        assert origin is not None
        if self.statuses.get(origin) not in FILLED or target not in self.selection:
            self._keep(target)
            return
        if self.spec.tensors[origin].shape != self.spec.tensors[target].shape:
            self._keep(target)
            return
        origin_key = self.spec.names[origin]
        self.entries.append(
            Entry(
                "copied",
                wins=True,
                reason="new stream starts as the single stream",
                copied_from=origin_key,
                **self._target(target),
            )
        )
        self.steps.append(Step(target, copied_from=origin))
        self.statuses[target] = "copied"

    def _keep(self, target: str) -> None:
        reason, cause = self._why_kept(target)
        self.entries.append(Entry("kept_init", wins=True, reason=reason, cause=cause, **self._target(target)))
        self.statuses[target] = "kept_init"

    def _why_kept(self, target: str) -> tuple[str, Cause]:
        if target not in self.selection:
            return NOT_SELECTED, "requested"
        origin = rules.single_stream_name(target)
        if origin is not None and self._is_copy(target):
            if origin not in self.spec.tensors or self.spec.tensors[origin].shape != self.spec.tensors[target].shape:
                return "the single stream has no tensor of this shape to copy", "cannot_have"
            if origin not in self.selection:
                return "only= leaves out its single-stream block, so there was nothing to copy", "requested"
            return "its single-stream block was not loaded, so there was nothing to copy", "cannot_have"
        found = [
            absence(target, self.sources[role].view, load_encoder=self.load_encoder)
            for role in sorted(self.sources)  # the checkpoint's reason before Pi3's
        ]
        ranked: list[Cause] = ["missing", "requested", "cannot_have"]
        cause = min((cause for _, cause in found), key=ranked.index)
        return next(reason for reason, its_cause in found if its_cause == cause), cause

    def _target(self, target: str) -> dict[str, Any]:
        info = self.spec.tensors[target]
        return {
            "target_key": self.spec.names[target],
            "target_shape": info.shape,
            "target_dtype": _dtype(info),
        }

    def _add(self, target: str, candidate: _Candidate, status: Status, reason: str, *, wins: bool) -> None:
        self.entries.append(
            Entry(
                status,
                candidate.role,
                candidate.key,
                wins=wins,
                reason=reason,
                source_shape=candidate.info.shape,
                source_dtype=_dtype(candidate.info),
                **self._target(target),
            )
        )

    def _warnings(self) -> list[str]:
        lines = []
        selected = [name for name in self.spec.tensors if name in self.selection]
        filled = sum(self.statuses[name] in FILLED for name in selected)
        paths = " and ".join(source.file.path for source in self.sources.values())
        if 2 * filled < len(selected):
            views = [source.view for source in self.sources.values()]
            cause = likely_cause(self.entries, views, self.spec)
            lines.append(f"only {filled} of {len(selected)} tensors of {self.spec.label} are in {paths}: {cause}")
        for role, source in self.sources.items():
            if len(self.sources) > 1 and not any(
                entry.source == role and entry.wins and entry.status in FILLED for entry in self.entries
            ):
                lines.append(f"nothing of {source.file.path} ({role}) survives: the other file has all that it offers")
        return lines


def _dtype(info: TensorInfo) -> str | None:
    return None if info.dtype is None else dtype_name(info.dtype)
