"""Inspect, plan and convert: from Python and from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_support import MANIFESTS, manifest, small, tensors, with_aliases

from vggt_mv.cli.main import main
from vggt_mv.weights import (
    AliasConflictError,
    TensorValueError,
    WeightsError,
    convert_weights,
    inspect_weights,
    open_weights,
)
from vggt_mv.weights.files import WeightsFile
from vggt_mv.weights.preview import preview_load
from vggt_mv.weights.rules import FAMILY_KEY
from vggt_mv.weights.safetensors_io import write_safetensors

SMALL = small("page4d_1b", blocks=1)
TOKEN = "aggregator.camera_token"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"model": {f"module.{key}": value for key, value in tensors(SMALL).items()}}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.fixture(scope="module")
def real_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the names and shapes of real checkpoints and almost no bytes: every tensor is one expanded number."""
    folder = tmp_path_factory.mktemp("real")
    for name in MANIFESTS:
        torch.save({key: torch.zeros(()).expand(shape) for key, shape in manifest(name).items()}, folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in MANIFESTS}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["weights", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# ---- inspect


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vggt_1b", "vggt"),
        ("page4d_1b", "page4d"),
        ("vggt_mv_aggregator_dual_memory", "vggt_mv (aggregator alone)"),
        ("pi3", "pi3"),
    ],
)
def test_inspect_the_manifests(name: str, family: str) -> None:
    shapes = manifest(name)
    summary = inspect_weights(WeightsFile.of_mapping(shapes))
    assert (summary.family, summary.tensors, summary.known) == (family, len(shapes), len(shapes))
    assert sum(part.tensors for part in summary.modules) == len(shapes)
    assert summary.aliases == (864 if "dual" in name else 0)
    blocks = {part.module: part.blocks for part in summary.modules}
    assert blocks["decoder" if name == "pi3" else "aggregator.frame_blocks"] == (36 if name == "pi3" else 24)


def test_inspect_on_the_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", file)
    assert code == 0
    assert "page4d (" in out
    assert " unwrapped  model" in out
    assert "  prefixes  module." in out
    assert "aggregator.spatial_mask_head         8" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run(capsys, "inspect", file, "--json")
    assert (code, json.loads(out)["family"], json.loads(out)["prefixes"]) == (0, "page4d", ["module."])


def test_inspect_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tensors(SMALL)
    state[TOKEN].view(-1)[0] = torch.nan
    write_safetensors(tmp_path / "w.safetensors", state, {"author": "someone"})
    assert inspect_weights(tmp_path / "w.safetensors").non_finite == {}
    code, out, _ = run(capsys, "inspect", tmp_path / "w.safetensors", "--values")
    assert code == 0
    assert f"warning: {TOKEN} holds 1 NaN" in out
    assert "  metadata  author: someone" in out


def test_inspect_a_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "w.pt")
    code, out, _ = run(capsys, "inspect", tmp_path / "w.pt")
    assert code == 0
    assert "family  unknown (0 of 1 names known)" in out
    assert "nearest  vggt (0 of 1 names)" in out


# ---- plan


