"""Bytes to tensors: open a checkpoint wherever and however it is stored, mapped and without running code from it.

``.pt/.pth/.bin`` (zip and legacy), ``.safetensors``, sharded ``*.index.json`` of both kinds, a folder, or the id of a
repository on the Hugging Face hub. What wraps the tensors (``{"model": {...}}``) is peeled and remembered.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from vggt_mv.weights.errors import UnsafePickleError, WeightsFileError
from vggt_mv.weights.safetensors_io import looks_like_safetensors, read_safetensors

__all__ = ["CONTAINERS", "WeightsFile", "dtype_name", "open_weights"]

CONTAINERS: Final = ("model", "state_dict", "model_state_dict", "ema")
SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin")
# In the order in which a folder or a repository is searched.
STANDARD_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
)
_SHARD: Final = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_HUB_ID: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_NEEDS_CODE: Final = re.compile(
    r"Unsupported (?:global|class)|not an allowed global|unrecognized function|can only build", re.I
)


@dataclass
class WeightsFile:
    """An opened checkpoint.

    Attributes:
        tensors: as the file names them, containers peeled; mapped where `mapped`.
        path: as given.
        files: every file read.
        format: ``"safetensors"``, ``"pytorch"``, ``"pytorch legacy"`` or ``"memory"``.
        container: the wrappers peeled, outermost first.
        metadata: of a safetensors header or a shard index.
        mapped: tensors are private views of the file; nothing was read yet.
        notes: what a report should say about the file.
    """

    tensors: Mapping[str, Any]
    path: str = "state_dict"
    files: tuple[Path, ...] = ()
    format: str = "memory"
    container: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    mapped: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_mapping(cls, value: Mapping[str, Any], path: str = "state_dict") -> WeightsFile:
        """From a mapping in memory: tensors or shapes by name, wrapped or not."""
        tensors, container, notes = _unwrap(value, path)
        return cls(tensors, path, container=container, notes=notes)

    @property
    def nbytes(self) -> int:
        """Size of the files on disk."""
        return sum(file.stat().st_size for file in self.files)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def open_weights(
    source: str | Path,
    *,
    unsafe_pickle: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> WeightsFile:
    """Open a checkpoint: a file, a folder, a shard index, or a hub id such as ``"facebook/VGGT-1B"``.

    Args:
        source: where it is. A path that exists is never taken for a hub id.
        unsafe_pickle: run the code that a pickle brings. Only for files that you trust as you trust a program.
        revision, cache_dir, token, force_download, local_files_only: as in ``huggingface_hub``.

    Raises:
        UnsafePickleError: the file needs code to be read.
        WeightsFileError: missing, empty, truncated, corrupt, without tensors, or ambiguous.
    """
    text, path = str(source), Path(source).expanduser()
    if not text.strip():
        raise WeightsFileError("the path of the weights must not be empty")
    if path.is_dir():
        return _open_files(text, *_locate(path), unsafe_pickle)
    if path.is_file():
        return _open_path(text, path, unsafe_pickle)
    if "://" in text:
        raise WeightsFileError(f"{text}: downloading from a URL is not supported; give a file, a folder or a hub id")
    if isinstance(source, Path) or path.suffix in (*SUFFIXES, ".json") or not _HUB_ID.fullmatch(text):
        raise WeightsFileError(f"{text}: no such file or folder; check its spelling")
    hub = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    return _open_files(text, *_download(text, hub), unsafe_pickle)


def _open_path(text: str, path: Path, unsafe_pickle: bool) -> WeightsFile:
    if path.name.endswith(".json"):
        return _open_files(text, *_shards_of(path), unsafe_pickle)
    return _open_files(text, [path], {}, {}, unsafe_pickle)


def _open_files(
    text: str, paths: Sequence[Path], where: Mapping[str, str], metadata: dict[str, str], unsafe_pickle: bool
) -> WeightsFile:
    """Open one file, or shards and put them together; `where` is the index's map name -> file name, if there is one."""
    opened = [_open_one(path, unsafe_pickle) for path in paths]
    tensors: dict[str, Any] = {}
    home: dict[str, Path] = {}
    notes = [note for file in opened for note in file.notes]
    for file in opened:
        for key, value in file.tensors.items():
            if key in tensors:
                raise WeightsFileError(f"{text}: {key!r} is both in {home[key].name} and in {file.files[0].name}")
            tensors[key], home[key] = value, file.files[0]
    for key, name in where.items():
        if key not in home or home[key].name != Path(name).name:
            raise WeightsFileError(f"{text}: the index puts {key!r} into {name}, which does not hold it")
    strays = [key for key in tensors if where and key not in where]
    if strays:
        notes.append(f"{len(strays)} tensors are in the shards and not in the index, such as {strays[0]!r}")
    return WeightsFile(
        tensors,
        text,
        tuple(paths),
        opened[0].format,
        opened[0].container,
        metadata | {key: value for file in opened for key, value in file.metadata.items()},
        all(file.mapped for file in opened),
        notes,
    )


