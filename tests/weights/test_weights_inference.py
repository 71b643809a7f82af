"""`optimize_for_inference`: packed weights in the place of plain ones, and what must not change by it."""

from __future__ import annotations

import copy
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vggt_mv.layers import Linear, Mlp
from vggt_mv.layers.conv import StridedConv3x3
from vggt_mv.models.vggt import VGGT
from vggt_mv.weights import InferenceReport, WeightsError, build_from_weights, optimize_for_inference, pages
from vggt_mv.weights.safetensors_io import write_safetensors
from vggt_mv_ext import cannot_pack_linear_weight
from vggt_mv_ext.ops._packed_weights import PACKED, product_dtype

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="weights are released on Linux")
needs_onednn = pytest.mark.skipif(
    cannot_pack_linear_weight(nn.Parameter(torch.zeros(1, 1))) is not None, reason="this PyTorch packs no weights here"
)
F32, BF16 = torch.float32, torch.bfloat16


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Mlp(128, 256), nn.LayerNorm(128), nn.Linear(128, 128), Linear(128, 96, bias=False))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_view_of_a_clean_file(tensor: Tensor) -> bool:
    return any(
        begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
        for begin, end in pages.clean_file_views()
    )


@pytest.fixture
def mapped(tmp_path: Path) -> nn.Module:
    """The model on the mapped file of a checkpoint, as `from_pretrained` makes it."""
    write_safetensors(tmp_path / "w.safetensors", dict(model().state_dict()))
    return build_from_weights(model, tmp_path / "w.safetensors")[0]


X = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(1))


@needs_onednn
def test_heads_are_packed_for_float32() -> None:
    """They run without autocast: a bfloat16 copy would be of no use to them, and plain weights slow."""
    whole = VGGT(
        img_size=28,
        embed_dim=64,
        depth=1,
        num_heads=4,
        patch_embed="conv",
        enable_point=False,
        enable_depth=False,
        enable_track=False,
    )
    optimize_for_inference(whole, BF16, release=False)
    for part, packed, other in ((whole.camera_head, F32, BF16), (whole.aggregator, BF16, F32)):
        weights = [module.weight for module in part.modules() if isinstance(module, Linear)]
        assert weights and all(PACKED.find(weight, packed) is not None for weight in weights)
        if product_dtype(BF16) == BF16:
            assert all(PACKED.find(weight, other) is None for weight in weights)


@linux
@needs_onednn
@pytest.mark.parametrize("kind", ["in memory", "mapped"])
@pytest.mark.parametrize("dtype", [None, F32, BF16], ids=["own", "f32", "bf16"])
def test_nothing_changes(request: pytest.FixtureRequest, kind: str, dtype: torch.dtype | None) -> None:
    module: nn.Module = request.getfixturevalue("mapped") if kind == "mapped" else model()
    before, names = values(module), [id(parameter) for parameter in module.parameters()]
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
        expected = module(X)
    report = optimize_for_inference(module, dtype)
    plain_bytes = 4 * (2 * 128 * 256 + 128 * 96)
    assert (report.packed, report.released_bytes, report.left) == (3, plain_bytes, {})
    assert report.packed_bytes >= plain_bytes // (2 if dtype == BF16 else 1)
    for weight in (module[0].fc1.weight, module[0].fc2.weight, module[3].weight):
        assert is_view_of_a_clean_file(weight)
        assert PACKED.find(weight, dtype or F32) is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
        assert torch.equal(module(X), expected)
    assert equal(values(module), before)
    assert [id(parameter) for parameter in module.parameters()] == names
    assert equal(values(copy.deepcopy(module)), before)
    assert equal(values(pickle.loads(pickle.dumps(module))), before)
    assert equal(values(copy.deepcopy(module).to(torch.float64).to(F32)), before)


