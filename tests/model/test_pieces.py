"""Blocks that a CPU takes piece by piece: the plain form's results, and nobody's tensors lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vggt_mv.layers import Attention, Block, GridContext, Mlp, RotaryPositionEmbedding2D, SwiGLUFFN, pieces

GRID_HW, SPECIAL, TOKENS, C = (1, 5), 2, 7, 16
SHAPE = (2, 3, 2, TOKENS, C)  # [B, T, N, P, C]: 84 tokens
ROW = 4 * C * 4  # bytes of a row of the MLP's hidden layer in float32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many rows make a piece."""
    monkeypatch.setattr(pieces, "_ROWS_PER_THREAD", 0)
    return lambda count: monkeypatch.setattr(pieces, "_BYTES", count * ROW)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What attention and MLP are given: their name and how many tokens, without hooks, which would be noticed."""
    calls: list[tuple[str, int]] = []
    for name, kind in (("attn", Attention), ("mlp", Mlp)):

        def forward(self: Any, x: Tensor, *arguments: Any, forward: Any, name: str, **keywords: Any) -> Tensor:
            calls.append((name, x.numel() // C))
            return forward(self, x, *arguments, **keywords)

        monkeypatch.setattr(kind, "forward", _method(partial(forward, forward=kind.forward, name=name)))
    return calls


def _method(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *arguments, **keywords: function(self, *arguments, **keywords)


def _block(randomize: Callable[..., Any], **options: Any) -> Block:
    block: Block = randomize(Block(C, 2, init_values=0.1, qk_norm=True, rope=RotaryPositionEmbedding2D(), **options))
    return block.eval()


def _context(axis: str, biased: str = "nothing") -> GridContext:
    key_bias = torch.randn(SHAPE[:-1]) if biased != "nothing" else None
    gates = {"rows": torch.rand(TOKENS), "rows of frames": torch.rand(SHAPE[:-1])}
    return GridContext(axis, GRID_HW, SPECIAL, key_bias=key_bias, row_gate=gates.get(biased))


@pytest.mark.parametrize("axis", ["frame", "view", "time", "global"])
@pytest.mark.parametrize("biased", ["nothing", "keys", "rows", "rows of frames"])
@pytest.mark.parametrize("next_norm", [nn.LayerNorm(C), None], ids=["next_norm", "last"])
def test_the_result_is_that_of_the_plain_form(randomize, rel, rows, axis, biased, next_norm):
    block, x, context = _block(randomize), torch.randn(SHAPE), _context(axis, biased)
    normed = block.norm1(x).detach()
    kept = x.clone(), normed.clone()
    expected = block(x, grid=context, normed=normed, next_norm=next_norm)  # recorded
    for count in (1000, 15, 8, 3):  # all at once, two frames and a bit, one, less than one
        rows(count)
        with torch.inference_mode():
            assert pieces.fits(block, x, next_norm)
            got = block(x, grid=context, normed=normed, next_norm=next_norm)
        assert rel(got[0], expected[0].detach()) < 1e-6
        if next_norm is None:
            assert got[1] is None
        else:
            assert rel(got[1], expected[1].detach()) < 1e-6
        assert torch.equal(x, kept[0])
        assert torch.equal(normed, kept[1])


@pytest.mark.parametrize(
    ("axis", "attention"),
    [("frame", [14] * 6), ("view", [14] * 6), ("time", [42] * 2), ("global", [42] * 2)],
)
def test_how_large_the_pieces_are(randomize, rows, seen, axis, attention):
    """As many whole sequences, and for the MLP as many tokens, as make no more than a piece; a sequence at least."""
    block, x = _block(randomize), torch.randn(SHAPE)
    rows(20)
    with torch.no_grad():
        block(x, grid=_context(axis), normed=None, next_norm=block.norm1)
    assert [tokens for name, tokens in seen if name == "attn"] == attention
    for_each = [14] if attention[0] == 14 else [20, 20, 2]
    assert [tokens for name, tokens in seen if name == "mlp"] == for_each * len(attention)
    seen.clear()
    rows(1000)
    with torch.no_grad():
        block(x, grid=_context(axis), normed=None, next_norm=block.norm1)
    assert seen == [("attn", 84), ("mlp", 84)]


def test_queries_keys_and_values_may_be_the_widest(randomize, rows, seen):
    block = _block(randomize, mlp_ratio=1)
    rows(20)  # of four times C; of three times C they are 26
    with torch.no_grad():
        block(torch.randn(SHAPE), grid=_context("frame"), normed=None, next_norm=None)
    assert [tokens for name, tokens in seen if name == "attn"] == [21] * 4


def test_every_thread_has_its_rows(randomize, rows, seen, monkeypatch):
    rows(1)
    monkeypatch.setattr(pieces, "_ROWS_PER_THREAD", 30)
    threads = torch.get_num_threads()
    try:
        for count, expected in ((1, [28, 28, 28]), (2, [56, 28])):
            torch.set_num_threads(count)
            seen.clear()
            with torch.no_grad():
                _block(randomize)(torch.randn(SHAPE), grid=_context("frame"), normed=None, next_norm=None)
            assert [tokens for name, tokens in seen if name == "attn"] == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("axis", ["frame", "global"])
def test_under_autocast(randomize, rel, rows, seen, axis):
    """Twice the rows at half the bytes; the residual stream stays float32, the norm is the branch's."""
    block, x = _block(randomize), torch.randn(SHAPE)
    exact = block(x, grid=_context(axis), normed=None, next_norm=block.norm1)
    seen.clear()
    rows(7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, normed = block(x, grid=_context(axis), normed=None, next_norm=block.norm1)
    assert seen[:2] == [("attn", 14 if axis == "frame" else 42), ("mlp", 14)]
    assert (y.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    assert rel(y, exact[0].detach()) < 1e-2
    assert rel(normed.float(), exact[1].detach()) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_other_dtypes(randomize, rel, rows, dtype):
    block, x = _block(randomize).to(dtype), torch.randn(SHAPE, dtype=dtype)
    whole = block(x, grid=_context("frame"), normed=None, next_norm=block.norm1)
    rows(3)
    for a, b in zip(block(x, grid=_context("frame"), normed=None, next_norm=block.norm1), whole, strict=True):
        assert a.dtype == dtype
        assert rel(a.double(), b.double()) < (1e-14 if dtype == torch.float64 else 1e-2)


@torch.no_grad()
def test_sequences_and_no_frames(randomize, rel, rows, seen):
    block, x = _block(randomize), torch.randn(3, 10, C)
    whole = block(x)
    seen.clear()
    rows(7)
    assert rel(block(x), whole) < 1e-6
    assert [tokens for name, tokens in seen if name == "mlp"] == [7, 7, 7, 7, 2]
    for shape, axis in (((0, 3, 2, TOKENS, C), "frame"), ((2, 0, 2, TOKENS, C), "global")):
        y, normed = block(torch.zeros(shape), grid=_context(axis), normed=None, next_norm=block.norm1)
        assert y.shape == normed.shape == shape


class _OtherAttention(Attention):
    pass


class _OtherDropout(nn.Identity):
    pass


# Why a block goes in the plain form: options of the block, and what is done to it.
UNFIT: dict[str, tuple[dict[str, Any], Callable[[Block], Any]]] = {
    "recorded": ({}, lambda block: None),
    "layout": ({}, lambda block: None),
    "next norm": ({}, lambda block: None),
    "hook": ({}, lambda block: block.mlp.fc1.register_forward_hook(lambda *_: None)),
    "pre-hook": ({}, lambda block: block.attn.proj.register_forward_pre_hook(lambda *_: None)),
    "scale": ({}, lambda block: setattr(block, "ls2", nn.Identity())),
    "wide scale": ({}, lambda block: block.ls2.double()),
    "norm": ({"norm_layer": nn.RMSNorm}, lambda block: None),
    "mlp": ({"ffn_layer": SwiGLUFFN}, lambda block: None),
    "attention": ({"attn_class": _OtherAttention}, lambda block: None),
    "qkv": ({}, lambda block: setattr(block.attn, "qkv", nn.Sequential(block.attn.qkv))),
    "projection": ({}, lambda block: setattr(block.attn, "proj", nn.Sequential(block.attn.proj))),
    "hidden layer": ({}, lambda block: setattr(block.mlp, "fc1", nn.Sequential(block.mlp.fc1))),
    "second layer": ({}, lambda block: setattr(block.mlp, "fc2", nn.Sequential(block.mlp.fc2))),
    "after the projection": ({}, lambda block: setattr(block.attn, "proj_drop", _OtherDropout())),
    "in the mlp": ({}, lambda block: setattr(block.mlp, "drop", _OtherDropout())),
    "drop path": ({"drop_path": 0.5}, lambda block: block.train()),
    "dropout": ({"drop": 0.5}, lambda block: block.train()),
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_does_not_fit_is_left_to_the_plain_form(randomize, rows, seen, why):
    options, change = UNFIT[why]
    block, x, next_norm = _block(randomize, **options), torch.randn(SHAPE), nn.LayerNorm(C)
    with torch.no_grad():
        assert pieces.fits(_block(randomize), x, next_norm)
    change(block)
    if why == "layout":
        x = x.transpose(1, 2)
    elif why == "next norm":
        next_norm = nn.RMSNorm(C)
    rows(7)
    with torch.set_grad_enabled(why == "recorded"):
        assert not pieces.fits(block, x, next_norm)
        if why != "wide scale":  # no block runs with it
            block(x, grid=_context("frame"), normed=None, next_norm=next_norm)
    assert all(tokens == 84 for _, tokens in seen)


@torch.no_grad()
def test_other_devices_other_dtypes_and_global_hooks_do_not_fit(randomize):
    block, x = _block(randomize), torch.randn(SHAPE)
    assert pieces.fits(block, x, None)
    assert not pieces.fits(block, x.to("meta"), None)
    with torch.autocast("cpu", torch.float16):
        assert pieces.fits(block, x, None)
        assert not pieces.fits(block, x.to(torch.bfloat16), None)
    module = torch.nn.modules.module
    for register in (module.register_module_forward_hook, module.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not pieces.fits(block, x, None)
        handle.remove()
    assert pieces.fits(block, x, None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["axis", "tokens", "key_bias", "row_gate"])
def test_what_is_wrong_is_found_as_in_one_piece(randomize, rows, name):
    block, x, context = _block(randomize), torch.randn(SHAPE), _context("frame")
    if name == "axis":
        context, message = replace(context, axis="nope"), "axis must be one of frame, view, time, global; got 'nope'"
    elif name == "tokens":
        x, message = x[0, 0], r"must have shape \[B, T, N, P"
    else:
        wrong = torch.zeros(4, *SHAPE[1:-1])  # of a larger batch: cut up, its first half would seem right
        biases = {"key_bias": torch.zeros(SHAPE[:-1]), name: wrong}
        context, message = replace(context, **biases), rf"{name} must have shape .*, got \[4, 3, 2, 7\]"
    rows(7)
    with pytest.raises(ValueError, match=message):
        block(x, grid=context, normed=None, next_norm=None)


def test_a_compiled_block_is_the_plain_form(randomize, rel, rows, seen):
    block, x = _block(randomize), torch.randn(SHAPE)
    rows(7)
    call = partial(block, grid=_context("frame"), normed=None, next_norm=block.norm1)
    with torch.no_grad():
        compiled = torch.compile(call, backend="eager", fullgraph=True)(x)
        assert seen == [("attn", 84), ("mlp", 84)]
        for a, b in zip(compiled, call(x), strict=True):
            assert rel(a, b) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4,), (2, 2)], ids=["sequence", "times x views"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_spatial_mask": True, "mask_layer": 1},
        {"enable_dual_stream": True},
        {"enable_sparse_global": True},
        {"enable_dual_stream": True, "enable_sparse_global": True},
    ],
    ids=["one stream", "mask", "two streams", "sparse", "two streams, sparse"],
)
def test_whole_aggregators(tiny_aggregator, rel, rows, seen, monkeypatch, grid, options):
    aggregator = tiny_aggregator(**options)
    images, given = torch.rand(1, *grid, 3, 28, 42), torch.rand(1, *grid, 28, 42)
    with monkeypatch.context() as plain:
        plain.setattr(pieces, "fits", lambda *_: False)
        whole = aggregator(images, dynamic_mask=given)
    calls = len(seen)
    rows(7)
    got = aggregator(images, dynamic_mask=given)
    assert len(seen) > 2 * calls
    results, expected = (_tensors_in(outputs) for outputs in (got, whole))
    assert len(results) >= aggregator.depth * (2 if "enable_dual_stream" in options else 1)
    for a, b in zip(results, expected, strict=True):
        assert rel(a, b) < 1e-5


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in values for tensor in _tensors_in(item)]
