"""packed_linear against float64, what its packed copies follow and survive, and the rules around it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_support import assert_accurate
from torch import Tensor, nn

import vggt_mv_ext
from vggt_mv_ext import (
    BackendError,
    backend,
    cannot_pack_linear_weight,
    explain,
    pack_linear_weight,
    packed_linear,
    reference,
)
from vggt_mv_ext.backends import choose
from vggt_mv_ext.ops import OPERATORS, _packed_weights

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PACKED = _packed_weights.PACKED
needs_onednn = pytest.mark.skipif(
    _packed_weights.unsupported(F32) is not None, reason=str(_packed_weights.unsupported(F32))
)


class Layer(nn.Module):
    def __init__(self, width: int = 24, out: int = 40, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None
        self.activation = "gelu"

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias, self.activation)


@pytest.fixture
def layer() -> Layer:
    return Layer()


def exact(x: Tensor, layer: nn.Module) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach().double()
    y = F.linear(x.double(), layer.weight.detach().double(), bias)
    return F.gelu(y) if layer.activation == "gelu" else y


def has_copy(layer: nn.Module, dtype: torch.dtype = F32) -> bool:
    return PACKED.find(layer.weight, dtype) is not None


X = torch.randn(70, 24, generator=torch.Generator().manual_seed(1))


# ---- results

SIZES = {
    "1 row, 1 feature": ((1,), 1, 65),
    "3 x 5 rows": ((3, 5), 33, 17),
    "64 rows": ((64,), 16, 16),
    "65 rows": ((65,), 17, 65),
    "no batch": ((), 24, 40),
    "a frame, qkv": ((1, 1, 1, 1374), 256, 768),
    "a frame, 4096 to 1024": ((1374,), 4096, 1024),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("wide_weight", [False, True], ids=["weight as x", "weight in f32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("rows", "width", "out"), SIZES.values(), ids=SIZES.keys())
@pytest.mark.usefixtures("poisoned")
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch,
    rows: tuple[int, ...],
    width: int,
    out: int,
    activation: str,
    bias: bool,
    wide_weight: bool,
    dtype: torch.dtype,
) -> None:
    if width == 4096 and (dtype in (F16, F64) or not bias):
        pytest.skip("plain PyTorch, and slow")
    monkeypatch.setattr(_packed_weights, "MIN_ROWS", 0)
    parameters = F32 if wide_weight and dtype != F64 else dtype
    x = torch.randn(*rows, width).to(dtype)
    weight = nn.Parameter((torch.randn(out, width) / width**0.5).to(parameters))
    vector = nn.Parameter(torch.randn(out).to(parameters)) if bias else None
    with torch.no_grad():
        got = packed_linear(x, weight, vector, activation)
        wide = reference.packed_linear(
            x.double(), weight.double(), None if vector is None else vector.double(), activation
        )
        eager = reference.packed_linear(x, weight, vector, activation)
        if PACKED.find(weight, dtype) is None:
            assert _packed_weights.unsupported(dtype) is not None
    assert got.dtype == dtype and got.shape == (*rows, out) and got.is_contiguous()
    # float32 sums over 4096 products in another order than MKL's: 1e-6 against 2e-7, both far below the bound of 1e-5.
    assert_accurate("y", got, wide, dtype, None if dtype == F32 else eager)


@needs_onednn
def test_float32_products_are_float32(layer: Layer) -> None:
    """bfloat16 or TF32 products, which oneDNN can be told to use, would be 1e-3 off."""
    with torch.no_grad():
        got = layer(X)
    assert has_copy(layer)
    assert ((got.double() - exact(X, layer)).norm() / exact(X, layer).norm()).item() < 1e-6


@pytest.mark.parametrize("view", ["transposed", "every other feature", "expanded", "offset"])
@needs_onednn
def test_strided_input(layer: Layer, view: str) -> None:
    x = {
        "transposed": torch.randn(24, 3, 30).permute(2, 1, 0),
        "every other feature": torch.randn(70, 48)[:, ::2],
        "expanded": torch.randn(1, 24).expand(70, 24),
        "offset": torch.randn(70 * 25 + 1)[1:].view(70, 25)[:, 1:],
    }[view]
    before = x.clone()
    with torch.no_grad():
        got = layer(x)
    assert has_copy(layer) and got.is_contiguous() and torch.equal(x, before)
    assert_accurate("y", got, exact(x, layer), F32)


def test_no_rows(layer: Layer) -> None:
    with torch.no_grad():
        assert layer(torch.zeros(2, 0, 24)).shape == (2, 0, 40)


@needs_onednn
def test_nan_stays_in_its_row(layer: Layer) -> None:
    x = X.clone()
    x[3, 5] = float("nan")
    with torch.no_grad():
        got = layer(x)
    assert got[3].isnan().all() and not got[torch.arange(70) != 3].isnan().any()


# ---- packed copies: when they are made, what they follow


@needs_onednn
def test_few_rows_make_no_copy_but_use_one(layer: Layer) -> None:
    with torch.no_grad():
        few = layer(X[:63])
        assert not has_copy(layer)
        layer(X[:64])
        assert has_copy(layer)
        assert choose(OPERATORS["packed_linear"], X[:2], layer.weight) == "cpu"
        assert_accurate("y", layer(X[:63]), few.double(), F32)


@needs_onednn
def test_no_copy_while_gradients_are_recorded(layer: Layer) -> None:
    layer(X).sum().backward()
    assert not has_copy(layer) and layer.weight.grad is not None
    with torch.no_grad():
        layer(X)
    assert has_copy(layer)
    x = X.clone().requires_grad_()
    layer.requires_grad_(False)
    assert layer(x).grad_fn is not None


def _in_place(layer: Layer) -> None:
    with torch.no_grad():
        layer.weight[39, 23] += 1000.0  # one value, which no sample holds


def _optimizer(layer: Layer) -> None:
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.weight.grad[17, 3] = 1.0
    torch.optim.SGD([layer.weight], lr=5.0).step()


def _new_data(layer: Layer) -> None:
    layer.weight.data = layer.weight.data * 2


def _new_data_at_the_old_place(layer: Layer) -> None:
    for factor in (2.0, 3.0):  # the second tensor may get the memory of what was packed
        layer.weight.data = layer.weight.data * factor


def _data_in_place(layer: Layer) -> None:
    layer.weight.data.mul_(2)


def _numpy(layer: Layer) -> None:
    layer.weight.detach().numpy()[:] *= 2


def _load(layer: Layer) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def _assign(layer: Layer) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def _there_and_back(layer: Layer) -> None:
    layer.to(BF16).to(F32)


def _transpose(layer: Layer) -> None:
    layer.weight.data = layer.weight.data.reshape(24, 40).t()


CHANGES = [
    _in_place,
    _optimizer,
    _new_data,
    _new_data_at_the_old_place,
    _data_in_place,
    _numpy,
    _load,
    _assign,
    _there_and_back,
    _transpose,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@needs_onednn
def test_a_changed_weight_is_packed_again(layer: Layer, change: Callable[[Layer], None], dtype: torch.dtype) -> None:
    x = X.to(dtype)
    with torch.no_grad():
        before = layer(x)
        first = PACKED.find(layer.weight, dtype)
        change(layer)
        assert PACKED.find(layer.weight, dtype) is None
        after = layer(x)
    assert_accurate("y", after, exact(x, layer), dtype)
    # Weights that were rounded to bfloat16 are the same ones in bfloat16.
    in_bf16 = _packed_weights.product_dtype(dtype) == BF16
    assert torch.equal(before, after) == (change is _there_and_back and in_bf16)
    second = PACKED.find(layer.weight, dtype)
    assert first is not None and second is not None and first is not second


@needs_onednn
def test_an_unchanged_weight_keeps_its_copy(layer: Layer) -> None:
    with torch.no_grad():
        layer(X)
        first = PACKED.find(layer.weight, F32)
        layer.state_dict()
        layer.to(F32)
        layer(X)
        with torch.inference_mode():
            layer(X)
    assert PACKED.find(layer.weight, F32) is first


@needs_onednn
def test_a_copy_dies_with_its_parameter(layer: Layer) -> None:
    with torch.no_grad():
        layer(X)
    packed = weakref.ref(PACKED._entries[layer.weight])
    del layer.weight
    gc.collect()
    assert packed() is None


@needs_onednn
def test_made_in_inference_mode_used_outside(layer: Layer) -> None:
    with torch.inference_mode():
        layer(X)
    assert has_copy(layer)
    with torch.no_grad():
        assert_accurate("y", layer(X), exact(X, layer), F32)
    layer(X).sum().backward()


@needs_onednn
def test_a_weight_of_inference_mode_is_not_packed() -> None:
    with torch.inference_mode():
        layer = Layer()
        got = layer(X)
        assert_accurate("y", got, exact(X, layer), F32)
    assert "made in inference mode" in str(cannot_pack_linear_weight(layer.weight))


@needs_onednn
def test_threads_share_a_copy(layer: Layer) -> None:
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.append(layer(X))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)


@needs_onednn
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_packing_ahead(layer: Layer, dtype: torch.dtype) -> None:
    size = pack_linear_weight(layer.weight, dtype)
    assert has_copy(layer, dtype)
    assert size >= layer.weight.numel() * dtype.itemsize
    assert pack_linear_weight(layer.weight, dtype) == size
    assert pack_linear_weight(layer.weight, F64) == 0
    assert pack_linear_weight(layer.weight.data) == 0


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize("mode", ["packed", "recorded", "autocast"])
def test_the_weight_of_a_convolution(dtype: torch.dtype, mode: str) -> None:
    """Against the convolution itself: patches that do not overlap, channels last."""
    weight = nn.Parameter((torch.randn(24, 5, 2, 3) / 30**0.5).to(dtype))
    bias, image = torch.randn(24).to(dtype), torch.randn(2, 5, 20, 30).to(dtype)
    patches = image.unflatten(2, (10, 2)).unflatten(4, (10, 3)).permute(0, 2, 4, 3, 5, 1).flatten(3)
    expected = F.conv2d(image.double(), weight.detach().double(), bias.double(), stride=(2, 3)).permute(0, 2, 3, 1)
    with torch.set_grad_enabled(mode == "recorded"), torch.autocast("cpu", BF16, enabled=mode == "autocast"):
        got = packed_linear(patches, weight, bias)
    assert_accurate("y", got, expected, got.dtype)
    if mode == "packed":
        packs = cannot_pack_linear_weight(weight) is None
        assert (PACKED.find(weight, dtype) is not None) == packs
        assert (pack_linear_weight(weight) > 0) == packs


@needs_onednn
def test_without_a_sample_the_values_are_not_looked_at(layer: Layer) -> None:
    pack_linear_weight(layer.weight, sample=False)
    layer.weight.data.mul_(2)
    assert has_copy(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not has_copy(layer)


# ---- what has to go on working after packing


def _copied(layer: Layer) -> nn.Module:
    return copy.deepcopy(layer)


def _pickled(layer: Layer) -> nn.Module:
    again = pickle.loads(pickle.dumps(layer))
    assert isinstance(again, Layer)
    return again


def _by_state_dict(layer: Layer) -> nn.Module:
    again = Layer()
    again.load_state_dict(layer.state_dict(), strict=True)
    return again


def _to_double(layer: Layer) -> nn.Module:
    return copy.deepcopy(layer).to(F64)


@pytest.mark.parametrize("again", [_copied, _pickled, _by_state_dict, _to_double], ids=lambda f: f.__name__.strip("_"))
@needs_onednn
def test_packing_leaves_the_module_as_it_was(layer: Layer, again: Callable[[Layer], nn.Module]) -> None:
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        before = layer(X)
    assert has_copy(layer)
    other = again(layer)
    assert set(other.state_dict()) == set(state) == set(layer.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value.to(F32), state[name])
    assert not has_copy(other)
    with torch.no_grad():
        layer.weight.zero_()
        x = X.to(other.weight.dtype)
        assert_accurate("y", other(x).to(F32), before.double(), F32)


@needs_onednn
@pytest.mark.parametrize("when", ["before packing", "after packing"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "autocast bf16"])
def test_compiled(layer: Layer, when: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
        if when == "after packing":
            layer(X)
        got = compiled(X)
        assert has_copy(layer, dtype)
        assert_accurate("y", got, exact(X, layer), dtype)
        layer.weight.mul_(2)
        assert_accurate("y", compiled(X), exact(X, layer), dtype)
    got = compiled(X)  # with gradients: compiled again, and plain
    got.sum().backward()
    assert layer.weight.grad is not None


@needs_onednn
def test_exported(layer: Layer) -> None:
    with torch.no_grad():
        layer(X)
        program = torch.export.export(layer, (X,))
        assert_accurate("y", program.module()(X), exact(X, layer), F32)


def test_transforms(layer: Layer) -> None:
    with torch.no_grad():
        layer(X)
        mapped = torch.func.vmap(layer)(X.view(7, 10, 24))
        assert_accurate("y", mapped.reshape(70, 40), exact(X, layer), F32)
        _, tangent = torch.func.jvp(layer, (X,), (torch.ones_like(X),))
    assert tangent.abs().sum() > 0


# ---- autograd, autocast, torch.library


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients(activation: str, bias: bool) -> None:
    tensors = [torch.randn(size, dtype=F64, requires_grad=True) for size in ((3, 4), (5, 4), (5,))]
    if not bias:
        tensors.pop()
    assert torch.autograd.gradcheck(lambda *t: reference.packed_linear(*t, activation=activation), tensors)
    assert torch.autograd.gradcheck(lambda *t: packed_linear(*t, activation=activation), tensors)

    def registered(x: Tensor, weight: Tensor, vector: Tensor | None = None) -> Any:
        return torch.ops.vggt_mv.packed_linear(x, weight, vector, activation)

    assert torch.autograd.gradcheck(registered, tensors)
    assert torch.autograd.gradgradcheck(registered, tensors)


@needs_onednn
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_opcheck(layer: Layer, rows: int, gradients: bool) -> None:
    layer.requires_grad_(gradients)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for x, bias in ((X[:rows], layer.bias), (X[:rows].view(1, rows, 24), None), (X[:rows].to(BF16), layer.bias)):
        for activation in ("none", "gelu"):
            torch.library.opcheck(
                torch.ops.vggt_mv.packed_linear.default, (x, layer.weight, bias, activation), test_utils=tests
            )


@needs_onednn
@pytest.mark.parametrize("parameters", [F32, BF16, F64], ids=["f32", "bf16", "f64"])
def test_autocast(layer: Layer, parameters: torch.dtype) -> None:
    layer.to(parameters)
    x = X.to(parameters)
    linear = nn.Linear(24, 40).to(parameters)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        got = layer(x)
        assert got.dtype == linear(x).dtype
        assert has_copy(layer, BF16) == (parameters != F64)
        in_bf16 = _packed_weights.product_dtype(BF16) == BF16
        assert has_copy(layer, F32) == (parameters != F64 and not in_bf16)
    assert_accurate("y", got, exact(x, layer), got.dtype)


@needs_onednn
def test_under_autocast_weights_are_not_cast_again(layer: Layer) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        x = X.to(BF16)
        layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            layer(x)
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert [40, 24] not in copies


# ---- where there is no oneDNN


@pytest.fixture
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other versions and machines do: the operator is missing, or raises."""

    def missing(weight: Tensor) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(_packed_weights, "pack", missing)
    _packed_weights._probe.cache_clear()
    yield  # type: ignore[misc]
    _packed_weights._probe.cache_clear()


