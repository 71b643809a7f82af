"""The entry point: arguments in, exit code out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from vggt_mv.errors import VggtMvError

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Bad input is one line on stderr and exit code 2, and nothing has been written then. Anything unforeseen keeps its
    traceback.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"vggt-mv: error: {error.name} is missing; install it with: pip install typer rich", file=sys.stderr)
        return EXIT_BAD_INPUT
    # PyTorch reads this when it first allocates. Activations come and go by the hundred megabytes, and a system that
    # hands them out in pages of 4 KiB takes longer for that than the cheaper operators take to fill them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from vggt_mv.cli.app import app

    with _terminating_politely(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(args=None if argv is None else list(argv), prog_name="vggt-mv")
        except VggtMvError as error:
            print(f"vggt-mv: error: {one_line(str(error))}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def one_line(text: str) -> str:
    """A message on one line, whatever a file name in it holds."""
    return " ".join(text.split())


@contextlib.contextmanager
def _terminating_politely() -> Iterator[None]:
    """SIGTERM as an exception in this block, so that what is half written is removed on the way out."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    # A path and a line number help the author of a program; here they would only hide the message.
    if issubclass(category, UserWarning):
        print(f"vggt-mv: warning: {one_line(str(message))}", file=sys.stderr)
