"""conv3x3 against float64 under every instruction set, what it may overwrite, and what it leaves to PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_support import ISAS, assert_accurate, relative_error
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import backend, conv3x3, explain, reference
from vggt_mv_ext._extension import extension

module = importlib.import_module("vggt_mv_ext.ops.conv3x3")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
needs_extension = pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def inputs(
    images: int, channels: int, outputs: int, height: int, width: int, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual; maps are channels-last."""
    x = channels_last(torch.randn(images, channels, height, width, dtype=dtype))
    weight = torch.randn(outputs, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    residual = channels_last(torch.randn(images, outputs, height, width, dtype=dtype))
    return x, weight, torch.randn(outputs, dtype=dtype), residual


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    size: tuple[int, int] | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    given = (x, weight, bias, residual, *(offsets or (None, None)))
    wide = [None if tensor is None else tensor.double() for tensor in given]
    return reference.conv3x3(*wide[:4], activation, size, *wide[4:])  # type: ignore[arg-type]


def runs_on(*tensors: Tensor) -> str | None:
    return explain("conv3x3", *tensors).backend


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes sizes, too, for which it is not worth it."""
    monkeypatch.setattr(module, "MIN_TILES", 0)
    monkeypatch.setattr(module, "MIN_CHANNELS", 0)


# ---- results

SIZES = {
    "1 pixel, 1 channel": (1, 1, 1, 1, 1),
    "a row of pixels": (1, 5, 3, 1, 9),
    "a column of pixels": (2, 3, 17, 10, 1),
    "one tile": (1, 16, 32, 4, 4),
    "3 x 3 pixels": (3, 8, 8, 3, 3),
    "one more than a tile": (2, 33, 31, 5, 5),
    "several blocks and images": (3, 20, 40, 37, 30),
    "narrow panel": (1, 48, 66, 20, 23),
    "wide": (1, 256, 128, 37, 37),
}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("rest", ["nothing", "bias", "residual", "both"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.usefixtures("poisoned", "any_size")
def test_against_float64(isa: str, size: tuple[int, ...], rest: str, activation: str) -> None:
    x, weight, bias, residual = inputs(*size)
    rest_of_it = bias if rest in ("bias", "both") else None, residual if rest in ("residual", "both") else None
    got = conv3x3(x, weight, *rest_of_it, activation)
    assert runs_on(x, weight) == "cpu"
    assert got.dtype == F32 and got.is_contiguous(memory_format=torch.channels_last)
    assert_accurate("y", got, exact(x, weight, *rest_of_it, activation), F32)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("offset", [0.0, 10.0], ids=["centred", "offset"])
def test_error(isa: str, offset: float) -> None:
    """What the documentation states; the usual points 0, +-1, +-2 are at 2.4e-6."""
    x, weight, _, _ = inputs(1, 256, 64, 32, 32)
    got = conv3x3(x.relu() + offset, weight)
    assert runs_on(x, weight) == "cpu"
    assert relative_error(got, exact(x.relu() + offset, weight)) < 1.6e-6


RESIZED = {
    "to 1 pixel": ((4, 5), (1, 1)),
    "from 1 pixel": ((1, 1), (6, 7)),
    "a row": ((1, 9), (1, 30)),
    "up": ((9, 12), (37, 30)),
    "far up": ((2, 3), (33, 41)),
    "down": ((40, 33), (7, 10)),
    "up and down": ((5, 40), (40, 5)),
    "the same": ((9, 10), (9, 10)),
}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("with_offsets", [False, True], ids=["alone", "offsets"])
@pytest.mark.parametrize("channels", [19, 64])
@pytest.mark.parametrize(("source", "size"), RESIZED.values(), ids=RESIZED.keys())
@pytest.mark.usefixtures("poisoned", "any_size")
def test_resized(isa: str, source: tuple[int, int], size: tuple[int, int], channels: int, with_offsets: bool) -> None:
    x, weight, bias, _ = inputs(2, channels, 24, *source)
    residual = channels_last(torch.randn(2, 24, *size))
    offsets = (torch.randn(size[0], channels), torch.randn(size[1], channels)) if with_offsets else None
    got = conv3x3(x, weight, bias, residual, "relu", size=size, offsets=offsets)
    assert runs_on(x, weight) == "cpu"
    assert_accurate("y", got, exact(x, weight, bias, residual, "relu", size, offsets), F32)


@needs_extension
def test_resized_in_two_steps() -> None:
    """The same as PyTorch's resizing and then the same kernel, also where the sizes are those of a DPT head."""
    x, weight, _, _ = inputs(1, 32, 16, 74, 42)
    resized = channels_last(F.interpolate(x.double(), (130, 75), mode="bilinear", align_corners=True).float())
    got, expected = conv3x3(x, weight, size=(130, 75)), conv3x3(resized, weight)
    assert relative_error(got, expected.double()) < 1e-6


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.contiguous(),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "offset": lambda x: torch.cat((torch.full_like(x[:1], float("nan")), x))[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@needs_extension
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, weight, bias, residual = inputs(2, 16, 24, 29, 31)
    expected = conv3x3(x, weight, bias, residual, "relu")
    weights = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    before = [tensor.clone() for tensor in (x, weight, residual)]
    got = conv3x3(layout(x), weights, torch.stack((bias, bias), 1)[:, 0], layout(residual), "relu")
    assert torch.equal(got, expected) and got.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(*pair) for pair in zip((x, weight, residual), before, strict=True))


@needs_extension
def test_threads_do_not_matter() -> None:
    given = inputs(2, 40, 48, 41, 35)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(conv3x3(*given, "relu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_extension
def test_calls_at_the_same_time() -> None:
    """Only one of them has the memory that is kept; sizes go up and down."""
    given = [inputs(1, channels, 32, 30, 30) for channels in (16, 256, 64, 128)] * 4
    expected = [conv3x3(*arguments, "relu") for arguments in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = pool.map(lambda arguments: conv3x3(*arguments, "relu"), given)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@needs_extension
def test_images_are_apart() -> None:
    """The zeros around an image are no neighbour's pixels."""
    x, weight, bias, _ = inputs(3, 16, 16, 17, 18)
    x[1] = float("nan")
    got = conv3x3(x, weight, bias)
    assert got[1].isnan().all() and torch.equal(got[::2], conv3x3(channels_last(x[::2]), weight, bias))


@needs_extension
def test_nan_and_infinity_stay_in_the_tiles_that_read_them() -> None:
    x, weight, _, _ = inputs(1, 16, 16, 40, 40)
    clean = conv3x3(x, weight, activation="relu")
    for value in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[0, 3, 17, 22] = value  # inside of one tile: rows 16 to 19, columns 20 to 23
        got = conv3x3(spoilt, weight, activation="relu")
        inside = torch.zeros(40, 40, dtype=torch.bool)
        inside[16:20, 20:24] = True
        assert torch.equal(got[..., ~inside], clean[..., ~inside])
        assert not got[0, :, 16:19, 21:24].isfinite().all(dim=0).any()


# ---- overwriting


@needs_extension
def test_overwrites_the_residual() -> None:
    x, weight, bias, residual = inputs(1, 16, 24, 29, 31)
    expected = conv3x3(x, weight, bias, residual, "relu")
    with torch.inference_mode():
        got = conv3x3(x, weight, bias, residual, "relu", overwrite_residual=True)
    assert got is residual and torch.equal(got, expected)


@pytest.mark.parametrize("why", ["channels first", "shares x", "bfloat16", "gradients", "reference", "not asked for"])
def test_keeps_the_residual(why: str) -> None:
    x, weight, bias, residual = inputs(1, 16, 16, 29, 31, BF16 if why == "bfloat16" else F32)
    if why == "channels first":
        residual = residual.contiguous()
    if why == "shares x":
        residual = x
    if why == "gradients":
        weight.requires_grad_()
    before, expected = residual.clone(), exact(x, weight, bias, residual)
    with backend("reference" if why == "reference" else "auto"):
        got = conv3x3(x, weight, bias, residual, overwrite_residual=why != "not asked for")
    assert torch.equal(residual, before)
    assert_accurate("y", got, expected.detach(), x.dtype)


# ---- where PyTorch does it


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        ((1, 16, 16, 28, 28), BF16, "bfloat16 runs on the reference alone"),
        ((1, 16, 16, 28, 28), F64, "float64 runs on the reference alone"),
        ((1, 15, 16, 28, 28), F32, "15 to 16 channels are too few"),
        ((1, 16, 15, 28, 28), F32, "16 to 15 channels are too few"),
        ((1, 16, 16, 12, 20), F32, "15 tiles of 4 x 4 pixels are too few"),
        ((1, 1025, 256, 28, 28), F32, "1025 to 256 channels are too many"),
    ],
)
@needs_extension
def test_plain(size: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    x, weight, bias, residual = inputs(*size, dtype)
    for name in ("auto", "cpu", "cuda", "reference"):  # none of them is an error: the layer is PyTorch's own
        with backend(name):
            assert reason in explain("conv3x3", x, weight).passed_over["cpu"]
            assert runs_on(x, weight) == "reference"
            got = conv3x3(x, weight, bias, residual, "relu")
            assert torch.equal(got, F.relu(F.conv2d(x, weight, bias, padding=1) + residual))
            assert got.is_contiguous(memory_format=torch.channels_last)


@needs_extension
def test_explanation() -> None:
    x, weight, _, _ = inputs(1, 16, 16, 28, 28)
    assert runs_on(x, weight) == "cpu"
    assert explain("conv3x3", x, weight.requires_grad_()).passed_over["cpu"] == "gradients are recorded"


def test_no_images() -> None:
    x, weight, bias, residual = inputs(0, 16, 24, 28, 28)
    assert conv3x3(x, weight, bias, residual).shape == (0, 24, 28, 28)


# ---- autograd, autocast, torch.library


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients(activation: str) -> None:
    given = inputs(2, 3, 2, 4, 5, F64)
    tensors = tuple(tensor.requires_grad_() for tensor in given)

    def registered(*tensors: Tensor) -> Any:
        return torch.ops.vggt_mv.conv3x3(*tensors, activation, None, None, None)

    assert torch.autograd.gradcheck(lambda *t: conv3x3(*t, activation), tensors)
    assert torch.autograd.gradcheck(registered, tensors)
    assert torch.autograd.gradgradcheck(registered, tensors)


def test_gradients_of_what_is_resized() -> None:
    x, weight, _, _ = inputs(1, 3, 2, 4, 5, F64)
    given = (x, weight, torch.randn(6, 3, dtype=F64), torch.randn(4, 3, dtype=F64))
    tensors = tuple(tensor.requires_grad_() for tensor in given)

    def registered(x: Tensor, weight: Tensor, *offsets: Tensor) -> Any:
        return torch.ops.vggt_mv.conv3x3(x, weight, None, None, "none", (6, 4), *offsets)

    def public(x: Tensor, weight: Tensor, *offsets: Tensor) -> Tensor:
        return conv3x3(x, weight, size=(6, 4), offsets=offsets)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(public, tensors)
    assert torch.autograd.gradcheck(registered, tensors)
    assert torch.equal(registered(*tensors), public(*tensors))


def test_gradients_in_float32_are_pytorchs() -> None:
    given = [tensor.requires_grad_() for tensor in inputs(1, 16, 16, 28, 28)]
    grad = torch.randn(1, 16, 28, 28)
    found = torch.autograd.grad(conv3x3(*given, "relu"), given, grad)
    x, weight, bias, residual = given
    expected = torch.autograd.grad(F.relu(F.conv2d(x, weight, bias, padding=1) + residual), given, grad)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("rest", [False, True], ids=["alone", "with the rest"])
def test_opcheck(gradients: bool, rest: bool) -> None:
    x, weight, bias, residual = (tensor.requires_grad_(gradients) for tensor in inputs(1, 16, 16, 28, 28))
    others = (bias, residual) if rest else (None, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (x, weight, *others, "relu", None, None, None)
    torch.library.opcheck(torch.ops.vggt_mv.conv3x3.default, arguments, test_utils=tests)
    if rest and not gradients:
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(torch.ops.vggt_mv.conv3x3_.default, (x, weight, bias, residual, "relu"), test_utils=tests)


def test_opcheck_of_what_is_resized() -> None:
    x, weight, bias, _ = inputs(1, 16, 16, 28, 28)
    arguments = (x, weight, bias, None, "none", (40, 35), torch.randn(40, 16), torch.randn(35, 16))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.vggt_mv.conv3x3.default, arguments, test_utils=tests)


@needs_extension
def test_under_compile() -> None:
    x, weight, bias, residual = inputs(1, 16, 24, 29, 31)
    expected = conv3x3(x, weight, bias, residual, "relu")
    compiled = torch.compile(
        lambda *t: conv3x3(*t, "relu", overwrite_residual=True) * 1.0, backend="aot_eager", fullgraph=True
    )
    before = residual.clone()
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, bias, residual), expected)
    assert torch.equal(residual, before)


def test_autocast() -> None:
    x, weight, bias, residual = inputs(1, 16, 24, 29, 31)
    with torch.autocast("cpu", dtype=BF16):
        plain = F.conv2d(x, weight, bias, padding=1) + residual
        assert torch.equal(conv3x3(x, weight, bias, residual), plain)
        sized = F.conv2d(F.interpolate(x, (31, 40), mode="bilinear", align_corners=True), weight, padding=1)
        assert torch.equal(conv3x3(x, weight, size=(31, 40)), sized)
        direct = torch.ops.vggt_mv.conv3x3(x, weight, bias, None, "none", None, None, None)
    assert direct.dtype == BF16


def test_transforms() -> None:
    x, weight, bias, _ = inputs(2, 16, 24, 29, 31)
    mapped = torch.func.vmap(lambda image: conv3x3(image[None], weight, bias)[0])(x)
    assert_accurate("y", mapped, exact(x, weight, bias), F32)
    _, tangent = torch.func.jvp(lambda image: conv3x3(image, weight), (x,), (torch.ones_like(x),))
    assert_accurate("tangent", tangent, exact(torch.ones_like(x), weight), F32)


# ---- bad input

X, WEIGHT, BIAS, RESIDUAL = inputs(1, 4, 6, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], WEIGHT), TypeError, "x must be a torch.Tensor, got list"),
        ((X.int(), WEIGHT), TypeError, "x must have one of the dtypes"),
        ((X[0], WEIGHT), ValueError, r"x must have shape \[N, C, h, w\] with C, h, w >= 1, got \[4, 5, 5\]"),
        ((X[..., :0], WEIGHT), ValueError, "C, h, w >= 1"),
        ((X, WEIGHT[:, :3]), ValueError, r"weight must have shape \[O, C, 3, 3\] = \[6, 4, 3, 3\]"),
        ((X, WEIGHT[..., :2]), ValueError, "weight must have shape"),
        ((X, WEIGHT[:0]), ValueError, "with O >= 1"),
        ((X, WEIGHT.double()), TypeError, "weight must have the dtype of x"),
        ((X, WEIGHT, BIAS[:5]), ValueError, r"bias must have shape \[O\] = \[6\], got \[5\]"),
        ((X, WEIGHT, BIAS, RESIDUAL[..., :4]), ValueError, "residual must have shape"),
        ((X, WEIGHT, BIAS, RESIDUAL.half()), TypeError, "residual must have the dtype of x"),
        ((X, WEIGHT, BIAS.to("meta")), ValueError, "bias must be on the device of x, cpu; it is on meta"),
        ((X, WEIGHT, None, None, "gelu"), ValueError, "activation must be one of none, relu; got 'gelu'"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"conv3x3: .*{message}"):
        vggt_mv_ext.conv3x3(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"size": (5,)}, ValueError, r"size must be \(H, W\) with H, W >= 1, got \(5,\)"),
        ({"size": (5, 0)}, ValueError, r"got \(5, 0\)"),
        ({"size": (7, 8), "residual": RESIDUAL}, ValueError, r"residual must have shape .* = \[1, 6, 7, 8\]"),
        ({"offsets": torch.zeros(5, 4)}, TypeError, r"offsets must be a pair \(rows, columns\)"),
        (
            {"offsets": (torch.zeros(5, 4), torch.zeros(5, 3))},
            ValueError,
            r"offsets of columns must have shape \[W, C\]",
        ),
        ({"offsets": (torch.zeros(4, 5), torch.zeros(5, 4))}, ValueError, r"offsets of rows must have shape \[H, C\]"),
        ({"offsets": (torch.zeros(5, 4).half(), torch.zeros(5, 4))}, TypeError, "must have the dtype of x"),
    ],
)
def test_bad_size_and_offsets(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"conv3x3: .*{message}"):
        vggt_mv_ext.conv3x3(X, WEIGHT, **keywords)
