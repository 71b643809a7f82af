"""residual_scale_norm: the CPU kernel of every instruction set and the reference against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_support import ISAS, assert_accurate, compiled_isas, strided_in_nan, usable_isas, widest_tolerance
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import backend, reference, residual_scale_norm
from vggt_mv_ext._extension import extension

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "f32": (F32, F32, F32),
    "f16": (F16, F16, F16),
    "bf16": (BF16, BF16, BF16),
    "f32+f16": (F32, F16, F32),
    "f32+bf16": (F32, BF16, F32),
    "f16 with f32 parameters": (F16, F16, F32),
    "bf16 with f32 parameters": (BF16, BF16, F32),
}
SIZES = [(1, 1), (5, 1), (1, 7), (3, 64), (2, 1023), (2, 1024), (2, 1025), (2, 3, 67, 65)]
NAMES = ("x", "y", "gamma", "weight", "bias")

every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
needs_kernel = pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")


def make_inputs(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *, grad: bool = False) -> list[Tensor]:
    x_dtype, y_dtype, parameter_dtype = dtypes
    features = shape[-1:]
    shapes = (shape, shape, features, features, features)
    kinds = (x_dtype, y_dtype, parameter_dtype, parameter_dtype, parameter_dtype)
    return [torch.randn(s).to(kind).requires_grad_(grad) for s, kind in zip(shapes, kinds, strict=True)]


def eager(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    residual = (x + gamma * y).to(x.dtype)
    wide = torch.promote_types(residual.dtype, weight.dtype)
    return residual, F.layer_norm(residual.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(y.dtype)


def run_with_gradients(function, inputs: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])]


def check(inputs: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Results and gradients of the operator, of eager PyTorch, and of the reference in float64."""
    grads = (torch.randn_like(inputs[0]), torch.randn_like(inputs[1]))
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    got = run_with_gradients(residual_scale_norm, inputs, grads)
    beside = run_with_gradients(eager, inputs, grads)
    exact = run_with_gradients(reference.residual_scale_norm, exact_inputs, grads)
    limit = widest_tolerance(*dtypes)
    for name, a, b, c in zip(("residual", "normed", *NAMES), got, exact, beside, strict=True):
        assert_accurate(name, a, b, limit, c)
    for t, gradient in zip(inputs, got[2:], strict=True):
        assert gradient.dtype == t.dtype
    assert got[0].dtype == inputs[0].dtype and got[1].dtype == inputs[1].dtype
    assert got[0].is_contiguous() and got[1].is_contiguous()