@pytest.mark.usefixtures("without_onednn")
def test_plain_without_onednn(layer: Layer) -> None:
    with torch.no_grad():
        assert torch.equal(layer(X), F.gelu(F.linear(X, layer.weight, layer.bias)))
        explanation = explain("packed_linear", X, layer.weight)
    assert explanation.backend == "reference"
    assert "packed linear layers do not work in torch" in explanation.passed_over["cpu"]
    assert "no attribute '_reorder_linear_weight'" in explanation.passed_over["cpu"]
    assert pack_linear_weight(layer.weight) == 0


@pytest.mark.usefixtures("without_onednn")
def test_info_says_so() -> None:
    from vggt_mv.scene.reconstruct import describe_backend

    choice = describe_backend(torch.device("cpu"), F32)["operators"]["packed_linear"]
    assert choice["backend"] == "reference" and "do not work in torch" in choice["passed_over"]["cpu"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y.to(F64), "give something else than float32"),
        (lambda y: y * 1.001, "are off by 1e-03 in float32 here"),
        (lambda y: y * float("nan"), "are off by nan in float32 here"),
    ],
    ids=["dtype", "inexact", "nan"],
)
@needs_onednn
def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    run = _packed_weights.run
    monkeypatch.setattr(_packed_weights, "run", lambda *arguments: wrong(run(*arguments)))
    _packed_weights._probe.cache_clear()
    try:
        assert message in str(_packed_weights.unsupported(F32))
    finally:
        _packed_weights._probe.cache_clear()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("low", [BF16, F16], ids=["bf16", "f16"])
