"""Every kind of file, folder and wrapper that is read, and the one-line error of every kind that is not."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from weights_support import small, tensors

from vggt_mv.errors import VggtMvError
from vggt_mv.weights import UnsafePickleError, WeightsFileError, open_weights
from vggt_mv.weights.safetensors_io import read_safetensors, write_safetensors

STATE = dict(list(tensors(small("vggt_1b", blocks=1)).items())[:40])


def same(found: Any, wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert isinstance(error.value, VggtMvError)
    assert "\n" not in text
    return text


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# ---- files that are read


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pytorch_files_are_mapped(tmp_path: Path, suffix: str) -> None:
    torch.save(STATE, tmp_path / f"w{suffix}")
    file = open_weights(tmp_path / f"w{suffix}")
    assert same(file.tensors, STATE)
    assert (file.format, file.mapped, file.container) == ("pytorch", True, ())


def test_legacy_files_are_read_and_said_to_be_unmapped(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    file = open_weights(tmp_path / "w.pt")
    assert same(file.tensors, STATE)
    assert (file.format, file.mapped) == ("pytorch legacy", False)
    assert file.notes == ["w.pt is in PyTorch's legacy format, which cannot be mapped: it was read as a whole"]


def test_safetensors_of_the_library(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors", metadata={"made_by": "library"})
    file = open_weights(str(tmp_path / "w.safetensors"))
    assert same(file.tensors, STATE)
    assert (file.format, file.mapped, file.metadata) == ("safetensors", True, {"made_by": "library"})


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "w.bin")
    assert open_weights(tmp_path / "w.bin").format == "safetensors"


def test_mapped_tensors_are_private(tmp_path: Path) -> None:
    for name, save in (("w.pt", torch.save), ("w.safetensors", safetensors.torch.save_file)):
        save(STATE, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        for value in open_weights(tmp_path / name).tensors.values():
            value.zero_()
        assert (tmp_path / name).read_bytes() == before


ALL_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {str(dtype): (torch.rand(3, 5, generator=generator) * 4).to(dtype) for dtype in ALL_DTYPES}
    state |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "strided": torch.arange(12.0).view(3, 4).T}
    path = tmp_path / "w.safetensors"
    write_safetensors(path, state, {"a": "b"})
    with safetensors.safe_open(path, "pt") as library:
        assert set(library.keys()) == state.keys()
        assert library.metadata() == {"a": "b", "format": "pt"}
        for key, value in state.items():
            found = library.get_tensor(key)
            assert found.dtype == value.dtype
            assert found.tolist() == value.tolist()
    ours, metadata = read_safetensors(path)
    assert metadata == {"a": "b", "format": "pt"}
    for key, value in state.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
        assert ours[key].tolist() == value.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_written_data_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(16)})
    length = struct.unpack("<Q", (tmp_path / "w.safetensors").read_bytes()[:8])[0]
    assert (8 + length) % 64 == 0


def test_unaligned_tensors_are_readable(tmp_path: Path) -> None:
    data = b"\x07" + struct.pack("<2f", 1.0, 2.0)
    header = {
        "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    found, _ = read_safetensors(raw_safetensors(tmp_path / "w.safetensors", header, data))
    assert found["a"].tolist() == [7]
    assert found["b"].tolist() == [1.0, 2.0]
    assert found["b"].data_ptr() % 4 == 0


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(4)})
    before = path.read_bytes()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"a": torch.zeros(4)}, progress=interrupt)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# ---- wrappers


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "ema"])
def test_wrappers_are_peeled(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: STATE, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    file = open_weights(tmp_path / "w.pt")
    assert same(file.tensors, STATE)
    assert file.container == (wrapper,)
    assert file.notes == [f"besides {wrapper!r} the file holds 'epoch', 'optimizer': not used"]


def test_nested_wrappers_and_a_second_copy(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model": STATE}, "ema": STATE}, tmp_path / "w.pt")
    file = open_weights(tmp_path / "w.pt")
    assert file.container == ("state_dict", "model")
    assert file.notes == ["besides 'state_dict' the file holds 'ema': not used"]


def test_a_pickled_module_with_permission(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 3)}, tmp_path / "w.pt")
    file = open_weights(tmp_path / "w.pt", unsafe_pickle=True)
    assert set(file.tensors) == {"weight", "bias"}


# ---- shards, folders, hub


def write_shards(folder: Path, *, kind: str = "safetensors", index: bool = True) -> dict[str, str]:
    """STATE in three files; returns the index's map."""
    folder.mkdir(exist_ok=True)
    keys, where = list(STATE), {}
    for number in range(3):
        suffix = "safetensors" if kind == "safetensors" else "bin"
        stem = "model" if kind == "safetensors" else "pytorch_model"
        name = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        part = {key: STATE[key] for key in keys[number::3]}
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(part, folder / name)
        where |= dict.fromkeys(part, name)
    if index:
        name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
        (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return where


@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
@pytest.mark.parametrize("how", ["folder", "index", "folder without index"])
def test_shards(tmp_path: Path, kind: str, how: str) -> None:
    write_shards(tmp_path, kind=kind, index=how != "folder without index")
    source = next(tmp_path.glob("*.index.json")) if how == "index" else tmp_path
    file = open_weights(source)
    assert same(file.tensors, STATE)
    assert len(file.files) == 3
    assert file.mapped


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "anything.pth"])
def test_folders(tmp_path: Path, name: str) -> None:
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert same(open_weights(tmp_path).tensors, STATE)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A hub that has the files of a folder; returns the list of what was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append(f"{repo_id}/{filename}@{options['revision']}")
        if not (folder / filename).is_file():
            raise EntryNotFoundError("no such entry")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "model.pt")
    asked = fake_hub(monkeypatch, tmp_path)
    file = open_weights("someone/some-model", revision="v1")
    assert same(file.tensors, STATE)
    assert asked[-1] == "someone/some-model/model.pt@v1"