@every_isa
@every_dtype
@pytest.mark.parametrize("shape", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.usefixtures("poisoned")
def test_kernel_is_accurate(isa: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, dtypes, grad=True)
    assert vggt_mv_ext.explain("residual_scale_norm", *inputs).backend == "cpu"
    check(inputs, dtypes)


@every_dtype
@pytest.mark.parametrize("shape", [(5, 1), (2, 1025), (2, 3, 67, 65)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.usefixtures("poisoned")
def test_reference_is_accurate(dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    with backend("reference"):
        check(make_inputs(shape, dtypes, grad=True), dtypes)


@pytest.mark.parametrize("name", ["f32", "f32+bf16"])
def test_a_frame_of_tokens(name: str) -> None:
    check(make_inputs((1374, 1024), DTYPES[name], grad=True), DTYPES[name])


@every_isa
@every_dtype
def test_reads_strided_rows_and_nothing_beside_them(isa: str, dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = [strided_in_nan(t) for t in make_inputs((3, 4, 67), dtypes, grad=True)]
    assert not inputs[0].is_contiguous()
    check(inputs, dtypes)


def test_other_layouts() -> None:
    plain = make_inputs((6, 8), DTYPES["f32"])
    transposed = [t.t().contiguous().t() if t.dim() == 2 else t[::2].repeat_interleave(2) for t in plain]
    transposed[2:] = [t.repeat_interleave(2)[::2] for t in plain[2:]]
    assert not any(t.is_contiguous() for t in transposed)
    for a, b in zip(residual_scale_norm(*transposed), residual_scale_norm(*plain), strict=True):
        assert torch.equal(a, b)
    one_row = [plain[0][:1].expand(6, 8), *plain[1:]]
    assert torch.equal(residual_scale_norm(*one_row)[0], residual_scale_norm(one_row[0].clone(), *plain[1:])[0])


@needs_kernel
def test_offsets_beyond_31_bits() -> None:
    stride = 2**31 + 64  # in elements; only the pages of the two rows are ever touched
    far = torch.empty(stride + 64, dtype=BF16).as_strided((2, 64), (stride, 1))
    x, y, gamma, weight, bias = make_inputs((2, 64), DTYPES["bf16"])
    for tensor in (x, y):
        far.copy_(tensor)
        arguments = [far if t is tensor else t for t in (x, y, gamma, weight, bias)]
        for a, b in zip(residual_scale_norm(*arguments), residual_scale_norm(x, y, gamma, weight, bias), strict=True):
            assert torch.equal(a, b)


@every_isa
@every_dtype
@pytest.mark.parametrize("features", [1, 17, 1024])
@pytest.mark.parametrize("over", [(), ("x",), ("y",), ("x", "y")], ids=lambda over: " and ".join(over) or "nothing")
def test_out(isa: str, dtypes: tuple[torch.dtype, ...], features: int, over: tuple[str, ...]) -> None:
    """Results go to where they are wanted, a part of a larger tensor or the arguments themselves, and nowhere else."""
    inputs = make_inputs((37, features), dtypes)
    expected = residual_scale_norm(*inputs)
    kept = [t.clone() for t in inputs]
    rooms = [torch.full((39, features), 7.0, dtype=t.dtype) for t in inputs[:2]]
    out = tuple(t if name in over else room[1:-1] for name, t, room in zip("xy", inputs, rooms, strict=False))
    residual, normed = residual_scale_norm(*inputs, out=out)
    assert residual is out[0]
    assert normed is out[1]
    assert torch.equal(residual, expected[0])
    assert torch.equal(normed, expected[1])
    for name, now, before, room in zip("xy", inputs, kept, rooms, strict=False):
        assert (room[[0, -1]] == 7.0).all()
        if name not in over:
            assert torch.equal(now, before)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_out_of_other_layouts_and_in_a_compiled_function(name: str) -> None:
    x, y, *parameters = make_inputs((4, 8), DTYPES["f32"])

    def fill(x: Tensor, y: Tensor, strided: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        a, b = (torch.zeros(8, 4).T if other else torch.zeros(4, 8) for other in strided)
        residual_scale_norm(x, y, *parameters, out=(a, b))
        return a, b

    with backend(name):
        expected = residual_scale_norm(x, y, *parameters)
        for function in (fill, torch.compile(fill, backend="aot_eager", fullgraph=True)):
            for strided in ((True, True), (True, False), (False, True), (False, False)):
                for a, b in zip(function(x, y, strided), expected, strict=True):
                    assert torch.equal(a, b)
        residual_scale_norm(x, y, *parameters, out=(x, y))
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])


def test_out_under_autocast() -> None:
    """Also with dtypes that only autocast takes together."""
    for kinds in (DTYPES["f32+bf16"], (F16, BF16, F16)):
        inputs = make_inputs((4, 8), kinds)
        out = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1])
        with torch.autocast("cpu", BF16):
            expected = residual_scale_norm(*inputs)
            residual_scale_norm(*inputs, out=out)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b.to(a.dtype))


def test_out_that_does_not_fit() -> None:
    inputs = make_inputs((4, 8), DTYPES["f32+bf16"])
    x, y = inputs[:2]
    for out, error, message in (
        (x, TypeError, r"out must be a tuple of two tensors, got Tensor"),
        ((x,), TypeError, r"out must be a tuple of two tensors"),
        ((x[:2], y), ValueError, r"out\[0\] must have shape of x = \[4, 8\], got \[2, 8\]"),
        ((x, y.float()), TypeError, r"out\[1\] must have the dtype of y, bfloat16 \[4, 8\]; got float32 \[4, 8\]"),
        ((x, y.to("meta")), ValueError, r"out\[1\] must be on the device of y, cpu; it is on meta"),
    ):
        with pytest.raises(error, match=message):
            residual_scale_norm(*inputs, out=out)  # type: ignore[arg-type]
    kept = x.clone()
    with pytest.raises(RuntimeError, match="out must be None while gradients are recorded"):
        residual_scale_norm(*inputs, out=(torch.zeros_like(x).requires_grad_(), y))
    with pytest.raises(RuntimeError, match="out must be None while gradients are recorded"):
        residual_scale_norm(x, y, inputs[2].requires_grad_(), *inputs[3:], out=(x, y))
    assert torch.equal(x, kept)


@every_isa
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_every_number_of_16_bits_survives(isa: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    zero = torch.zeros(64, 1024, dtype=dtype)
    residual, _ = residual_scale_norm(numbers, zero, *(torch.ones(1024) for _ in range(3)))
    assert torch.equal(residual.isnan(), numbers.isnan())
    assert torch.equal(residual[~residual.isnan()], numbers[~numbers.isnan()])


@every_isa
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_sums_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**15), 2**15, (2, 500, 1024), dtype=torch.int32).to(torch.int16)
    bits[1, :250] = bits[0, :250] + torch.randint(-3 * 2**10, 3 * 2**10, (250, 1024), dtype=torch.int32).to(torch.int16)
    x, y = bits.view(dtype)
    residual, _ = residual_scale_norm(x, y, *(torch.ones(1024) for _ in range(3)))
    exact = (x.float() + y.float()).to(dtype)
    assert torch.equal(residual.isnan(), exact.isnan())
    assert torch.equal(residual[~exact.isnan()], exact[~exact.isnan()])