@needs_onednn
def test_without_instructions_for_16_bits_products_are_float32(
    monkeypatch: pytest.MonkeyPatch, layer: Layer, low: torch.dtype, activation: str
) -> None:
    """As on processors without AVX-512; on those this is what happens anyway."""
    able = _packed_weights._cannot_multiply
    monkeypatch.setattr(_packed_weights, "_cannot_multiply", lambda dtype: "no" if dtype == low else able(dtype))
    monkeypatch.setattr(_packed_weights, "_WIDENED_ROWS", 32)
    layer.activation = activation
    x = torch.randn(5, 20, 24).to(low).transpose(0, 1)  # 100 rows: 3 full parts and one of 4
    with torch.no_grad():
        assert choose(OPERATORS["packed_linear"], x, layer.weight) == "cpu"
        got = layer(x)
        same = layer(x[7])
        layer(X)
    assert got.dtype == low and got.shape == (20, 5, 40) and got.is_contiguous()
    wide = exact(x, layer)
    # Nothing is rounded to 16 bits but the result.
    assert ((got.double() - wide).norm() / wide.norm()).item() < torch.finfo(low).eps / 2
    assert torch.equal(same, got[7])
    assert PACKED.find(layer.weight, low) is PACKED.find(layer.weight, F32)


@needs_onednn
def test_switched_off(layer: Layer) -> None:
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        layer(X)
        assert not has_copy(layer)
        assert "oneDNN is switched off" in explain("packed_linear", X, layer.weight).passed_over["cpu"]


