"""The report as a table: by module, or by tensor. The one place of `vggt_mv.weights` that needs rich."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vggt_mv.weights import rules
from vggt_mv.weights.convert import WeightsSummary
from vggt_mv.weights.report import Entry, LoadReport, Status

__all__ = ["render_text", "renderables", "summary_renderables"]

_COLUMNS: tuple[tuple[str, tuple[Status, ...]], ...] = (
    ("loaded", ("loaded",)),
    ("aliased", ("aliased",)),
    ("remapped", ("remapped",)),
    ("adapted", ("adapted",)),
    ("copied", ("copied",)),
    ("mismatch", ("shape_mismatch",)),
    ("kept init", ("kept_init",)),
)
_STYLES: dict[str, str] = {"mismatch": "red", "kept init": "yellow", "adapted": "cyan", "copied": "cyan"}
_UNUSED: tuple[Status, ...] = ("unexpected", "shape_mismatch", "overridden", "excluded", "aliased")


def render_text(report: LoadReport, *, verbose: bool = False, width: int = 100) -> str:
    """The report as plain text without trailing spaces."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for item in renderables(report, verbose=verbose):
        console.print(item)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def renderables(report: LoadReport, *, verbose: bool = False) -> Iterator[RenderableType]:
    """Heading, the table by module (or by tensor), what kept its values, what was not used, notes and warnings."""
    for source in report.sources:
        yield Text(f"{source.role:>10}  {source.describe()}")
    verb = "loaded" if report.applied else "planned"
    yield Text(f"{'model':>10}  {report.model}, {report['model_tensors']} tensors, {report.filled()} {verb}")
    yield _ByTensor(report.entries) if verbose else _by_module(report.entries)
    if not verbose:
        kept = [entry for entry in report.entries if entry.status == "kept_init"]
        if kept:
            yield _reasons("Kept at initial values", "", kept, _target)
        adapted = [e for e in report.entries if e.wins and e.status == "adapted"]
        if adapted:
            yield _reasons("Adapted", "", adapted, _target)
        unused = [entry for entry in report.entries if entry.source_key and not (entry.wins and entry.status in _TAKEN)]
        for status in _UNUSED:
            group = [entry for entry in unused if entry.status == status]
            if group:
                yield _reasons(_HEADINGS[status], "in the file", group, _source)
    for line in report.notes:
        yield Text(f"note: {line}", style="dim")
    for line in report.warnings:
        yield Text(f"warning: {line}", style="yellow")


_TAKEN: tuple[Status, ...] = ("loaded", "aliased", "remapped", "adapted")
_HEADINGS: dict[Status, str] = {
    "unexpected": "Not used",
    "shape_mismatch": "Other shape",
    "overridden": "Overridden",
    "excluded": "Left out on request",
    "aliased": "Second names of tensors that were loaded",
}


def _table(title: str = "") -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1),
        show_edge=False,
    )


def _by_module(entries: Iterable[Entry]) -> RenderableType:
    modules: dict[str, dict[Status, int]] = {}
    for entry in entries:
        if entry.wins:
            counts = modules.setdefault(rules.module_of(_target(entry)), {})
            counts[entry.status] = counts.get(entry.status, 0) + 1
    totals = {label: sum(c.get(s, 0) for c in modules.values() for s in statuses) for label, statuses in _COLUMNS}
    shown = [(label, statuses) for label, statuses in _COLUMNS if totals[label]]
    table = _table()
    table.add_column("module", no_wrap=True)
    table.add_column("tensors", justify="right")
    for label, _ in shown:
        table.add_column(label, justify="right", style=_STYLES.get(label, ""))
    for module, counts in modules.items():
        cells = [sum(counts.get(status, 0) for status in statuses) for _, statuses in shown]
        table.add_row(module, str(sum(counts.values())), *(str(cell) if cell else "" for cell in cells))
    table.add_section()
    table.add_row(
        "all", str(sum(sum(c.values()) for c in modules.values())), *(str(totals[label]) for label, _ in shown)
    )
    return Group("", table)


