"""Arrays of frames on disk, written and read a few times at a time: predictions/NAME.npy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FrameStore"]


class FrameStore:
    """One .npy file an array [T, ...], in a folder; memory holds the times that are asked for, and no more.

    Each file has its final size from the beginning, so a time has one place, and writing it again changes nothing else.

    Example:
        >>> import tempfile
        >>> store = FrameStore(Path(tempfile.mkdtemp()) / "predictions", num_times=3)
        >>> store.write(1, {"depth": np.ones((2, 4))})
        >>> store.read(0, 2)["depth"][:, 0].tolist()
        [0.0, 1.0]
    """

    def __init__(self, folder: Path, num_times: int) -> None:
        self.folder = folder
        self.num_times = num_times
        folder.mkdir(exist_ok=True)

    def names(self) -> list[str]:
        """Of all arrays, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.npy"))

    def write(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the times from ``start`` on."""
        for name, array in arrays.items():
            path = self.folder / f"{name}.npy"
            if not path.exists():
                shape = (self.num_times, *array.shape[1:])
                # A sparse file: nothing of it is in memory.
                np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=shape)
            offset, shape, dtype = _layout(path)
            assert (array.dtype, array.shape[1:]) == (dtype, shape[1:]), (name, array.dtype, array.shape, shape)
            with path.open("rb+") as file:
                file.seek(offset + start * _bytes_per_time(shape, dtype))
                file.write(np.ascontiguousarray(array).data)

    def read(self, start: int, stop: int, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of the times from ``start`` up to and without ``stop``; of some names only, if given."""
        arrays = {}
        for name in self.names() if names is None else sorted(set(self.names()) & set(names)):
            path = self.folder / f"{name}.npy"
            offset, shape, dtype = _layout(path)
            size = _bytes_per_time(shape, dtype)
            flat = np.fromfile(
                path, dtype=dtype, count=(stop - start) * size // dtype.itemsize, offset=offset + start * size
            )
            arrays[name] = flat.reshape(stop - start, *shape[1:])
        return arrays

    def times(self, names: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """(t, arrays of that time) for every time."""
        for t in range(self.num_times):
            yield t, self.read(t, t + 1, names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array."""
        return {name: _layout(self.folder / f"{name}.npy")[1] for name in self.names()}


def _layout(path: Path) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """(offset of the data, shape, dtype) of a .npy file."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        assert not fortran, path
        return file.tell(), shape, dtype


def _bytes_per_time(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