def test_plan_vggt_1b(real_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", real_files["vggt_1b"])
    assert (code, err) == (0, "")
    assert "model  VGGT_MV, 1805 tensors, 1797 planned" in out
    assert "aggregator.spatial_mask_head         8   VGGT has no aggregator.spatial_mask_head" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, err = run(capsys, "plan", real_files["vggt_1b"], "--strict")
    assert code == 2
    assert err.startswith("vggt-mv: error: ")
    assert "strict: 8 of the model not in the file" in err
    assert err.count("\n") == 1


def test_plan_with_pi3_and_dual_stream(real_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", real_files["page4d_1b"], "--pi3", real_files["pi3"], "--dual-stream", "--prefer", "pi3"]
    code, out, _ = run(capsys, *arguments, "--load-encoder", "--json")
    found = json.loads(out)["counts"]
    assert code == 0
    assert (found["copied"], found["remapped"], found["adapted"], found["missing"]) == (1728, 991, 1, 0)


def test_plan_only_and_config(real_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "plan", real_files["page4d_1b"], "--config", "vggt_1b", "--only", "camera_head",
        "--only", "aggregator.frame_blocks.8-15", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["counts"]["loaded"] == 69 + 8 * 18
    assert json.loads(out)["model"] == "VGGT"


def test_plan_verbose_is_what_python_says(real_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", real_files["vggt_1b"], "--dual-stream", "--verbose")
    assert code == 0
    assert "<- aggregator.frame_blocks.23.norm1.weight" in out
    report = preview_load(real_files["vggt_1b"], dual_stream=True).report()
    assert [line.rstrip() for line in out.splitlines()] == report.to_text(verbose=True).splitlines()
    assert report["copied"] == 1728


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "missing.pt"], "missing.pt: no such file or folder"),
        (["inspect", "missing.pt"], "missing.pt: no such file or folder"),
        (["plan", "FILE", "--prefer", "both"], "--prefer must be checkpoint or pi3, got 'both'"),
        (["plan", "FILE", "--config", "nonsense"], "config 'nonsense' is neither a file nor a known name"),
        (["plan", "FILE", "--only", "nothing"], "only: the model has no 'nothing'"),
        (["convert", "FILE", "out.pt"], "the output must end in .safetensors, got 'out.pt'"),
        (
            ["convert", "FILE", "out.safetensors", "--dtype", "int8"],
            "--dtype must be one of fp64, fp32, fp16, bf16, got",
        ),
        (["convert", "FILE", "no/such/out.safetensors"], "no/such is not a folder"),
    ],
)
def test_bad_input_is_one_line(
    file: Path,
    arguments: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *(str(file) if argument == "FILE" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"vggt-mv: error: {text}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


# ---- convert


def test_convert(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    code, _, err = run(capsys, "convert", file, out)
    assert code == 0
    assert f"{out}: page4d, {len(SMALL)} tensors" in err.replace("\n", "")
    found = open_weights(out)
    state = tensors(SMALL)
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in state.items())
    assert found.metadata[FAMILY_KEY] == "page4d"
    code, _, err = run(capsys, "convert", file, out)
    assert (code, err) == (2, f"vggt-mv: error: {out} exists; pass overwrite=True (--overwrite) to replace it\n")
    assert run(capsys, "convert", file, out, "--overwrite", "--quiet", "--dtype", "bf16")[0] == 0
    found = open_weights(out)
    assert all(torch.equal(found.tensors[key], value.bfloat16()) for key, value in state.items())


def test_convert_in_place(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = tensors(SMALL)
    write_safetensors(path, state, {"author": "someone"})
    summary = convert_weights(path, path, overwrite=True, dtype=torch.float16)
    assert summary.metadata["author"] == "someone"
    assert torch.equal(open_weights(path).tensors[TOKEN], state[TOKEN].half())


def test_convert_drops_aliases_that_agree(tmp_path: Path) -> None:
    state = with_aliases(tensors(SMALL), both=True)
    torch.save(state, tmp_path / "w.pt")
    summary = convert_weights(tmp_path / "w.pt", tmp_path / "out.safetensors")
    assert (summary.tensors, summary.family, summary.recorded_family) == (len(SMALL), "vggt_mv", True)
    key = "aggregator.time_blocks.0.norm1.weight"
    state[key] = state[key] + 1
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        AliasConflictError, match=f"'aggregator.frame_blocks.0.norm1.weight' and '{key}' are one tensor"
    ):
        convert_weights(tmp_path / "w.pt", tmp_path / "out2.safetensors")
    assert not (tmp_path / "out2.safetensors").exists()


def test_convert_keeps_the_names_of_the_aggregator_and_of_pi3(tmp_path: Path) -> None:
    for name in ("vggt_mv_aggregator_dual_memory", "pi3"):
        shapes = {k: s for k, s in small(name, blocks=1).items() if not k.startswith(("view_blocks", "time_blocks"))}
        torch.save({f"_orig_mod.{key}": value for key, value in tensors(shapes).items()}, tmp_path / "w.pt")
        convert_weights(tmp_path / "w.pt", tmp_path / "out.safetensors", overwrite=True)
        assert set(open_weights(tmp_path / "out.safetensors").tensors) == set(shapes)


def test_convert_refuses_what_does_not_fit(tmp_path: Path) -> None:
    state = tensors(SMALL)
    state[TOKEN].view(-1)[:2] = torch.tensor([1e5, torch.nan])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(TensorValueError, match=rf"'{TOKEN}' must fit into float16 \(at most 6.55e\+04\), got 1e\+05"):
        convert_weights(tmp_path / "w.pt", tmp_path / "out.safetensors", dtype=torch.float16)
    assert convert_weights(tmp_path / "w.pt", tmp_path / "out.safetensors", dtype=torch.bfloat16).tensors == len(SMALL)
    with pytest.raises(WeightsError, match="dtype must be one of float64, float32, float16, bfloat16, got int8"):
        convert_weights(tmp_path / "w.pt", tmp_path / "x.safetensors", dtype=torch.int8)


def test_convert_needs_permission_to_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": tensors(SMALL), "path": Path("x")}, tmp_path / "w.pt")
    out = tmp_path / "out.safetensors"
    code, _, err = run(capsys, "convert", tmp_path / "w.pt", out)
    assert code == 2
    assert "needs code to be read (pathlib" in err
    assert run(capsys, "convert", tmp_path / "w.pt", out, "--unsafe-pickle")[0] == 0
    assert inspect_weights(out).tensors == len(SMALL)


def test_convert_onto_a_full_disk(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vggt_mv.weights import convert

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_safetensors", full)
    with pytest.raises(WeightsError, match="cannot be written: No space left on device"):
        convert_weights(file, tmp_path / "out.safetensors")


# ---- the documentation


def test_the_tables_of_the_documentation(
    real_files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ``$ vggt-mv weights plan`` of docs/weights.md prints what stands below it."""
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    monkeypatch.chdir(real_files["pi3"].parent)
    for name, link in (("vggt_1b", "VGGT-1B.pt"), ("page4d_1b", "page4d.pt")):
        Path(link).symlink_to(real_files[name].name)
    blocks = re.findall(r"```console\n\$ vggt-mv weights (plan .*)\n((?:.*\n)*?)```", text)
    assert len(blocks) == 4
    for command, table in blocks:
        code, out, _ = run(capsys, *command.split())
        assert code == 0
        assert [line.rstrip() for line in out.splitlines()] == table.splitlines(), command
