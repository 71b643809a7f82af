"""The account of a load: an entry for every tensor of every file, one that wins for every tensor of the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from vggt_mv.weights.errors import WeightsError, WeightsMismatchError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["FILLED", "STATUSES", "Cause", "Entry", "LoadReport", "SourceSummary", "Status"]

Status = Literal[
    "loaded",
    "aliased",
    "remapped",
    "adapted",
    "copied",
    "overridden",
    "excluded",
    "shape_mismatch",
    "unexpected",
    "kept_init",
]
STATUSES: Final[tuple[Status, ...]] = (
    "loaded",
    "aliased",
    "remapped",
    "adapted",
    "copied",
    "overridden",
    "excluded",
    "shape_mismatch",
    "unexpected",
    "kept_init",
)
FILLED: Final[frozenset[Status]] = frozenset(("loaded", "aliased", "remapped", "adapted", "copied"))

# Why a tensor of the model kept what it had: the file should have had it; its family has none; the caller asked.
Cause = Literal["missing", "cannot_have", "requested"]


@dataclass(frozen=True)
class Entry:
    """What happened, or will happen, to one tensor.

    Attributes:
        status: one of `STATUSES`.
        source: ``"checkpoint"`` or ``"pi3"``; None where no file is involved (``copied``, ``kept_init``).
        source_key: name in the file, as the file spells it.
        target_key: name in the model, as the model spells it; None where the model has no such tensor.
        wins: this entry decides what `target_key` holds. Exactly one entry of each model tensor does.
        reason: why, for a person to read; empty for a plain ``loaded``.
        source_shape, target_shape: as in the file and the model.
        source_dtype, target_dtype: names such as ``"float32"``; None where unknown.
        copied_from: for ``copied``, the model's own tensor that was copied.
        cause: for ``kept_init``, why: see `Cause`.
        known: for ``unexpected``, whether the rules know this name and that VGGT_MV has no place for it.
        warning: something wrong with the values (NaN, Inf) or a changed dtype.
    """

    status: Status
    source: str | None = None
    source_key: str | None = None
    target_key: str | None = None
    wins: bool = False
    reason: str = ""
    source_shape: tuple[int, ...] | None = None
    target_shape: tuple[int, ...] | None = None
    source_dtype: str | None = None
    target_dtype: str | None = None
    copied_from: str | None = None
    cause: Cause | None = None
    known: bool = False
    warning: str = ""


@dataclass(frozen=True)
class SourceSummary:
    """What one source of a load is: role (``checkpoint``, ``pi3``), path, family, how it was wrapped."""

    role: str
    path: str
    family: str
    tensors: int
    format: str = ""
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    container: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    recorded_family: bool = False

    def describe(self) -> str:
        """One line: path, family, size, dtypes, and every wrapper and prefix that was peeled."""
        share = ", ".join(f"{count} x {dtype}" for dtype, count in self.dtypes.items())
        text = f"{self.path}: {self.family}{' (recorded)' if self.recorded_family else ''}, {self.tensors} tensors"
        if self.nbytes:
            text += f", {self.nbytes / 1e9:.2f} GB"
        if share:
            text += f" ({share})"
        if self.container:
            text += ", unwrapped " + " > ".join(repr(name) for name in self.container)
        if self.prefixes:
            text += ", prefix removed: " + ", ".join(repr(name) for name in self.prefixes)
        return text


# Counters that a caller wants small; every other counter is wanted large by `raise_unless`.
_UPPER: Final = frozenset(
    ("missing", "cannot_have", "unexpected", "shape_mismatch", "kept_init", "overridden", "excluded", "non_finite")
)
_ROLES: Final = ("checkpoint", "pi3")


class LoadReport(dict[str, int]):
    """Counts, as a dict; behind them every entry.

    Keys: ``checkpoint_loaded`` and ``pi3_loaded`` (model tensors filled from either file); ``missing`` (model tensors
    that no file filled although a complete file of that family holds them); ``cannot_have`` (kept, because no file of
    that family has them); ``unexpected``; each status of `STATUSES`; ``non_finite``; ``model_tensors``,
    ``source_tensors``. ``kept_init`` = ``missing`` + ``cannot_have`` + those that the caller left out (``only=``).

    ``str(report)`` is the table; ``rich.print(report)`` prints it in colour.

    Example:
        >>> report = LoadReport([Entry("loaded", "checkpoint", "a", "a", wins=True)])
        >>> report["checkpoint_loaded"], report["missing"]
        (1, 0)
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        sources: Sequence[SourceSummary] = (),
        model: str = "model",
        notes: Sequence[str] = (),
        warnings: Sequence[str] = (),
        applied: bool = False,
    ) -> None:
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.sources = tuple(sources)
        self.model = model
        self.notes = tuple(notes)
        self.warnings = tuple(warnings)
        self.applied = applied
        super().__init__(_counts(self.entries))

    @property
    def winners(self) -> dict[str, Entry]:
        """Model tensor -> the entry that decides what it holds."""
        return {entry.target_key: entry for entry in self.entries if entry.wins and entry.target_key is not None}

    def filled(self) -> int:
        """How many tensors of the model get values from a file."""
        return sum(entry.wins and entry.status in FILLED for entry in self.entries)

    def kept(self) -> list[Entry]:
        """Entries of the model tensors that keep what they had."""
        return [entry for entry in self.entries if entry.status == "kept_init"]

    def raise_unless(self, **bounds: int) -> None:
        """Raise unless every counter named keeps its bound.

        Args:
            bounds: counters and bounds. ``missing``, ``cannot_have``, ``unexpected``, ``shape_mismatch``,
                ``kept_init``, ``overridden``, ``excluded``, ``non_finite`` must be at most the number given, all others
                at least.

        Raises:
            WeightsMismatchError: a bound is broken; one line, the table in ``error.table``.
            WeightsError: no such counter.

        Example:
            >>> LoadReport([]).raise_unless(missing=0)
        """
        broken = []
        for name, bound in bounds.items():
            if name not in self:
                raise WeightsError(f"raise_unless: no counter {name!r}; there are {', '.join(self)}")
            value, upper = self[name], name in _UPPER
            if value > bound if upper else value < bound:
                broken.append(f"{name} is {value} (wanted {'at most' if upper else 'at least'} {bound})")
        if broken:
            raise WeightsMismatchError(f"{self._where()}: {'; '.join(broken)}{self._worst()}", self.to_text())

    def raise_unless_strict(self) -> None:
        """What ``strict=True`` demands: every selected tensor of the model filled, every tensor of the file used.

        Parts that Pi3 has and VGGT_MV has not are no offence, nor is what the caller left out on purpose.

        Raises:
            WeightsMismatchError: with the counts in one line and the table in ``error.table``.
        """
        kept = sum(entry.cause != "requested" for entry in self.kept())
        strays = sum(entry.status == "unexpected" and not entry.known for entry in self.entries)
        counts = {
            "of the model not in the file": kept,
            "of the file not in the model": strays,
            "of another shape": self["shape_mismatch"],
        }
        if any(counts.values()):
            found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            raise WeightsMismatchError(f"{self._where()}, strict: {found}{self._worst()}", self.to_text())

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 2) -> str:
        """Everything as JSON text: counts, sources, notes, warnings, entries; written to `path` where one is given."""
        text = json.dumps(self.to_dict(), indent=indent)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_dict(self) -> dict[str, Any]:
        """The same as `to_json`, as plain Python objects. Fields that say nothing are left out of the entries."""
        entries = [
            {key: value for key, value in asdict(entry).items() if value not in (None, "", False)}
            for entry in self.entries
        ]
        return {
            "model": self.model,
            "applied": self.applied,
            "counts": dict(self),
            "sources": [asdict(source) for source in self.sources],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "entries": entries,
        }

    def to_text(self, *, verbose: bool = False, width: int = 100) -> str:
        """The table as plain text, `width` columns wide; `verbose` gives a line for every tensor."""
        try:
            from vggt_mv.weights.table import render_text
        except ImportError:  # rich is not installed: the counts still say what happened
            return self._where() + ": " + ", ".join(f"{name} {count}" for name, count in self.items() if count)
        return render_text(self, verbose=verbose, width=width)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"LoadReport({', '.join(f'{name}={count}' for name, count in self.items() if count)})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from vggt_mv.weights.table import renderables

        yield from renderables(self)

    def _where(self) -> str:
        paths = " + ".join(source.path for source in self.sources) or "nothing"
        return f"{paths} -> {self.model}"

    def _worst(self) -> str:
        """The module that most of the trouble is in, and why."""
        trouble = [
            entry
            for entry in self.entries
            if entry.status in ("unexpected", "shape_mismatch") or (entry.status == "kept_init" and entry.cause)
            if not entry.known and entry.cause != "requested"
        ]
        if not trouble:
            return ""
        from vggt_mv.weights.rules import canonical_name, module_of

        def module(entry: Entry) -> str:
            return module_of(canonical_name(entry.target_key or entry.source_key or ""))

        most, count = Counter(module(entry) for entry in trouble).most_common(1)[0]
        reason = next(entry.reason for entry in trouble if module(entry) == most)
        return f"; most of it in {most} ({count}: {reason})" if reason else f"; most of it in {most} ({count})"


def _counts(entries: tuple[Entry, ...]) -> dict[str, int]:
    status = Counter(entry.status for entry in entries)
    cause = Counter(entry.cause for entry in entries)
    counts = {
        f"{role}_loaded": sum(entry.wins and entry.source == role and entry.status in FILLED for entry in entries)
        for role in _ROLES
    }
    counts |= {"missing": cause["missing"], "cannot_have": cause["cannot_have"]}
    counts |= {name: status[name] for name in STATUSES}
    counts["non_finite"] = sum("NaN" in entry.warning or "Inf" in entry.warning for entry in entries)
    counts["model_tensors"] = sum(entry.wins for entry in entries)
    counts["source_tensors"] = sum(entry.source_key is not None for entry in entries)
    return counts
