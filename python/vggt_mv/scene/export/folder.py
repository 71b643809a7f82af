"""Output folders that are complete or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from vggt_mv.errors import VggtMvError

REPORT_NAME = "report.json"
REPORT_FORMAT = "vggt_mv.reconstruction"
# What file managers leave behind in any folder that somebody has looked at.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


@contextlib.contextmanager
def output_folder(
    path: str | Path, *, overwrite: bool = False, marker: str = REPORT_NAME, marker_format: str = REPORT_FORMAT
) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` when the block ends well.

    When the block raises, Ctrl-C included, the folder goes and ``path`` stays as it was. An earlier output is replaced
    only after the new one is complete.

    Args:
        path: must not exist or be an empty folder, unless ``overwrite``. Missing parents are made.
        overwrite: allow an earlier output at ``path``. It must hold a marker of ours and no file that is not listed
            there: a folder with anything else in it is never deleted.
        marker, marker_format: the JSON file that marks an earlier output, with this ``format`` and all its ``files``.

    Raises:
        VggtMvError: ``path`` is a file, is not empty, is not an output of ours, or its parent cannot be written.
    """
    target = Path(os.path.realpath(path))
    check_target(target, str(path), overwrite, marker, marker_format)
    staging = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    made_parents: list[Path] = []
    try:
        try:
            for parent in reversed([parent for parent in target.parents if not os.path.exists(parent)]):
                parent.mkdir()
                made_parents.insert(0, parent)
            staging.mkdir()
        except OSError as error:
            raise unwritable(path, error) from error
        yield staging
        try:
            # Looked at again: somebody may have put something there in the meantime.
            check_target(target, str(path), overwrite, marker, marker_format)
            move_into_place(staging, target)
        except OSError as error:
            raise unwritable(path, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def files_under(folder: Path) -> list[str]:
    """Relative names, with forward slashes, of all files below a folder, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def check_target(
    target: Path, shown: str, overwrite: bool, marker: str = REPORT_NAME, marker_format: str = REPORT_FORMAT
) -> None:
    """Raise VggtMvError unless an output may take the place of ``target``; see ``output_folder``."""
    if not os.path.exists(target):
        return
    if not target.is_dir():
        raise VggtMvError(f"output {shown!r} is a file; name a folder that is new or empty")
    if os.path.ismount(target):
        raise VggtMvError(
            f"output {shown!r} is a mount point, and results are renamed into place; name a folder inside it, "
            f"such as {os.path.join(shown, 'reconstruction')!r}"
        )
    try:
        present = [name for name in files_under(target) if Path(name).name not in _LITTER]
        empty = not any(target.iterdir())
    except OSError as error:
        raise unwritable(shown, error) from error
    if empty:
        return
    if not overwrite:
        raise VggtMvError(
            f"output folder {shown!r} is not empty; choose another one, or replace it with --overwrite (overwrite=True)"
        )
    written = _files_of_output(target / marker, marker_format)
    if written is None:
        raise VggtMvError(
            f"output folder {shown!r} is not an earlier output (no {marker} of vggt-mv in it) and will not be "
            "overwritten; empty it yourself or choose another one"
        )
    foreign = [name for name in present if name not in written]
    if foreign:
        raise VggtMvError(
            f"output folder {shown!r} holds {foreign[0]!r}, which vggt-mv did not write, and will not be overwritten; "
            "move that file away or choose another folder"
        )


def _files_of_output(marker: Path, marker_format: str) -> set[str] | None:
    """The files that the marker of an earlier output lists, or None where there is no such marker."""
    try:
        report = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (
        not isinstance(report, dict)
        or report.get("format") != marker_format
        or not isinstance(report.get("files"), list)
    ):
        return None
    return {str(name) for name in report["files"]}


def move_into_place(staging: Path, target: Path) -> None:
    """Rename a complete output to its place; an earlier one goes only after that."""
    if not os.path.exists(target):
        staging.rename(target)
        return
    previous = target.with_name(f".{target.name}.{secrets.token_hex(4)}.previous")
    target.rename(previous)
    try:
        staging.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def unwritable(path: str | Path, error: OSError) -> VggtMvError:
    """The error for an output folder that the system refuses."""
    return VggtMvError(
        f"output folder {str(path)!r} cannot be written ({error.strerror or error}); choose one that you may write to"
    )