@every_isa
def test_statistics_survive_a_large_mean(isa: str) -> None:
    x, y, gamma, weight, bias = make_inputs((64, 1024), DTYPES["f32"])
    x = x + 1000.0
    exact = reference.residual_scale_norm(*(t.double() for t in (x, y, gamma, weight, bias)))
    # The residual itself is rounded to 2^-14 beside a deviation of 1.4: that is what is left, not a loss of variance.
    assert (residual_scale_norm(x, y, gamma, weight, bias)[1] - exact[1]).norm() / exact[1].norm() < 1e-4


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_nan_stays_in_its_row(name: str) -> None:
    inputs = make_inputs((4, 70), DTYPES["f32"])
    inputs[0][2, 69] = float("nan")
    with backend(name):
        residual, normed = residual_scale_norm(*inputs)
    assert normed[2].isnan().all() and residual[2, 69].isnan()
    assert not normed[[0, 1, 3]].isnan().any() and not residual[:, :69].isnan().any()


@every_isa
@pytest.mark.parametrize("low", [F16, BF16], ids=["f16", "bf16"])
def test_no_rounding_turns_nan_into_a_number(isa: str, low: torch.dtype) -> None:
    """Rounding up the bits of a NaN whose mantissa is full would give -0."""
    full = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(F32)
    assert full.isnan().all()
    _, y, *parameters = make_inputs((3, 37), (F32, low, F32))
    _, normed = residual_scale_norm(full[:, None].repeat(1, 37), y, *parameters)
    assert normed.dtype == low and normed.isnan().all()


