"""The sparse attentions (memory_write, memory_read, landmark_attention, block_dilated_attention) against loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ops_support import ISAS, assert_accurate, strided_in_nan
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import (
    alternating_attention,
    block_dilated_attention,
    landmark_attention,
    memory_read,
    memory_write,
    reference,
)
from vggt_mv_ext._extension import extension

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OPERATORS = {f.__name__: f for f in (memory_write, memory_read, landmark_attention, block_dilated_attention)}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
BIASED = ("memory_write", "landmark_attention", "block_dilated_attention")

Arguments = dict[str, Any]


def make_arguments(
    name: str, *, bias: bool = True, shape: tuple[int, ...] = (2, 3, 2, 4, 3, 2, 8), memory: int = 5
) -> Arguments:
    batch, times, views, tokens, _, heads, width = shape
    frames = times * views
    arguments: Arguments = {"qkv": torch.randn(shape, dtype=F64)}
    if name.startswith("memory"):
        arguments["memory_qkv"] = torch.randn(batch, memory, 3, heads, width, dtype=F64)
    if name == "landmark_attention":
        arguments["landmarks"] = torch.randint(0, frames * tokens, (batch, 7))
    if name == "block_dilated_attention":
        arguments["neighbours"] = torch.stack([torch.randperm(frames)[:4] for _ in range(frames)])
        arguments["neighbours"][::2, 1:2] = -1
    if bias and name in BIASED:
        arguments["key_bias"] = -2 * torch.rand(shape[:4], dtype=F64)
    return arguments


def naive(name: str, arguments: Arguments, scale: float) -> Tensor:
    return naive_with_lse(name, arguments, scale)[0]


def naive_with_lse(name: str, arguments: Arguments, scale: float) -> tuple[Tensor, Tensor]:
    """Row after row, straight from the formulas."""
    qkv, bias = arguments["qkv"], arguments.get("key_bias")
    batch, times, views, tokens, _, heads, width = qkv.shape
    flat = qkv.flatten(1, 3)
    bias = torch.zeros(batch, flat.shape[1], dtype=qkv.dtype) if bias is None else bias.flatten(1)
    memory = arguments.get("memory_qkv")
    rows = flat if name != "memory_write" else memory
    out = torch.full((batch, rows.shape[1], heads * width), float("nan"), dtype=qkv.dtype)
    lse = torch.full((batch, heads, rows.shape[1]), float("nan"), dtype=qkv.dtype)
    for b, i in itertools.product(range(batch), range(rows.shape[1])):
        if name == "memory_read":
            chosen: list[int] = []
        elif name == "memory_write":
            chosen = list(range(flat.shape[1]))
        elif name == "landmark_attention":
            chosen = arguments["landmarks"][b].tolist()
        else:
            near = [f for f in arguments["neighbours"][i // tokens].tolist() if f >= 0]
            chosen = [f * tokens + p for f in near for p in range(tokens)]
        keys = [(flat[b, j], bias[b, j]) for j in chosen]
        if memory is not None:
            keys += [(token, torch.zeros((), dtype=qkv.dtype)) for token in memory[b]]
        for h in range(heads):
            logits = torch.stack([scale * rows[b, i, 0, h] @ key[1, h] + extra for key, extra in keys])
            values = torch.stack([key[2, h] for key, _ in keys])
            out[b, i, h * width : (h + 1) * width] = torch.softmax(logits, dim=0) @ values
            lse[b, h, i] = torch.logsumexp(logits, dim=0)
    return out if name == "memory_write" else out.unflatten(1, (times, views, tokens)), lse


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    wide = F64 if dtype == F64 else F32
    return {
        key: t if t.dtype == torch.int64 else t.to(wide if key == "key_bias" else dtype) for key, t in arguments.items()
    }


SHAPES = {
    "usual": (2, 3, 2, 4, 3, 2, 8),
    "one token": (1, 1, 1, 1, 3, 1, 1),
    "one view, odd width": (1, 3, 1, 5, 3, 1, 7),
    "one time": (2, 1, 3, 2, 3, 2, 32),
}


@every_operator
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.usefixtures("poisoned")
def test_against_loops(name: str, shape: tuple[int, ...], bias: bool) -> None:
    arguments = make_arguments(name, bias=bias, shape=shape)
    for scale in (None, 0.7):
        got = OPERATORS[name](**arguments, scale=scale)
        assert got.is_contiguous()
        assert_accurate("out", got, naive(name, arguments, shape[6] ** -0.5 if scale is None else scale), F64)


@every_operator
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    arguments = cast(make_arguments(name, shape=(1, 3, 2, 33, 3, 2, 64), memory=32), dtype)
    got = OPERATORS[name](**arguments)
    assert got.dtype == dtype
    assert_accurate("out", got, getattr(reference, name)(**cast(arguments, F64)), dtype)


# [B, T, N, P, 3, h, D], memory tokens: lists longer than a block of keys, frames shorter than a vector, odd widths.
KERNEL_SHAPES = {
    "one token": ((1, 1, 1, 1, 3, 1, 1), 1),
    "odd width": ((2, 3, 1, 5, 3, 2, 7), 3),
    "a frame and a token": ((1, 2, 2, 31, 3, 1, 64), 33),
    "many frames": ((1, 5, 3, 67, 3, 2, 32), 32),
    "wide": ((2, 1, 2, 40, 3, 1, 128), 17),
}


@every_isa
@every_operator
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize(("shape", "memory"), KERNEL_SHAPES.values(), ids=KERNEL_SHAPES.keys())
@pytest.mark.usefixtures("poisoned")
def test_kernel(isa: str, name: str, dtype: torch.dtype, shape: tuple[int, ...], memory: int) -> None:
    """Against float64, and no worse than PyTorch in the same dtype; any number of threads gives the same bits."""
    for bias in (True, False):
        arguments = cast(make_arguments(name, bias=bias, shape=shape, memory=memory), dtype)
        if name == "landmark_attention":
            tokens = shape[1] * shape[2] * shape[3]
            arguments["landmarks"] = torch.randint(0, tokens, (shape[0], min(300, tokens)))
        arguments = {key: strided_in_nan(t) if "qkv" in key else t for key, t in arguments.items()}
        exact = getattr(reference, name)(**cast(arguments, F64))
        with vggt_mv_ext.backend("reference"):
            eager = OPERATORS[name](**arguments)
        with vggt_mv_ext.backend("cpu"):
            torch.set_num_threads(1)
            got = OPERATORS[name](**arguments)
            torch.set_num_threads(3)
            again = OPERATORS[name](**arguments)
        assert_accurate(f"bias {bias}", got, exact, dtype, eager)
        assert torch.equal(got, again)


@pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")
@every_operator
def test_kernel_log_sum_of_exponentials(name: str) -> None:
    """The second result, of which the backward pass will make probabilities."""
    arguments = cast(make_arguments(name, shape=(2, 3, 2, 9, 3, 2, 8)), F32)
    plain = {**arguments, "scale": 0.3}
    if name in BIASED:
        plain.setdefault("key_bias", None)
    order = ("qkv", "memory_qkv", "landmarks", "neighbours", "key_bias", "scale")
    with vggt_mv_ext.backend("cpu"):
        _, lse = getattr(torch.ops.vggt_mv, name)(*(plain[key] for key in order if key in plain))
    assert_accurate("lse", lse, naive_with_lse(name, cast(arguments, F64), 0.3)[1], F32)


@every_operator
def test_strided_input(name: str) -> None:
    arguments = make_arguments(name)
    want = OPERATORS[name](**arguments)
    strided = {key: strided_in_nan(t) if t.dtype == F64 and t.dim() > 4 else t for key, t in arguments.items()}
    assert_accurate("out", OPERATORS[name](**strided), want, F64)


@every_operator
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=["f32", "f16", "f64"])
def test_infinite_bias_shuts_a_key_out(name: str, dtype: torch.dtype) -> None:
    if name not in BIASED:
        pytest.skip("takes no bias")
    arguments = cast(make_arguments(name), dtype)
    arguments["key_bias"][:, :, :, 1] = -torch.inf
    if name == "landmark_attention":
        arguments["landmarks"][:, 0] = 0
    out = OPERATORS[name](**arguments)
    assert out.isfinite().all()
    arguments["qkv"][:, :, :, 1, 1:] = 77.0  # key and value of what is shut out do not matter
    assert torch.equal(out, OPERATORS[name](**arguments))


def test_all_landmarks_or_all_frames_are_dense_attention() -> None:
    qkv, key_bias = torch.randn(2, 3, 2, 4, 3, 2, 8), torch.randn(2, 3, 2, 4)
    dense = alternating_attention(qkv.double(), "global", key_bias=key_bias.double())
    everything = torch.arange(24).expand(2, -1).flip(1)
    assert_accurate("landmarks", landmark_attention(qkv, everything, key_bias=key_bias), dense, F32)
    frames = torch.arange(6).expand(6, -1)
    assert_accurate("frames", block_dilated_attention(qkv, frames, key_bias=key_bias), dense, F32)
    alone = block_dilated_attention(qkv, torch.arange(6)[:, None], key_bias=key_bias)
    frame = alternating_attention(qkv.double(), "frame", key_bias=key_bias.double())
    assert_accurate("own frame", alone, frame, F32)


def test_a_neighbour_list_is_dense_attention_under_a_mask() -> None:
    arguments = make_arguments("block_dilated_attention", shape=(1, 3, 2, 4, 3, 2, 8))
    qkv, key_bias, neighbours = arguments["qkv"], arguments["key_bias"], arguments["neighbours"]
    allowed = torch.zeros(6, 6, dtype=torch.bool)
    for frame, row in enumerate(neighbours.tolist()):
        allowed[frame, [f for f in row if f >= 0]] = True
    mask = torch.zeros(24, 24, dtype=F64).masked_fill(
        ~allowed.repeat_interleave(4, 0).repeat_interleave(4, 1), -torch.inf
    )
    q, k, v = qkv.flatten(1, 3).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * 8**-0.5 + mask + key_bias.flatten()
    dense = (logits.softmax(-1) @ v).transpose(1, 2).reshape(1, 3, 2, 4, 16)
    assert_accurate("out", block_dilated_attention(**arguments), dense, F64)


@every_operator
def test_gradients_in_float64(name: str) -> None:
    arguments = make_arguments(name, shape=(1, 2, 2, 2, 3, 1, 2), memory=2)
    tensors = {key: t.requires_grad_() for key, t in arguments.items() if t.dtype == F64}

    def function(*given: Tensor) -> Tensor:
        return OPERATORS[name](**(arguments | dict(zip(tensors, given, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


@every_operator
def test_unused_parts_have_no_gradient(name: str) -> None:
    """The queries of tokens that a memory reads, or the keys of tokens that read one."""
    arguments = make_arguments(name)
    qkv = arguments["qkv"].requires_grad_()
    OPERATORS[name](**arguments).square().sum().backward()
    assert qkv.grad is not None
    used = [bool(part.any()) for part in qkv.grad.unbind(dim=4)]
    assert used == {"memory_write": [False, True, True], "memory_read": [True, False, False]}.get(name, [True] * 3)


def registered(name: str, arguments: Arguments, scale: float | None) -> tuple[Any, ...]:
    order = {
        "memory_write": ("qkv", "memory_qkv", "key_bias"),
        "memory_read": ("qkv", "memory_qkv"),
        "landmark_attention": ("qkv", "landmarks", "key_bias"),
        "block_dilated_attention": ("qkv", "neighbours", "key_bias"),
    }[name]
    return (*(arguments.get(key) for key in order), scale)


@every_operator
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_opcheck(name: str, bias: bool) -> None:
    arguments = cast(make_arguments(name, bias=bias), F32)
    tracked = {key: t if t.dtype == torch.int64 else t.clone().requires_grad_() for key, t in arguments.items()}
    operator = getattr(torch.ops.vggt_mv, name)
    torch.library.opcheck(operator.default, registered(name, tracked, None))
    given = registered(name, arguments, 0.5)
    out, lse = operator(*given)
    assert lse.shape == (2, 2, 5 if name == "memory_write" else 24)
    wanted = [t is not None for t in given[:-1] if t is None or t.dtype != torch.int64]
    backward = getattr(torch.ops.vggt_mv, f"{name}_backward").default
    torch.library.opcheck(backward, (torch.randn_like(out), *given, out, lse, wanted))


@every_operator
def test_compiles_without_a_graph_break(name: str) -> None:
    arguments = cast(make_arguments(name), F32)
    tensors = {key: t.requires_grad_() for key, t in arguments.items() if t.dtype == F32}

    def function(*given: Tensor) -> Tensor:
        return OPERATORS[name](**(arguments | dict(zip(tensors, given, strict=True)))).square().sum()

    inputs = list(tensors.values())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function))
    for key, a, b in zip(tensors, got, want, strict=True):
        assert_accurate(key, a, b.double(), F32)


@every_operator
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=["f32", "f16", "f64"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(name)
    low = {key: t if t.dtype == torch.int64 else t.to(dtype) for key, t in arguments.items()}
    low["qkv"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = OPERATORS[name](**low)
    expected = F64 if dtype == F64 else BF16
    assert out.dtype == expected
    assert_accurate("out", out.detach(), getattr(reference, name)(**arguments), expected)
    out.sum().backward()
    assert low["qkv"].grad is not None and low["qkv"].grad.dtype == dtype


@every_operator
def test_no_batch(name: str) -> None:
    arguments = make_arguments(name, shape=(0, 3, 2, 4, 3, 2, 8))
    out = OPERATORS[name](**arguments)
    assert out.numel() == 0 and out.shape[-1] == 16


def test_choice_of_backend() -> None:
    for name in OPERATORS:
        explanation = vggt_mv_ext.explain(name, QKV.double())
        assert explanation.backend == "reference"


QKV, MEMORY, BIAS = torch.zeros(1, 2, 2, 5, 3, 1, 8), torch.zeros(1, 4, 3, 1, 8), torch.zeros(1, 2, 2, 5)
MARKS, NEAR = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)
ERRORS: list[tuple[str, Arguments, type[Exception], str]] = [
    ("memory_write", {"qkv": QKV[0], "memory_qkv": MEMORY}, ValueError, r"memory_write: qkv must have shape \[B, T, N"),
    (
        "memory_write",
        {"qkv": QKV, "memory_qkv": MEMORY[0]},
        ValueError,
        r"memory_write: memory_qkv must .*\[B, M, 3, h",
    ),
    ("memory_write", {"qkv": QKV, "memory_qkv": MEMORY[:, :0]}, ValueError, r"memory_qkv must .* M >= 1, got \[1, 0"),
    (
        "memory_write",
        {"qkv": QKV, "memory_qkv": MEMORY[..., :4]},
        ValueError,
        r"= \[1, 4, 3, 1, 8\], got \[1, 4, 3, 1, 4",
    ),
    ("memory_write", {"qkv": QKV, "memory_qkv": MEMORY.half()}, TypeError, "memory_qkv must have the dtype of qkv"),
    (
        "memory_write",
        {"qkv": QKV, "memory_qkv": MEMORY, "key_bias": BIAS[0]},
        ValueError,
        r"key_bias .*\[1, 2, 2, 5\], got",
    ),
    (
        "memory_write",
        {"qkv": QKV, "memory_qkv": MEMORY, "key_bias": BIAS.half()},
        TypeError,
        "key_bias must be float32",
    ),
    ("memory_write", {"qkv": QKV, "memory_qkv": MEMORY, "scale": 0.0}, ValueError, "scale must be above 0 .* got 0.0"),
    (
        "memory_read",
        {"qkv": QKV.int(), "memory_qkv": MEMORY},
        TypeError,
        "memory_read: qkv must have one of the dtypes",
    ),
    ("memory_read", {"qkv": QKV, "memory_qkv": None}, TypeError, "memory_qkv must be a torch.Tensor, got NoneType"),
    (
        "memory_read",
        {"qkv": QKV, "memory_qkv": MEMORY.to("meta")},
        ValueError,
        "memory_qkv must be on the device of qkv",
    ),
    ("landmark_attention", {"qkv": QKV, "landmarks": [1]}, TypeError, "landmarks must be a torch.Tensor, got list"),
    ("landmark_attention", {"qkv": QKV, "landmarks": MARKS.int()}, TypeError, "landmarks must be int64, got int32"),
    (
        "landmark_attention",
        {"qkv": QKV, "landmarks": MARKS[0]},
        ValueError,
        r"landmarks must have shape \[B, K\] with 1",
    ),
    ("landmark_attention", {"qkv": QKV, "landmarks": MARKS[:, :0]}, ValueError, "at least one column, got"),
    (
        "landmark_attention",
        {"qkv": QKV, "landmarks": MARKS + 20},
        ValueError,
        r"indices in 0\.\.19, got values from 20",
    ),
    ("landmark_attention", {"qkv": QKV, "landmarks": MARKS - 1}, ValueError, r"indices in 0\.\.19, got values from -1"),
    ("landmark_attention", {"qkv": QKV, "landmarks": MARKS.to("meta")}, ValueError, "landmarks must be on the device"),
    (
        "block_dilated_attention",
        {"qkv": QKV, "neighbours": NEAR[:3]},
        ValueError,
        r"neighbours .*\[T \* N, W\] with 4 rows",
    ),
    ("block_dilated_attention", {"qkv": QKV, "neighbours": NEAR.float()}, TypeError, "neighbours must be int64"),
    (
        "block_dilated_attention",
        {"qkv": QKV, "neighbours": NEAR + 4},
        ValueError,
        r"indices in -1\.\.3, got values from 4",
    ),
    (
        "block_dilated_attention",
        {"qkv": QKV, "neighbours": NEAR - 2},
        ValueError,
        r"indices in -1\.\.3, got values from -2",
    ),
    (
        "block_dilated_attention",
        {"qkv": QKV, "neighbours": NEAR - 1},
        ValueError,
        r"a frame in every row, .*\[0, 1, 2, 3\]",
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "text"), ERRORS, ids=[f"{n}: {text[:40]}" for n, *_, text in ERRORS]
)
def test_errors_name_argument_rule_and_value(
    name: str, arguments: Arguments, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        OPERATORS[name](**arguments)