@needs_onednn
def test_choice(layer: Layer) -> None:
    operator = OPERATORS["packed_linear"]
    layer.requires_grad_(False)
    assert choose(operator, X, layer.weight) == "cpu"
    with backend("reference"):
        assert choose(operator, X, layer.weight) == "reference"
        assert torch.equal(layer(X), F.gelu(F.linear(X, layer.weight, layer.bias)))
    assert not has_copy(layer)
    # The other backends are about this package's kernels: what oneDNN cannot run stays PyTorch's.
    for name in ("cpu", "cuda"):
        with backend(name):
            assert choose(operator, X.double(), layer.weight.double()) == "reference"
            assert explain(operator.name, X.double(), layer.weight.double()).backend == "reference"
    with backend("cpu"), pytest.raises(BackendError):
        choose(OPERATORS["residual_scale_norm"], torch.zeros(2, 3, dtype=F64))


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (X.double(), nn.Parameter(torch.zeros(2, 24, dtype=F64), False), "float64 runs on the reference alone"),
        (X, torch.zeros(2, 24), "is not a torch.nn.Parameter"),
        (X[:5], nn.Parameter(torch.zeros(2, 24), requires_grad=False), "5 rows are not worth packing a weight for"),
        (X, nn.Parameter(torch.zeros(2, 24)), "gradients are recorded"),
        (X[:0], nn.Parameter(torch.zeros(2, 24)), "an empty tensor needs no kernel"),
        (X, nn.Parameter(torch.zeros(0, 24), requires_grad=False), "an empty tensor needs no kernel"),
    ],
)
@needs_onednn
def test_reasons(x: Tensor, weight: Tensor, reason: str) -> None:
    assert reason in explain("packed_linear", x, weight).passed_over["cpu"]