def test_sharded_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    fake_hub(monkeypatch, tmp_path)
    assert same(open_weights("someone/some-model").tensors, STATE)


def test_hub_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fake_hub(monkeypatch, tmp_path)
    with pytest.raises(
        WeightsFileError, match=r"someone/empty: the hub repository holds none of model.safetensors"
    ) as e:
        open_weights("someone/empty")
    one_line(e)

    def offline(**options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsFileError, match="neither a file or folder here nor a reachable hub repository") as e:
        open_weights("some/typo")
    assert "some/typo" in one_line(e)
    assert "no route to host" in str(e.value)


def test_offline_without_cache_is_not_taken_for_an_empty_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(**options: Any) -> str:
        raise LocalEntryNotFoundError("not in the cache and offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsFileError, match=r"nor a reachable hub repository \(LocalEntryNotFoundError"):
        open_weights("some/model")


# ---- files that are not read


def truncated(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def _zip_cut(folder: Path) -> Path:
    torch.save(STATE, folder / "w.pt")
    return truncated(folder / "w.pt", 0.6)


def _legacy_cut(folder: Path) -> Path:
    torch.save(STATE, folder / "w.pt", _use_new_zipfile_serialization=False)
    return truncated(folder / "w.pt", 0.6)


def _safetensors_cut(folder: Path) -> Path:
    safetensors.torch.save_file(STATE, folder / "w.safetensors")
    return truncated(folder / "w.safetensors", 0.6)


def _safetensors_head(folder: Path) -> Path:
    safetensors.torch.save_file(STATE, folder / "w.safetensors")
    return truncated(folder / "w.safetensors", 0.001)


def _file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _saved(value: Any, name: str = "w.pt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value, folder / name)
        return folder / name

    return make


def _header(header: Any, data: bytes = b"") -> Callable[[Path], Path]:
    return lambda folder: raw_safetensors(folder / "w.safetensors", header, data)


def _field(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _script(folder: Path) -> Path:
    torch.jit.script(nn.Linear(1, 1)).save(str(folder / "w.pt"))
    return folder / "w.pt"


BAD_FILES = [
    ("empty", _file("w.pt", b""), r"w.pt is empty \(0 bytes\)"),
    ("empty safetensors", _file("w.safetensors", b""), r"w.safetensors is empty \(0 bytes\)"),
    (
        "text",
        _file("w.pt", b"hello, I am no weights\n" * 9),
        "w.pt is truncated, corrupt or not a PyTorch or safetensors",
    ),
    ("zip cut", _zip_cut, r"w.pt is truncated, corrupt or not a PyTorch archive \(\w+Error"),
    ("legacy cut", _legacy_cut, "w.pt is truncated, corrupt or not a PyTorch or safetensors file"),
    (
        "safetensors cut",
        _safetensors_cut,
        r"w.safetensors is truncated: '.*' ends at byte \d+ of the data, the file has",
    ),
    ("safetensors head", _safetensors_head, r"w.safetensors is truncated: its header takes \d+ bytes, the file has"),
    ("five bytes", _file("w.safetensors", b"12345"), "is truncated: 5 bytes are too few for a safetensors header"),
    ("huge header", _file("w.safetensors", b"\xff" * 64), "is not a safetensors file: its header would be"),
    ("lfs pointer", _file("w.bin", b"version https://git-lfs.github.com/spec/v1\noid x"), "w.bin is a Git LFS pointer"),
    ("torchscript", _script, r"w.pt is a TorchScript archive \(a program\); save its state_dict\(\)"),
    ("empty dict", _saved({}), "w.pt holds no tensors: the mapping is empty"),
    ("empty model", _saved({"model": {}}), "w.pt holds no tensors in 'model': the mapping is empty"),
    ("a list", _saved([torch.ones(1)]), "w.pt must hold a mapping name -> tensor, got list"),
    ("a tensor", _saved(torch.ones(1)), "w.pt must hold a mapping name -> tensor, got Tensor"),
    ("stray value", _saved({**STATE, "epoch": 3}), "w.pt: the value of 'epoch' must be a tensor, got int"),
    (
        "unknown wrapper",
        _saved({"net": STATE}),
        r"'net' must be a tensor, got dict \(containers understood: model, state_dict, model_state_dict, ema\)",
    ),
    ("integer names", _saved({0: torch.ones(1)}), "tensor names must be strings, got 0"),
    ("sparse", _saved({"a": torch.eye(2).to_sparse()}), "w.pt: 'a' must be a dense tensor, got a sparse_coo one"),
    ("bad json", _header(b"{not json"), "is corrupt: its header is not valid JSON"),
    ("json list", _header(b"[1]     "), "is corrupt: its header must be a JSON object, got list"),
    ("twice", _header(b'{"a":{},"a":{}}'), "is corrupt: its header is not valid JSON .*the key 'a' is there twice"),
    (
        "no offsets",
        _header({"a": {"dtype": "F32", "shape": [1]}}),
        "the header of 'a' must have dtype, shape, data_offsets",
    ),
    ("field", _header({"a": 3}), "the header of 'a' must have dtype, shape, data_offsets"),
    ("negative", _header({"a": _field(shape=(-2,))}), r"is corrupt: 'a' has shape \[-2\] at bytes 0..8"),
    ("dtype", _header({"a": _field(dtype="F4")}), "w.safetensors: 'a' has dtype 'F4'; known are F64, F32"),
    ("size", _header({"a": _field(offsets=(0, 4))}, b"\0" * 8), r"takes 8 bytes, the header gives it 4"),
    (
        "overlap",
        _header({"a": _field(), "b": _field(offsets=(4, 12))}, b"\0" * 12),
        "is corrupt: 'a' and 'b' share bytes",
    ),
    ("no tensors", _header({"__metadata__": {"a": "b"}}), "w.safetensors holds no tensors"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("make", "text"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_bad_files(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    with pytest.raises(WeightsFileError, match=text) as error:
        open_weights(make(tmp_path))
    assert str(tmp_path) in one_line(error)


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("open('pwned', 'w')",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_that_need_code_are_refused(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("args.pt", argparse.Namespace(lr=1)), ("evil.pt", Evil())):
        torch.save({"model": STATE, "extra": value}, name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UnsafePickleError, match=f"{name} needs code to be read") as error:
            open_weights(name)
        text = one_line(error)
        assert "argparse.Namespace" in text if name == "args.pt" else "eval" in text
        assert f"vggt-mv weights convert {name} OUT.safetensors --unsafe-pickle" in text
    assert not (tmp_path / "pwned").exists()
    assert same(open_weights("args.pt", unsafe_pickle=True).tensors, STATE)


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsFileError) as error:
        open_weights(tmp_path / "w.bin")
    one_line(error)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "the path of the weights must not be empty"),
        ("missing.pt", "missing.pt: no such file or folder"),
        ("missing", "missing: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
        ("folder/missing.safetensors", "folder/missing.safetensors: no such file or folder"),
        ("https://host/x.pt", "downloading from a URL is not supported; give a file, a folder or a hub id"),
    ],
)
def test_missing_files(source: str, text: str) -> None:
    with pytest.raises(WeightsFileError, match=text) as error:
        open_weights(source)
    one_line(error)


def test_a_missing_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(WeightsFileError, match="some/model: no such file or folder"):
        open_weights(Path("some/model"))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(WeightsFileError, match="holds no weights: none of model.safetensors"):
        open_weights(tmp_path)
    torch.save(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.pt")
    with pytest.raises(WeightsFileError, match=r"holds several weights files; give one: a.pt, b.pt"):
        open_weights(tmp_path)


def test_bad_shards(tmp_path: Path) -> None:
    where = write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    last = tmp_path / "model-00003-of-00003.safetensors"

    def fails(text: str, **changes: Any) -> None:
        index.write_text(json.dumps({"weight_map": where} | changes))
        with pytest.raises(WeightsFileError, match=text) as error:
            open_weights(tmp_path)
        one_line(error)

    key = next(iter(where))
    fails(
        "the index puts 'nowhere' into model-00001", weight_map={**where, "nowhere": "model-00001-of-00003.safetensors"}
    )
    fails(f"the index puts '{key}' into model-00002", weight_map={**where, key: "model-00002-of-00003.safetensors"})
    fails("must be in a file beside the index, got '../x.safetensors'", weight_map={**where, key: "../x.safetensors"})
    fails("is not a shard index: it has no 'weight_map'", weight_map={})
    index.write_text("{")
    with pytest.raises(WeightsFileError, match="is not a readable shard index"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {k: n for k, n in where.items() if k != key}}))
    assert open_weights(tmp_path).notes == [f"1 tensors are in the shards and not in the index, such as {key!r}"]
    last.rename(tmp_path / "moved")
    fails("1 of 3 shards are missing, such as model-00003-of-00003.safetensors")
    index.unlink()
    with pytest.raises(WeightsFileError, match="shard 3 of 3 is missing"):
        open_weights(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, index=False)
    name = "model-00002-of-00003.safetensors"
    safetensors.torch.save_file(STATE, tmp_path / name)
    with pytest.raises(WeightsFileError, match=r"is both in model-00001-of-00003.safetensors and in model-00002"):
        open_weights(tmp_path)


@pytest.mark.skipif("__import__('os').geteuid() == 0", reason="root reads everything")
def test_unreadable_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0)
    with pytest.raises(WeightsFileError, match="w.pt cannot be read: Permission denied"):
        open_weights(tmp_path / "w.pt")
