"""What a person sees while a command runs: bars, warnings, a summary. All of it goes to stderr but results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from vggt_mv.errors import VggtMvError

_STAGES = {
    "render": "rendering",
    "check": "checking files",
    "weights check": "checking weights",
    "weights write": "loading weights",
    "images": "reading images",
    "patch_embed": "patch embedding",
    "attention": "attention",
    "camera": "cameras",
    "depth": "depth",
    "points": "points",
    "tracks": "tracks",
    "collect": "collecting",
    "windows": "windows",
    "write": "writing",
}


class Bars:
    """Progress bars on a terminal, one a stage; itself the callback that functions with a `progress` argument call.

    Where stderr is a file there are none: a log should hold the errors and the summary.

    Example:
        >>> with Bars(quiet=True) as bars:
        ...     bars("images", 1, 2)
    """

    def __init__(self, *, quiet: bool) -> None:
        console = Console(file=sys.stderr)
        self._tasks: dict[str, TaskID] = {}
        self._shown = False
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._add(_STAGES.get(stage, stage), total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def loading(self, stage: str, done: int, total: int) -> None:
        """The callback of functions that load weights, which count bytes; the bars count megabytes."""
        self(f"weights {stage}", done // 1_000_000, max(total // 1_000_000, 1))

    @contextlib.contextmanager
    def busy(self, description: str) -> Iterator[None]:
        """A bar without an end for work that cannot say how far it is."""
        task = self._add(description, None)
        yield
        self._progress.update(task, total=1, completed=1)

    def _add(self, description: str, total: int | None) -> TaskID:
        # Not before: a display without a bar would still print an empty line.
        self._shown = True
        self._progress.start()
        return self._progress.add_task(description, total=total)


def load_operators() -> None:
    """Import `vggt_mv_ext`, where a broken installation or a wrong environment variable comes to light first."""
    try:
        import vggt_mv_ext  # noqa: F401
    except (ImportError, ValueError) as error:
        raise VggtMvError(str(error)) from error


def note(text: str, *, quiet: bool = False, style: str = "") -> None:
    """A line on stderr, its text taken as it is (paths may hold what rich would take for markup)."""
    if not quiet:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(Text(text, style=style))


def size(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(5_060_000_000)
        '5.06 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError


def large(count: int) -> str:
    """A number of parameters for people.

    Example:
        >>> large(1_256_537_675), large(5_100_000)
        ('1.26 B', '5.1 M')
    """
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