class _ByTensor:
    """A line or more for every tensor, laid out here: a rich table takes seconds for thousands of rows."""

    _STATUS = 17  # columns, the longest status in brackets

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = entries

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width - self._STATUS, 20)
        yield Text("")
        yield Text(f"{'status':<{self._STATUS}}tensor of the model <- tensor of the file, shape", style="bold")
        text = Text(no_wrap=True, overflow="crop")
        for entry in self._entries:
            status = entry.status if entry.wins or not entry.target_key else f"({entry.status})"
            style = _STYLES.get({"shape_mismatch": "mismatch"}.get(entry.status, entry.status.replace("_", " ")), "")
            for number, line in enumerate(self._lines(entry, width)):
                text.append(f"{'' if number else status:<{self._STATUS}}", style)
                text.append(f"{line}\n")
        text.right_crop(1)
        yield text

    @staticmethod
    def _lines(entry: Entry, width: int) -> Iterator[str]:
        origin = entry.copied_from or entry.source_key
        shape = entry.target_shape if entry.target_shape is not None else entry.source_shape
        first, end = entry.target_key or "(none)", str(list(shape or ()))
        gap = width - len(first) - len(end)
        if gap >= 1:
            yield first + " " * gap + end
        else:
            yield from textwrap.wrap(f"{first} {end}", width)
        if origin is not None and origin != entry.target_key:
            yield from textwrap.wrap(f"  <- {origin}", width, subsequent_indent="     ")
        remarks = "; ".join(text for text in (entry.reason, entry.warning) if text)
        yield from textwrap.wrap(f"  {remarks}", width, subsequent_indent="  ") if remarks else ()


def _reasons(title: str, where: str, entries: list[Entry], name: Callable[[Entry], str]) -> RenderableType:
    """Module and blocks, number of tensors, why: one row for each reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        # Shapes differ from tensor to tensor: one row for the module, with the first as the example.
        reason = "" if entry.status == "shape_mismatch" else _general(entry)
        groups.setdefault((_module(name(entry)), reason), []).append(name(entry))
    examples = {(_module(name(e)), ""): e for e in reversed(entries) if e.status == "shape_mismatch"}
    table = _table(title)
    table.add_column(f"module {where}".strip(), overflow="fold", max_width=44)
    table.add_column("tensors", justify="right")
    table.add_column("why", overflow="fold")
    for (module, reason), names in groups.items():
        if not reason and (module, "") in examples:
            example = examples[module, ""]
            reason = f"{name(example)}: {example.reason}"
        table.add_row(module + _blocks(module, names), str(len(names)), reason)
    return Group("", table)


def _general(entry: Entry) -> str:
    """A reason without the name that it is about: one row for a whole group."""
    return "the same values under another name" if entry.status == "aliased" else entry.reason


def _target(entry: Entry) -> str:
    return rules.canonical_name(entry.target_key or "")


def _source(entry: Entry) -> str:
    return rules.peel(entry.source_key or "")[0]


def _module(name: str) -> str:
    return rules.module_of(name)


def _blocks(module: str, names: Iterable[str]) -> str:
    """``.18-23`` for the blocks that the names are in; nothing where some are in none."""
    indices: set[int] = set()
    for name in names:
        first = name[len(module) + 1 :].partition(".")[0]
        if not first.isdigit():
            return ""
        indices.add(int(first))
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    if not 0 < len(ranges) <= 4:
        return ""
    return "." + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def summary_renderables(summary: WeightsSummary) -> Iterator[RenderableType]:
    """What `inspect_weights` found, for a person to read."""
    size = f"{summary.nbytes / 1e9:.2f} GB" if summary.nbytes >= 1e7 else f"{summary.nbytes / 1e3:.1f} kB"
    yield Text(
        f"{summary.path}: {size}, {summary.format}"
        + (f", {len(summary.files)} files" if len(summary.files) > 1 else "")
    )
    origin = "recorded in the file" if summary.recorded_family else f"{summary.known} of {summary.tensors} names known"
    yield Text(f"    family  {summary.family} ({origin})")
    if summary.nearest:
        nearest = ", ".join(f"{name} ({count} of {summary.tensors} names)" for name, count in summary.nearest)
        yield Text(f"   nearest  {nearest}")
    yield Text(f"   tensors  {summary.tensors}, {summary.parameters / 1e6:.1f} M values")
    if summary.container:
        yield Text(f" unwrapped  {' > '.join(summary.container)}")
    if summary.prefixes:
        yield Text(f"  prefixes  {', '.join(summary.prefixes)}")
    if summary.aliases:
        yield Text(f"   aliases  {summary.aliases} tensors are named by an alias (view_blocks, time_blocks)")
    for key, value in summary.metadata.items():
        yield Text(f"  metadata  {key}: {value}")
    table = _table()
    for column in ("module", "tensors", "blocks", "values", "size", "dtype", "known"):
        table.add_column(column, justify="left" if column in ("module", "dtype") else "right", overflow="fold")
    for part in summary.modules:
        blocks = str(part.blocks) if part.blocks else ""
        values, mega = f"{part.parameters / 1e6:.2f} M", f"{part.nbytes / 1e6:.1f} MB"
        known = "all" if part.known == part.tensors else str(part.known)
        table.add_row(part.module, str(part.tensors), blocks, values, mega, ", ".join(part.dtypes), known)
    yield Group("", table)
    for line in summary.notes:
        yield Text(f"note: {line}", style="dim")
    for key, flaw in summary.non_finite.items():
        yield Text(f"warning: {key} holds {flaw}", style="yellow")
