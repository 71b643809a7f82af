"""Output folders of runs that can be stopped at any moment and go on later."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.export.folder import check_target, move_into_place, unwritable

__all__ = ["PartialOutput", "partial_folder", "resumable_folder"]

_FINGERPRINT = "run.json"
_FINGERPRINT_FORMAT = "vggt_mv.unfinished_run"
_STATE = "state.npz"
_LOCK = "lock"


class PartialOutput:
    """What an unfinished run has beside its output's place.

    Attributes:
        folder: holds everything; goes when the run is complete.
        output: becomes the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"

    def load(self) -> dict[str, NDArray[Any]] | None:
        """The state that was committed last, or None at the beginning."""
        path = self.folder / _STATE
        if not path.exists():
            return None
        with np.load(path) as file:
            return dict(file)

    def clear_output(self, but: str) -> None:
        """Remove all from the output but one entry."""
        for entry in self.output.iterdir():
            if entry.name != but:
                _remove(entry)

    def commit(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put a state in place of the last one, as a whole: whenever the run is stopped, one of the two is there.

        All that was written into ``output`` before is on the disk first.
        """
        for path in self.output.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        written = self.folder / f"{_STATE}.new"
        with written.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        written.replace(self.folder / _STATE)


def partial_folder(path: str | Path) -> Path:
    """Where the partial output of an output folder lies."""
    target = Path(os.path.realpath(path))
    return target.parent / f".{target.name}.partial"


@contextlib.contextmanager
def resumable_folder(
    path: str | Path, fingerprint: Mapping[str, str], *, overwrite: bool = False
) -> Iterator[PartialOutput]:
    """Yield a partial output beside ``path`` whose ``output`` becomes ``path`` when the block ends well.

    When the block raises or the process is killed, the partial output stays, if a state has been committed; the next
    run for the same ``path`` finds it. ``path`` itself stays as it was until the output is complete.

    Args:
        path: as for ``output_folder``. The partial output of ``a/b`` is ``a/.b.partial``.
        fingerprint: what the results depend on, by name; a run goes on only where all of it is the same.
        overwrite: allow an earlier output at ``path``, and discard the partial output of another run.

    Raises:
        VggtMvError: as ``output_folder``; a partial output of a run with another fingerprint, or one that another
            process is writing.
    """
    target = Path(os.path.realpath(path))
    check_target(target, str(path), overwrite)
    partial = PartialOutput(partial_folder(target))
    made_parents: list[Path] = []
    try:
        for parent in reversed([parent for parent in target.parents if not os.path.exists(parent)]):
            parent.mkdir()
            made_parents.insert(0, parent)
        found = partial.folder.exists()
        partial.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with _locked(partial.folder, path):
        if found:
            _accept(partial.folder, path, fingerprint, overwrite)
        try:
            try:
                _write_fingerprint(partial.folder, fingerprint)
                partial.output.mkdir(exist_ok=True)
            except OSError as error:
                raise unwritable(path, error) from error
            yield partial
            try:
                check_target(target, str(path), overwrite)
                move_into_place(partial.output, target)
            except OSError as error:
                raise unwritable(path, error) from error
            shutil.rmtree(partial.folder, ignore_errors=True)
        except BaseException:
            if not (partial.folder / _STATE).exists():
                shutil.rmtree(partial.folder, ignore_errors=True)
                for parent in made_parents:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise


def _accept(folder: Path, path: str | Path, fingerprint: Mapping[str, str], overwrite: bool) -> None:
    """Keep what another run left if it is of this run; clear the folder if it may be discarded; raise if not."""
    left = [entry for entry in folder.iterdir() if entry.name != _LOCK]
    before = _read_fingerprint(folder)
    if before is None:
        # Stopped before it had even begun, or nothing of ours.
        if left:
            raise VggtMvError(
                f"{str(folder)!r} is in the way and no unfinished run of vggt-mv; move it away, or choose another "
                "output folder"
            )
        return
    different = sorted(name for name in {*before, *fingerprint} if before.get(name) != fingerprint.get(name))
    if different and not overwrite:
        raise VggtMvError(
            f"an unfinished run for output folder {str(path)!r} had another {' and '.join(different)}; let it go on "
            "with what it had, or discard it with --overwrite (overwrite=True)"
        )
    # Without a state nothing in there is of use.
    if different or not (folder / _STATE).exists():
        for entry in left:
            _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _read_fingerprint(folder: Path) -> dict[str, str] | None:
    try:
        content = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("format", None) != _FINGERPRINT_FORMAT:
        return None
    return {str(name): str(value) for name, value in content.items()}


def _write_fingerprint(folder: Path, fingerprint: Mapping[str, str]) -> None:
    written = folder.parent / f"{folder.name}.{_FINGERPRINT}"  # never half a file inside
    written.write_text(json.dumps({"format": _FINGERPRINT_FORMAT, **fingerprint}, indent=1), encoding="utf-8")
    written.replace(folder / _FINGERPRINT)


@contextlib.contextmanager
def _locked(folder: Path, path: str | Path) -> Iterator[None]:
    """Hold the folder against other processes; the system lets go when this one ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / _LOCK).open("w") as file:
        _lock(fcntl, file, path)
        yield


def _lock(fcntl: Any, file: IO[str], path: str | Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise VggtMvError(
            f"output folder {str(path)!r} is being written by another run; wait for it, or choose another folder"
        ) from error