@needs_kernel
def test_the_number_of_threads_changes_nothing() -> None:
    inputs = make_inputs((333, 1024), DTYPES["f32"], grad=True)
    grads = (torch.randn(333, 1024), torch.randn(333, 1024))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(run_with_gradients(residual_scale_norm, inputs, grads))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_only_some_gradients(name: str) -> None:
    inputs = make_inputs((6, 33), DTYPES["f32"], grad=True)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with backend(name):
        for output in (0, 1):
            got = torch.autograd.grad(residual_scale_norm(*inputs)[output].square().sum(), inputs, allow_unused=True)
            want = torch.autograd.grad(
                reference.residual_scale_norm(*exact)[output].square().sum(), exact, allow_unused=True
            )
            for label, a, b in zip(NAMES, got, want, strict=True):
                assert_accurate(label, torch.zeros(b.shape) if a is None else a, b, F32) if b is not None else None
                assert b is not None or a is None or not a.any(), label
        frozen = [t if i < 2 else t.detach() for i, t in enumerate(inputs)]
        grads = torch.autograd.grad(residual_scale_norm(*frozen)[1].square().sum(), frozen[:2])
    assert_accurate("x without parameters", grads[0], want[0], F32)
    assert_accurate("y without parameters", grads[1], want[1], F32)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, DTYPES["f32"], grad=True)
    residual, normed = residual_scale_norm(*inputs)
    assert residual.shape == normed.shape == shape
    gradients = torch.autograd.grad((residual.sum() + normed.sum()), inputs)
    assert all(not gradient.any() for gradient in gradients)


def test_gradients_of_the_reference_in_float64() -> None:
    inputs = [t.requires_grad_() for t in make_inputs((3, 5), (F64, F64, F64))]
    assert torch.autograd.gradcheck(reference.residual_scale_norm, inputs)
    assert torch.autograd.gradcheck(residual_scale_norm, inputs)
    assert torch.autograd.gradgradcheck(residual_scale_norm, inputs)


@pytest.mark.parametrize("name", ["f32", "f32+bf16"])
def test_opcheck(name: str) -> None:
    inputs = make_inputs((2, 3, 17), DTYPES[name], grad=True)
    torch.library.opcheck(torch.ops.vggt_mv.residual_scale_norm.default, (*inputs, 1e-5))
    residual, normed, mean, rstd = (t.detach() for t in torch.ops.vggt_mv.residual_scale_norm(*inputs, 1e-5))
    saved = (residual, *(t.detach() for t in inputs[1:4]), mean, rstd)
    for parameters in (True, False):
        arguments = (torch.randn_like(residual), torch.randn_like(normed), *saved, parameters)
        torch.library.opcheck(torch.ops.vggt_mv.residual_scale_norm_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    def block(*inputs: Tensor) -> Tensor:
        residual, normed = residual_scale_norm(*inputs)
        return (residual * normed).sum()

    inputs = make_inputs((4, 48), DTYPES["f32"], grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, block))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


AUTOCAST = [
    ((F32, F32, F32), (F32, F32)),
    ((F32, BF16, F32), (F32, BF16)),
    ((BF16, BF16, F32), (BF16, BF16)),
    ((BF16, F32, F32), (F32, F32)),
    ((F16, BF16, F32), (F32, F32)),
    ((F32, BF16, BF16), (F32, BF16)),
    ((F64, F64, F64), (F64, F64)),
]