# ---- errors

W, B = torch.zeros(3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], W), TypeError, "x must be a torch.Tensor, got list"),
        ((torch.zeros(2, 4, dtype=torch.int64), W), TypeError, r"x must have one of the dtypes .* got int64 \[2, 4]"),
        ((torch.zeros(2, 4), None), TypeError, "weight must be a torch.Tensor, got NoneType"),
        ((torch.zeros(2, 4), B), ValueError, r"weight must have shape \[N, K] or \[N, C, a, b], got \[3]"),
        ((torch.zeros(2, 5), W), ValueError, r"x must have shape \[..., K] with the K = 4 of weight, got \[2, 5]"),
        ((torch.zeros(()), W), ValueError, r"x must have shape .* got \[]"),
        ((torch.zeros(2, 4), W, torch.zeros(4)), ValueError, r"bias must have shape \[N] = \[3], got \[4]"),
        ((torch.zeros(2, 4), W, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
        ((torch.zeros(2, 4), W, B, "relu"), ValueError, "activation must be one of none, gelu; got 'relu'"),
        ((torch.zeros(2, 4), W.to(BF16)), TypeError, r"got x float32 \[2, 4] and weight bfloat16 \[3, 4]"),
        ((torch.zeros(2, 4, dtype=F16), W.to(BF16)), TypeError, "weight must have the dtype of x, or be float32"),
        ((torch.zeros(2, 4), W, B.double()), TypeError, r"bias must have the dtype of weight; got bias float64 \[3]"),
        ((torch.zeros(2, 4, device="meta"), W), ValueError, "weight must be on the device of x, meta; it is on cpu"),
        ((torch.zeros(2, 4), W, B.to("meta")), ValueError, "bias must be on the device of x, cpu; it is on meta"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^packed_linear: .*{message}"):
        packed_linear(*arguments)
    if len(arguments) > 1 and isinstance(arguments[0], Tensor) and isinstance(arguments[1], Tensor):
        x, weight, bias, activation = (*arguments, *(None, "none")[len(arguments) - 2 :])
        if isinstance(bias, Tensor | None) and x.device == weight.device and (bias is None or not bias.is_meta):
            with torch.no_grad(), pytest.raises(error, match=message):
                torch.ops.vggt_mv.packed_linear(x, weight, bias, activation)


def test_errors_of_packing() -> None:
    with pytest.raises(TypeError, match="pack_linear_weight: weight must be a torch.Tensor, got str"):
        pack_linear_weight("w")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"pack_linear_weight: weight must have shape \[N, K\] or \[N, C, a, b\], got \[3\]"
    ):
        pack_linear_weight(B)


def test_meta_device() -> None:
    got = packed_linear(torch.zeros(2, 4, device="meta"), W.to("meta"), None, "gelu")
    assert got.is_meta and got.shape == (2, 3)
    assert vggt_mv_ext.cannot_pack_linear_weight(nn.Parameter(W.to("meta"))) == "the weight is on meta"
