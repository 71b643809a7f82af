"""The choice of backend: order, force, environment, explanations; and the ways the compiled module can be missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vggt_mv_ext
from vggt_mv_ext import BackendError, _extension, backend, backends, explain, get_backend, set_backend
from vggt_mv_ext._extension import extension, load_extension, read_switch

ROWS = [torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), torch.ones(8), torch.ones(8)]
QKV = torch.zeros(1, 1, 1, 1, 3, 1, 4)


class Extension:
    """Stands for a compiled module where a choice, not a kernel, is tested."""

    def __init__(self, has_cuda: bool) -> None:
        self.has_cuda = has_cuda


def on_cuda() -> torch.Tensor:
    """What the choice reads of a tensor on a GPU."""

    class Tensor:
        device, dtype, shape = torch.device("cuda", 0), torch.float32, torch.Size([2, 8])

        def numel(self) -> int:
            return 16

    return Tensor()  # type: ignore[return-value]


def test_names() -> None:
    assert backends.ORDER == ("cuda", "cpu", "reference")
    with backend("reference"):
        assert get_backend() == "reference"
        with backend("cpu"):
            assert get_backend() == "cpu"
        assert get_backend() == "reference"
    assert get_backend() == "auto"


def test_context_restores_after_an_error() -> None:
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert get_backend() == "auto"


def test_set_backend() -> None:
    set_backend("reference")
    assert explain("residual_scale_norm", *ROWS).backend == "reference"


@pytest.mark.parametrize("use", [set_backend, lambda name: backend(name).__enter__()], ids=["set", "context"])
def test_unknown_name(use) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="name: must be one of auto, cuda, cpu, reference; got 'gpu'"):
        use("gpu")
    assert get_backend() == "auto"


@pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")
def test_auto_takes_the_kernel() -> None:
    explanation = explain(vggt_mv_ext.residual_scale_norm, *ROWS)
    assert explanation.backend == "cpu"
    assert explanation.passed_over == {"cuda": "the tensors are on cpu", "reference": "cpu comes first"}
    assert str(explanation).splitlines()[0] == "residual_scale_norm: runs on cpu (asked for: auto)"


@pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")
def test_auto_passes_over_what_cannot_run() -> None:
    explanation = explain("residual_scale_norm", *(t.double() for t in ROWS))
    assert explanation.backend == "reference"
    assert explanation.passed_over["cpu"] == "float64 runs on the reference alone"


def test_forced_backend_runs_or_fails() -> None:
    with backend("reference"):
        assert explain("residual_scale_norm", *ROWS).backend == "reference"
    with backend("cuda"):
        explanation = explain("residual_scale_norm", *ROWS)
        assert explanation.backend is None
        assert explanation.passed_over["reference"] == "cuda was asked for"
        assert "runs on nothing" in str(explanation)
        text = "residual_scale_norm: backend 'cuda' was asked for and cannot run this call: the tensors are on cpu"
        with pytest.raises(BackendError, match=text):
            vggt_mv_ext.residual_scale_norm(*ROWS)
    with backend("cpu"), pytest.raises(BackendError, match="no_kernel: backend 'cpu' .* has no CPU kernel"):
        backends.choose(backends.Operator("no_kernel"), QKV)


def test_the_backward_pass_chooses_when_it_runs() -> None:
    inputs = [t.clone().requires_grad_() for t in ROWS]
    _, normed = vggt_mv_ext.residual_scale_norm(*inputs)
    with backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for"):
        normed.sum().backward()


@pytest.mark.parametrize(
    ("module", "chosen", "why_not_cuda"),
    [
        (Extension(has_cuda=True), "cuda", None),
        (Extension(has_cuda=False), "reference", "this build has no CUDA kernels"),
        (None, "reference", "this build has no compiled kernels"),
    ],
    ids=["with CUDA", "without CUDA", "no kernels"],
)
def test_tensors_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, module: Extension | None, chosen: str, why_not_cuda: str | None
) -> None:
    monkeypatch.setattr(backends, "extension", module)
    operator = vggt_mv_ext.ops.OPERATORS["residual_scale_norm"]
    assert backends.choose(operator, on_cuda()) == chosen
    explanation = backends.explain_choice(operator, on_cuda())
    assert explanation.backend == chosen
    assert explanation.passed_over["cpu"] == "the tensors are on cuda:0"
    assert why_not_cuda is None or why_not_cuda in explanation.passed_over["cuda"]


def test_explain_rejects_what_it_does_not_know() -> None:
    names = ", ".join(vggt_mv_ext.ops.OPERATORS)
    assert names.startswith("alternating_attention, block_dilated_attention, ")
    with pytest.raises(ValueError, match=f"operator must be one of {names}; got 'softmax'"):
        explain("softmax", QKV)
    with pytest.raises(ValueError, match="the tensors of a call of qk_norm_rope must follow, got"):
        explain("qk_norm_rope")


def test_build_info_can_be_written_down() -> None:
    info = vggt_mv_ext.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["setting"] == "auto"
    assert info["kind"] == ("no_ext" if extension is None else "full")
    if extension is not None:
        assert info["cpu_isa"] in info["cpu_isas"]


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, value in (("", False), ("0", False), ("1", True), (" 1 ", True)):
        monkeypatch.setenv("VGGT_MV_REQUIRE_EXT", text)
        assert read_switch("VGGT_MV_REQUIRE_EXT") is value
    monkeypatch.setenv("VGGT_MV_REQUIRE_EXT", "yes")
    with pytest.raises(ValueError, match="environment variable VGGT_MV_REQUIRE_EXT: must be 0 or 1, got 'yes'"):
        read_switch("VGGT_MV_REQUIRE_EXT")


def no_module(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_module_names_the_folder_that_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension.importlib, "import_module", no_module)
    for record in (None, {"kind": "full"}):
        if record is not None:
            (tmp_path / "_build_info.json").write_text(json.dumps(record))
        with pytest.raises(ImportError, match=f"imported from {tmp_path}, which holds no compiled module _C"):
            load_extension(tmp_path)


def test_a_recorded_build_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"kind": "no_ext", "reason": "VGGT_MV_NO_EXT=1 was set when it was built"}
    (tmp_path / "_build_info.json").write_text(json.dumps(record))
    monkeypatch.delenv("VGGT_MV_REQUIRE_EXT", raising=False)
    assert load_extension(tmp_path) == (None, record)
    monkeypatch.setenv("VGGT_MV_REQUIRE_EXT", "1")
    with pytest.raises(ImportError, match=r"VGGT_MV_REQUIRE_EXT=1, but .* \(VGGT_MV_NO_EXT=1 was set"):
        load_extension(tmp_path)


def test_a_module_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: nothing")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    with pytest.raises(ImportError, match=f"compiled module of {tmp_path} does not load: undefined symbol: nothing"):
        load_extension(tmp_path)


def test_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "_build_info.json").write_text("[]")
    with pytest.raises(ImportError, match="_build_info.json: must hold a JSON object, got list"):
        load_extension(tmp_path)


def test_fresh_processes(tmp_path: Path) -> None:
    """The whole way once: a copy without `_C` is an ImportError, and a wrong VGGT_MV_BACKEND an error on import."""
    package = tmp_path / "vggt_mv_ext"
    shutil.copytree(
        Path(vggt_mv_ext.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__")
    )
    code = """
import os, sys
try:
    import vggt_mv_ext
except ImportError as error:
    print(type(error).__name__, error)
open("vggt_mv_ext/_build_info.json", "w").write('{"kind": "no_ext"}')
for name in [n for n in sys.modules if n.startswith("vggt_mv_ext")]:
    del sys.modules[name]
os.environ["VGGT_MV_BACKEND"] = "fast"
os.environ["VGGT_MV_REQUIRE_EXT"] = ""
try:
    import vggt_mv_ext
except ValueError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"ImportError vggt_mv_ext was imported from {package}")
    assert lines[1].startswith("ValueError environment variable VGGT_MV_BACKEND: must be one of auto")
    assert lines[1].endswith("got 'fast'")