@linux
@needs_onednn
@pytest.mark.parametrize("kind", ["in memory", "mapped"])
def test_training_goes_on(request: pytest.FixtureRequest, kind: str) -> None:
    """And what was learnt is not dropped when the model is optimized again: the pages are no longer the file's."""
    module: nn.Module = request.getfixturevalue("mapped") if kind == "mapped" else model()
    twin = copy.deepcopy(module)
    optimize_for_inference(module)
    for each in (module, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(X).square().sum().backward()
        optimizer.step()
    assert equal(values(module), values(twin))
    for _ in range(2):
        optimize_for_inference(module)
        assert equal(values(module), values(twin))
    with torch.no_grad():
        assert torch.equal(module(X), twin(X))


@linux
@needs_onednn
def test_a_view_that_was_written_to_is_not_clean(mapped: nn.Module) -> None:
    weight = mapped[3].weight
    assert is_view_of_a_clean_file(weight)
    with torch.no_grad():
        weight[0, 0] = 7.0
    assert not is_view_of_a_clean_file(weight)
    optimize_for_inference(mapped)
    assert weight[0, 0] == 7.0 and is_view_of_a_clean_file(weight)


@needs_onednn
def test_without_release_the_memory_stays() -> None:
    module = model()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    report = optimize_for_inference(module, release=False)
    assert (report.packed, report.released_bytes) == (3, 0)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    module = model().to(torch.float64)
    before = [(parameter.data_ptr(), parameter.clone()) for parameter in module.parameters()]
    report = optimize_for_inference(module)
    assert report == InferenceReport(left={"float64 runs on the reference alone": 3})
    assert str(report).endswith("\n  3 stay as they are: float64 runs on the reference alone")
    for parameter, (place, value) in zip(module.parameters(), before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, value)


@linux
@needs_onednn
def test_a_weight_of_two_layers_is_one_weight() -> None:
    module = model()
    module.append(nn.Linear(96, 128)).append(Linear(128, 96))
    module[5].weight = module[3].weight
    assert optimize_for_inference(module).packed == 3
    assert module[5].weight is module[3].weight


@linux
@needs_onednn
def test_models_have_it() -> None:
    options = {"enable_point": False, "enable_depth": False, "enable_track": False}
    heads = {"camera_head_options": {"trunk_depth": 1, "num_heads": 2}}
    vggt = VGGT(28, 14, 32, depth=2, num_heads=2, patch_embed="conv", **options, **heads).eval()
    images = torch.rand(2, 3, 28, 42)
    with torch.inference_mode():
        before = vggt(images)["pose_enc"]
        state = values(vggt)
        report = vggt.optimize_for_inference()
        assert report.packed == 4 * (2 * 2 + 1) + 2
        assert torch.allclose(vggt(images)["pose_enc"], before, rtol=1e-5, atol=1e-6)
    assert equal(values(vggt), state)


@needs_onednn
def test_a_strided_convolution_is_packed() -> None:
    """For the images' dtype, as all of a head is."""
    layer = StridedConv3x3(16, 24)
    x = torch.randn(1, 16, 21, 18)
    assert optimize_for_inference(layer, release=False).packed == 1
    with torch.inference_mode():
        assert torch.allclose(layer(x), nn.Conv2d.forward(layer, x), rtol=1e-4, atol=1e-5)


_ALLOCATE = """
import ctypes, resource, sys
from torch import nn
from vggt_mv.weights import optimize_for_inference, pages
def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))
optimize_for_inference(nn.Identity(), keep_freed=sys.argv[1] == "keep")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [None] * 8
def several():
    for i in range(8):
        pieces[i] = libc.malloc(24 << 20)
        ctypes.memset(pieces[i], 1, 24 << 20)
    for piece in reversed(pieces):  # the last one first, so that nothing in use lies above what is free
        libc.free(piece)

several()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
several()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
before = resident()
pages.trim_kept()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc keeps memory")
def test_freed_memory_is_kept() -> None:
    faults, given_back = {}, {}
    for choice in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", _ALLOCATE, choice], capture_output=True, text=True, check=True)
        faults[choice], given_back[choice] = map(int, done.stdout.split())
    assert faults["keep"] < 50 <= faults["leave"]  # pages of 4 KiB or 2 MiB
    assert given_back["keep"] > 150 << 20  # of 192 MiB
    assert given_back["leave"] < 10 << 20


def test_errors() -> None:
    with pytest.raises(WeightsError, match=r"dtype must be one of float32, bfloat16, float16; got torch.int8"):
        optimize_for_inference(model(), torch.int8)


@linux
@needs_onednn
def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    module = model()
    before = values(module)
    with pytest.raises(WeightsError, match=r"131072 bytes of weights must go to a file in '.*nowhere'.*release=False"):
        optimize_for_inference(module, folder=tmp_path / "nowhere")
    assert equal(values(module), before)


@linux
@needs_onednn
def test_temporary_files_leave_nothing(tmp_path: Path) -> None:
    optimize_for_inference(model(), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- memory, in a process of its own

_MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from vggt_mv.layers import Linear
from vggt_mv.weights import build_from_weights, optimize_for_inference
torch.set_num_threads(1)

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def build():
    return nn.Sequential(*(Linear(2048, 2048, bias=False) for _ in range({layers})))

path, how, dtype, release = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]), sys.argv[4] == "release"
x = torch.ones(64, 2048)

def predict(model):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(x)

predict(Linear(2048, 2048))  # what the libraries themselves take
before = memory("VmRSS")
model = build() if how == "memory" else build_from_weights(build, path)[0]
if release:
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    optimize_for_inference(model, dtype)
predict(model)
print(memory("VmRSS") - before, memory("VmHWM") - before)
"""


@linux
@needs_onednn
@pytest.mark.parametrize(
    ("how", "dtype", "release", "low", "high", "peak"),
    [
        ("memory", "float32", "keep", 1.9, 2.2, 2.3),
        ("memory", "float32", "release", 0.9, 1.15, 1.3),
        ("mapped", "float32", "release", 0.9, 1.15, 1.3),
        ("memory", "bfloat16", "release", 0.4, 0.65, 1.3),
        ("mapped", "bfloat16", "release", 0.4, 0.65, 1.2),
    ],
)
def test_memory(tmp_path: Path, how: str, dtype: str, release: str, low: float, high: float, peak: float) -> None:
    """Resident memory after a prediction, and at its peak, over that before the model, as multiples of the weights.

    Without release both copies are resident. With it the packed copy is, and a weight at a time beside it: 1/12 of all,
    as float32, as bfloat16, and packed. The peak starts from the model as it was built, all of it resident.
    """
    layers = 12  # 201 MB
    size = layers * 2048 * 2048 * 4
    path = tmp_path / "w.safetensors"
    if how == "mapped":
        write_safetensors(path, {f"{i}.weight": torch.full((2048, 2048), i / 2048.0) for i in range(layers)})
    script = _MEASURE.format(layers=layers)
    command = [sys.executable, "-c", script, str(path), how, dtype, release]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if dtype == "bfloat16" and product_dtype(BF16) == F32:  # the copies are in float32
        low, high, peak = 0.9, 1.15, 1.3
    resident, highest = (int(number) / size for number in done.stdout.split())
    assert low <= resident <= high, f"resident {resident:.2f}"
    assert highest <= peak, f"peak {highest:.2f}"