@pytest.mark.parametrize(("given", "expected"), AUTOCAST, ids=str)
def test_autocast(given: tuple[torch.dtype, ...], expected: tuple[torch.dtype, ...]) -> None:
    inputs = make_inputs((3, 32), given, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        residual, normed = residual_scale_norm(*inputs)
    assert (residual.dtype, normed.dtype) == expected
    exact = reference.residual_scale_norm(*(t.detach().double() for t in inputs))
    for name, a, b in zip(("residual", "normed"), (residual, normed), exact, strict=True):
        assert_accurate(name, a.detach(), b, widest_tolerance(*given))
    (residual.sum() + normed.sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in inputs)


X, P = torch.zeros(2, 8), torch.zeros(8)
META_P = torch.zeros(8, device="meta")
ERRORS = [
    ((1.0, X, P, P, P), TypeError, "residual_scale_norm: x must be a torch.Tensor, got float"),
    ((X.int(), X, P, P, P), TypeError, "x must have one of the dtypes float32, bfloat16, float16, float64; got int32"),
    ((X, X, P, None, P), TypeError, "weight must be a torch.Tensor, got NoneType"),
    ((P.sum(), X, P, P, P), ValueError, r"x must have shape \[..., C\] with C >= 1, got \[\]"),
    ((X[:, :0], X, P, P, P), ValueError, r"x must have shape \[..., C\] with C >= 1, got \[2, 0\]"),
    ((X, X[:1], P, P, P), ValueError, r"y must have shape of x = \[2, 8\], got \[1, 8\]"),
    ((X, X, P[:7], P, P), ValueError, r"gamma must have shape \[C\] = \[8\], got \[7\]"),
    ((X, X, P, P, X), ValueError, r"bias must have shape \[C\] = \[8\], got \[2, 8\]"),
    ((X, X, P, META_P, P), ValueError, "weight must be on the device of x, cpu; it is on meta"),
    ((X, X, P, P, P, -1.0), ValueError, "eps must be at least 0, got -1.0"),
    ((X, X, P, P, P, float("nan")), ValueError, "eps must be at least 0, got nan"),
    (
        (X.half(), X, P, P, P),
        TypeError,
        r"y must have the dtype of x, or be float16 or .*; got x float16 \[2, 8\] and y",
    ),
    ((X, X.double(), P, P, P), TypeError, r"y must have the dtype of x, .* and y float64 \[2, 8\]"),
    ((X, X, P, P.half(), P), TypeError, r"must have one dtype, that of x or float32; got weight float16 \[8\]"),
    (
        (X, X, P.half(), P.half(), P.half()),
        TypeError,
        r"got gamma float16 \[8\] with gamma float16 \[8\] and x float32",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text[:48] for _, _, text in ERRORS])
def test_errors_name_argument_rule_and_value(arguments: tuple, error: type[Exception], text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=text):
        residual_scale_norm(*arguments)


def test_the_registered_operator_checks_too() -> None:
    with pytest.raises(ValueError, match=r"residual_scale_norm: y must have shape of x = \[2, 8\], got \[1, 8\]"):
        torch.ops.vggt_mv.residual_scale_norm(X, X[:1], P, P, P, 1e-5)


@needs_kernel
def test_instruction_sets() -> None:
    assert usable_isas() and set(usable_isas()) <= set(compiled_isas()) <= set(ISAS)
    assert extension is not None
    with pytest.raises(ValueError, match=f"set_cpu_isa, name: must be one of {', '.join(usable_isas())} .*got 'mmx'"):
        extension.set_cpu_isa("mmx")


@needs_kernel
def test_instruction_set_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension is not None
    before = extension.build_info()["cpu_isa"]
    try:
        monkeypatch.setenv("VGGT_MV_CPU_ISA", "portable")
        extension.select_cpu_isa()  # what loading the module does
        assert extension.build_info()["cpu_isa"] == "portable"
        monkeypatch.setenv("VGGT_MV_CPU_ISA", "")
        extension.select_cpu_isa()
        assert extension.build_info()["cpu_isa"] == usable_isas()[-1]
        monkeypatch.setenv("VGGT_MV_CPU_ISA", "best")
        with pytest.raises(
            ValueError, match="environment variable VGGT_MV_CPU_ISA: must be one of portable.*got 'best'"
        ):
            extension.select_cpu_isa()
    finally:
        extension.set_cpu_isa(before)


@needs_kernel
def test_one_openmp_runtime() -> None:
    residual_scale_norm(*make_inputs((64, 1024), DTYPES["f32"]))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