def _open_one(path: Path, unsafe_pickle: bool) -> WeightsFile:
    """One file, whatever its suffix says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}") from error
    if size == 0:
        raise WeightsFileError(f"{path} is empty (0 bytes); fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsFileError(f"{path} is a Git LFS pointer and not the weights; fetch them with 'git lfs pull'")
    if path.suffix == ".safetensors" or looks_like_safetensors(path):
        tensors, metadata = read_safetensors(path)
        if not tensors:
            raise WeightsFileError(f"{path} holds no tensors; fetch it again, or name another file")
        return WeightsFile(tensors, str(path), (path,), "safetensors", (), metadata, mapped=True)
    archive = head.startswith(b"PK\x03\x04")
    value = _unpickle(path, archive, unsafe_pickle)
    named, container, notes = _unwrap(value, str(path))
    _check_tensors(path, named)
    if not archive:
        notes.append(f"{path.name} is in PyTorch's legacy format, which cannot be mapped: it was read as a whole")
    kind = "pytorch" if archive else "pytorch legacy"
    return WeightsFile(named, str(path), (path,), kind, container, {}, mapped=archive, notes=notes)


def _unpickle(path: Path, archive: bool, unsafe_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd files; what matters becomes an error below
            return torch.load(path, map_location="cpu", weights_only=not unsafe_pickle, mmap=archive)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        text = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())  # without torch's advice
        if "TorchScript" in text:
            raise WeightsFileError(
                f"{path} is a TorchScript archive (a program); save its state_dict() and load that"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and _NEEDS_CODE.search(text):
            raise UnsafePickleError(
                f"{path} needs code to be read ({_wanted_globals(path, text)}): refused. If you trust its source, "
                f"convert it once: vggt-mv weights convert {path} OUT.safetensors --unsafe-pickle "
                f"(or pass unsafe_pickle=True)"
            ) from error
        kind = "PyTorch archive" if archive else "PyTorch or safetensors file"
        raise WeightsFileError(
            f"{path} is truncated, corrupt or not a {kind} ({type(error).__name__}: {text.split('. ')[0][:160]}); "
            "fetch it again"
        ) from error


def _wanted_globals(path: Path, text: str) -> str:
    """The names that the pickle would import, as far as they can be told."""
    try:
        from torch.serialization import get_unsafe_globals_in_checkpoint

        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # older torch, or a legacy file: the message still names the first one
        names = []
    names = names or re.findall(r"(?:GLOBAL|class) ([\w.]+)", text)[:1]
    return ", ".join(names[:4]) or "a pickled object"


def _unwrap(value: Any, path: str) -> tuple[Mapping[str, Any], tuple[str, ...], list[str]]:
    """Peel containers: the mapping name -> tensor, the wrappers, and a note on what lay beside them."""
    container: list[str] = []
    notes: list[str] = []
    while True:
        if isinstance(value, nn.Module):
            value = value.state_dict()
            container.append(f"{type(value).__name__}.state_dict()")
        if not isinstance(value, Mapping):
            raise WeightsFileError(f"{path} must hold a mapping name -> tensor, got {type(value).__name__}")
        wrapper = next((name for name in CONTAINERS if isinstance(value.get(name), (Mapping, nn.Module))), None)
        if wrapper is None:
            break
        beside = [repr(key) for key in value if key != wrapper]
        if beside:
            more = f" and {len(beside) - 6} more" if len(beside) > 6 else ""
            notes.append(f"besides {wrapper!r} the file holds {', '.join(beside[:6])}{more}: not used")
        container.append(wrapper)
        value = value[wrapper]
    if not value:
        inside = " in " + " > ".join(repr(name) for name in container) if container else ""
        raise WeightsFileError(f"{path} holds no tensors{inside}: the mapping is empty; save a state_dict() into it")
    return value, tuple(container), notes


def _check_tensors(path: Path, named: Mapping[str, Any]) -> None:
    for key, value in named.items():
        if not isinstance(key, str):
            raise WeightsFileError(f"{path}: tensor names must be strings, got {key!r}")
        if not isinstance(value, Tensor):
            hint = f" (containers understood: {', '.join(CONTAINERS)})" if isinstance(value, Mapping) else ""
            raise WeightsFileError(f"{path}: the value of {key!r} must be a tensor, got {type(value).__name__}{hint}")
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
            raise WeightsFileError(f"{path}: {key!r} must be a dense tensor, got a {kind} one")


def _locate(folder: Path) -> tuple[list[Path], dict[str, str], dict[str, str]]:
    """The checkpoint in a folder: a standard name, a shard index, numbered shards, or the only weights file."""
    for name in STANDARD_NAMES:
        if (folder / name).is_file():
            return _shards_of(folder / name) if name.endswith(".json") else ([folder / name], {}, {})
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return _shards_of(indices[0])
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        return files, {}, {}
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if files and len(shards) == len(files) and len({(m[1], m[3], m[4]) for m in shards}) == 1:
        total = int(shards[0][3])
        have = {int(match[2]) for match in shards}
        absent = [number for number in range(1, total + 1) if number not in have]
        if absent:
            raise WeightsFileError(f"{folder}: shard {absent[0]} of {total} is missing")
        return files, {}, {}
    if files:
        raise WeightsFileError(
            f"{folder} holds several weights files; give one: {', '.join(f.name for f in files[:8])}"
        )
    raise WeightsFileError(f"{folder} holds no weights: none of {', '.join(STANDARD_NAMES)}, nor {'/'.join(SUFFIXES)}")


def _shards_of(index: Path) -> tuple[list[Path], dict[str, str], dict[str, str]]:
    where, metadata = _read_index(index)
    paths = [index.parent / name for name in dict.fromkeys(where.values())]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise WeightsFileError(f"{index}: {len(absent)} of {len(paths)} shards are missing, such as {absent[0]}")
    return paths, where, metadata


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsFileError(f"{index} is not a readable shard index ({error})") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise WeightsFileError(f"{index} is not a shard index: it has no 'weight_map'")
    for key, name in where.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise WeightsFileError(f"{index}: {key!r} must be in a file beside the index, got {name!r}")
    metadata = content.get("metadata")
    return where, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _download(repo: str, hub: dict[str, Any]) -> tuple[list[Path], dict[str, str], dict[str, str]]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsFileError(f"{repo}: no such file or folder, and no huggingface_hub to download it") from error
    for name in STANDARD_NAMES:
        try:
            path = Path(hf_hub_download(repo_id=repo, filename=name, **hub))
            if not name.endswith(".json"):
                return [path], {}, {}
            where, metadata = _read_index(path)
            shards = [Path(hf_hub_download(repo_id=repo, filename=n, **hub)) for n in dict.fromkeys(where.values())]
            return shards, where, metadata
        except WeightsFileError:
            raise
        except Exception as error:  # no network, no such repository, no permission: the hub has many of them
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = " ".join(str(error).split())[:160]
            raise WeightsFileError(
                f"{repo} is neither a file or folder here nor a reachable hub repository "
                f"({type(error).__name__}: {reason})"
            ) from error
    raise WeightsFileError(f"{repo}: the hub repository holds none of {', '.join(STANDARD_NAMES)}")
