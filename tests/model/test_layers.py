"""Blocks and their parts: the two forms of a block, RoPE, the ViT."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers import (
    Attention,
    Block,
    DropPath,
    GridContext,
    LayerScale,
    Mlp,
    PatchEmbed,
    PositionGetter,
    RotaryPositionEmbedding2D,
    SwiGLUFFN,
)
from vggt_mv.layers.block import run_block
from vggt_mv.layers.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small

GRID_HW, SPECIAL = (2, 3), 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _positions() -> torch.Tensor:
    patches = PositionGetter()(1, *GRID_HW, "cpu")[0] + 1
    return torch.cat([torch.zeros(SPECIAL, 2, dtype=patches.dtype), patches])


def _context(axis: str) -> GridContext:
    return GridContext(axis=axis, grid_hw=GRID_HW, num_special=SPECIAL)


def _sequences(x: torch.Tensor, axis: str) -> tuple[torch.Tensor, int]:
    """Grid [B,T,N,P,C] -> sequences [*, L, C] along an axis, and the frames in each."""
    b, t, n, p, c = x.shape
    if axis == "time":
        return x.transpose(1, 2).reshape(b * n, t * p, c), t
    joined = {"frame": 1, "view": n, "global": t * n}[axis]
    return x.reshape(-1, joined * p, c), joined


# Attention and Block


@pytest.mark.parametrize("axis", ["frame", "view", "time", "global"])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "no_qk_norm"])
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no_rope"])
def test_a_block_on_the_grid_is_the_block_on_its_sequences(randomize, rel, axis, qk_norm, rope):
    block = Block(16, 2, init_values=0.1, qk_norm=qk_norm, rope=RotaryPositionEmbedding2D() if rope else None)
    randomize(block)
    x = torch.randn(2, 2, 3, SPECIAL + 6, 16)
    y, normed = block(x, grid=_context(axis))
    assert normed is None
    sequences, joined = _sequences(x, axis)
    expected = block(sequences, _positions().repeat(joined, 1).expand(len(sequences), -1, -1))
    assert rel(_sequences(y, axis)[0], expected) < 1e-6


@torch.no_grad()
def test_what_hooks_hold_is_left_alone(randomize, rel):
    """In inference a block writes over what its own parts gave, but not where somebody may still look at it."""
    block = Block(16, 2, init_values=0.1, qk_norm=True, rope=RotaryPositionEmbedding2D())
    randomize(block)
    x = torch.randn(2, 2, 3, SPECIAL + 6, 16)
    kept = x.clone()
    plain, _ = block(x, grid=_context("view"), normed=None, next_norm=block.norm1)
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    parts = (block.attn, block.attn.qkv, block.attn.proj, block.mlp, block.mlp.fc2)
    hooks = [p.register_forward_hook(lambda m, _, out: seen.__setitem__(m, (out, out.clone()))) for p in parts]
    hooked, _ = block(x, grid=_context("view"), normed=None, next_norm=block.norm1)
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(parts)
    assert all(torch.equal(now, then) for now, then in seen.values())
    assert rel(hooked, plain) < 1e-6
    assert torch.equal(x, kept)


@pytest.mark.parametrize("norm_layer", [nn.LayerNorm, partial(nn.LayerNorm, eps=1e-3), nn.RMSNorm], ids=str)
@pytest.mark.parametrize("init_values", [0.1, None])
def test_a_chain_of_blocks_hands_on_the_next_norm(randomize, rel, norm_layer, init_values):
    blocks = [randomize(Block(16, 2, init_values=init_values, norm_layer=norm_layer), seed) for seed in range(3)]
    x = expected = torch.randn(1, 1, 2, SPECIAL + 6, 16)
    normed = None
    for i, block in enumerate(blocks):
        next_norm = blocks[i + 1].norm1 if i < 2 else None
        x, normed = block(x, grid=_context("view"), normed=normed, next_norm=next_norm)
        # The block by its formula, module by module.
        flat = expected.reshape(1, -1, 16)
        flat = flat + block.ls1(block.attn(block.norm1(flat)))
        expected = (flat + block.ls2(block.mlp(block.norm2(flat)))).view_as(expected)
        assert rel(x, expected) < 1e-6
        if next_norm is not None:
            assert rel(normed, next_norm(expected)) < 1e-6
    assert normed is None


def test_the_residual_stream_keeps_its_dtype_under_autocast(randomize):
    block = randomize(Block(16, 2, init_values=0.1, qk_norm=True, rope=RotaryPositionEmbedding2D()))
    x = torch.randn(1, 2, 2, SPECIAL + 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, normed = block(x, grid=_context("time"), next_norm=nn.LayerNorm(16))
    assert y.dtype == torch.float32
    assert normed.dtype == torch.bfloat16
    exact = block(x, grid=_context("time"))[0]
    assert ((y - exact).norm() / exact.norm()).item() < 1e-2


def test_checkpointing_changes_no_gradient(randomize):
    grads = []
    for checkpoint in (False, True):
        block = randomize(Block(16, 2, init_values=0.1, qk_norm=True, rope=RotaryPositionEmbedding2D()))
        x = torch.randn(1, 2, 2, SPECIAL + 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, _ = run_block(block, x, _context("time"), normed=None, next_norm=None, checkpoint=checkpoint)
        y.sin().sum().backward()
        grads.append([x.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_on_linears_and_blocks_fire_on_the_grid():
    block, seen = Block(16, 2, init_values=0.1), []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Attention | Mlp | Block):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    block(torch.randn(1, 1, 1, SPECIAL + 6, 16), grid=_context("frame"), next_norm=nn.LayerNorm(16))
    assert seen == ["attn.qkv", "attn.proj", "attn", "mlp.fc1", "mlp.fc2", "mlp", ""]


def test_the_mlp_runs_by_pieces_where_no_gradient_is_recorded(randomize, rel, monkeypatch):
    """The widest tensor of a block has the rows of a piece; recorded or hooked, the MLP runs whole."""
    block = randomize(Block(16, num_heads=2, init_values=0.1))
    x = torch.randn(2, 3, 1, 7, 16)  # 42 tokens
    context = GridContext(axis="view", grid_hw=(1, 5), num_special=2)

    def run() -> tuple[torch.Tensor, list[int]]:
        rows: list[int] = []
        hook = block.mlp.fc1.register_forward_hook(lambda module, inputs, out: rows.append(out.numel() // 64))
        y, _ = block(x, grid=context, normed=None, next_norm=None)
        hook.remove()
        return y, rows

    whole, rows = run()
    assert rows == [42]
    monkeypatch.setattr("vggt_mv.layers.block.MLP_TOKENS", 20)
    assert run()[1] == [42]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, rows = run()
        assert rows == [20, 20, 2]
        assert rel(y, whole.detach()) < 1e-6
    seen = []
    block.mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    with torch.no_grad():
        assert run()[1] == [42]
    assert seen == [x.shape]


def test_what_the_qkv_linear_wrote_is_overwritten_unless_somebody_looks(randomize, rel):
    attention = randomize(Attention(64, num_heads=2, qk_norm=True, rope=RotaryPositionEmbedding2D()))
    x = torch.randn(1, 1, 2, SPECIAL + 6, 64)
    context = GridContext(axis="view", grid_hw=GRID_HW, num_special=SPECIAL)
    recorded = attention(x, grid=context).detach()
    seen = []
    with torch.no_grad():
        assert rel(attention(x, grid=context), recorded) < 1e-6
        hook = attention.qkv.register_forward_hook(lambda module, inputs, out: seen.append((out, out.clone())))
        assert rel(attention(x, grid=context), recorded) < 1e-6
        hook.remove()
    assert torch.equal(*seen[0])


def test_stochastic_depth_is_left_to_the_plain_form(randomize):
    block = randomize(Block(16, 2, init_values=0.1, drop_path=0.9))
    x = torch.randn(64, 1, 1, SPECIAL + 6, 16)
    block.train()
    y, _ = block(x, grid=_context("frame"), next_norm=nn.LayerNorm(16))
    untouched = (y == x).flatten(1).all(dim=1).float().mean().item()
    assert 0.6 < untouched < 0.98  # 0.81 expected: both branches dropped
    block.eval()
    assert not (block(x, grid=_context("frame"))[0] == x).flatten(1).all(dim=1).any()


def test_drop_path_keeps_the_mean():
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 3))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match=r"drop_prob must lie in \[0, 1\), got 1.0"):
        DropPath(1.0)


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "explicit"])
def test_attention_is_its_formula(randomize, rel, fused):
    attn = randomize(Attention(16, num_heads=2, qk_norm=True, rope=RotaryPositionEmbedding2D(), fused_attn=fused))
    x, pos = torch.randn(3, SPECIAL + 6, 16), _positions().expand(3, -1, -1)
    qkv = attn.qkv(x).unflatten(-1, (3, 2, 8))
    heads = []
    for h in range(2):
        q, k, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        q = attn.rope(attn.q_norm(q)[:, None], pos)[:, 0]
        k = attn.rope(attn.k_norm(k)[:, None], pos)[:, 0]
        heads.append((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v)
    assert rel(attn(x, pos), attn.proj(torch.cat(heads, dim=-1))) < 1e-6


def test_attention_refuses_what_it_cannot_do():
    with pytest.raises(VggtMvError, match="dim must be a multiple of num_heads = 3, got 16"):
        Attention(16, num_heads=3)
    x = torch.randn(1, 1, 1, SPECIAL + 6, 16)
    with pytest.raises(VggtMvError, match=r"attn_drop must be 0 on the token grid, got 0.5"):
        Attention(16, 2, attn_drop=0.5).train()(x, grid=_context("frame"))
    rope = RotaryPositionEmbedding2D(scaling_factor=2.0)
    with pytest.raises(VggtMvError, match="with scaling_factor=1 on the token grid"):
        Attention(16, 2, rope=rope)(x, grid=_context("frame"))


# RoPE


def test_rope_is_a_rotation_that_knows_differences_only(rel):
    rope = RotaryPositionEmbedding2D(frequency=100.0)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def at(x, row, column):
        return rope(x, torch.tensor([[[row, column]]]))

    assert torch.equal(at(q, 0, 0), q)
    assert rel(at(q, 3, 7).norm(), q.norm()) < 1e-12
    here, there = (at(q, 2, 9) * at(k, 5, 4)).sum(), (at(q, 12, 14) * at(k, 15, 9)).sum()
    assert rel(here, there) < 1e-12
    # The first half turns with the row, the second with the column.
    assert torch.equal(at(q, 5, 0)[..., 8:], q[..., 8:])
    assert torch.equal(at(q, 0, 5)[..., :8], q[..., :8])


def test_rope_by_its_formula():
    x = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    y = RotaryPositionEmbedding2D(100.0)(x, torch.tensor([[[2, 3]]])).flatten()
    for half, p in ((0, 2.0), (4, 3.0)):
        for j in range(2):
            angle = p * 100.0 ** (-2 * j / 4)
            a, b = x.flatten()[half + j].item(), x.flatten()[half + j + 2].item()
            assert y[half + j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert y[half + j + 2].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)


def test_rope_in_low_precision_computes_in_float32(rel):
    rope, pos = RotaryPositionEmbedding2D(), torch.tensor([[[36, 36]]])
    x = torch.randn(1, 2, 1, 16)
    y = rope(x.bfloat16(), pos)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rope(x.bfloat16().float(), pos).bfloat16())


def test_rope_and_positions_refuse_other_shapes():
    with pytest.raises(VggtMvError, match="width that is a multiple of 4, got 6"):
        RotaryPositionEmbedding2D()(torch.zeros(1, 1, 1, 6), torch.zeros(1, 1, 2))
    with pytest.raises(VggtMvError, match=r"positions must be \[B, L, 2\] \(row, column\), got \[1, 2\]"):
        RotaryPositionEmbedding2D()(torch.zeros(1, 1, 1, 8), torch.zeros(1, 2))
    assert PositionGetter()(2, 2, 3, "cpu").tolist()[1] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


# The small parts


def test_layer_scale_and_mlp():
    x = torch.randn(2, 4)
    scale = LayerScale(4, init_values=0.25)
    assert torch.equal(scale(x), 0.25 * x)
    y = x.clone()
    with torch.no_grad():
        LayerScale(4, init_values=0.25, inplace=True)(y)
    assert torch.equal(y, 0.25 * x)
    mlp = Mlp(4, 8, 6)
    expected = mlp.fc2(0.5 * mlp.fc1(x) * (1 + torch.erf(mlp.fc1(x) / math.sqrt(2))))
    torch.testing.assert_close(mlp(x), expected)
    assert Mlp(4, bias=False).fc1.bias is None


def test_swiglu_is_its_formula():
    ffn, x = SwiGLUFFN(12, 48), torch.randn(2, 12)
    assert ffn.w12.weight.shape == (64, 12)
    assert ffn.w3.weight.shape == (12, 32)
    gate, value = ffn.w12(x)[:, :32], ffn.w12(x)[:, 32:]
    torch.testing.assert_close(ffn(x), ffn.w3(gate * torch.sigmoid(gate) * value))
    with pytest.raises(ValueError, match=r"drop must be 0, got 0.1"):
        SwiGLUFFN(12, drop=0.1)


def test_patch_embed_goes_row_by_row():
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=5, norm_layer=nn.LayerNorm)
    assert embed.num_patches == 4
    images = torch.randn(2, 3, 28, 42)
    tokens = embed(images)
    patch = images[:, :, 14:, 28:]  # the last of 2 x 3
    expected = embed.norm(F.conv2d(patch, embed.proj.weight, embed.proj.bias).flatten(1))
    torch.testing.assert_close(tokens[:, 5], expected)
    unflattened = PatchEmbed(patch_size=14, embed_dim=5, flatten_embedding=False)(images)
    assert unflattened.shape == (2, 2, 3, 5)
    with pytest.raises(VggtMvError, match=r"multiples of \(14, 14\), got 28 x 40"):
        embed(images[..., :40])


# The ViT


def _vit(**options):
    size = {"img_size": 42, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1.0}
    return DinoVisionTransformer(**{**size, "block_chunks": 0, "num_register_tokens": 2, **options})


def test_the_vit_is_its_formula(randomize, rel):
    vit = randomize(_vit(interpolate_offset=0.0)).eval()
    images = torch.randn(2, 3, 42, 42)
    x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], dim=1) + vit.pos_embed
    x = torch.cat([x[:, :1], vit.register_tokens.expand(2, -1, -1), x[:, 1:]], dim=1)
    for block in vit.blocks:
        assert block.norm1.eps == 1e-6
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    normed = F.layer_norm(x, (16,), vit.norm.weight, vit.norm.bias, eps=1e-6)
    out = vit(images)
    assert rel(out["x_prenorm"], x) < 1e-6
    assert rel(out["x_norm_clstoken"], normed[:, 0]) < 1e-6
    assert rel(out["x_norm_regtokens"], normed[:, 1:3]) < 1e-6
    assert rel(out["x_norm_patchtokens"], normed[:, 3:]) < 1e-6
    assert out["masks"] is None


def test_the_position_embedding_of_another_grid(randomize, rel):
    vit = randomize(_vit(interpolate_offset=0.0, interpolate_antialias=True))
    assert vit.interpolate_pos_encoding(3, 3) is vit.pos_embed
    grid = vit.pos_embed[:, 1:].view(1, 3, 3, 16).permute(0, 3, 1, 2)
    for size in ((2, 5), (1, 1), (5, 3)):
        resized = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
        expected = torch.cat([vit.pos_embed[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        assert rel(vit.interpolate_pos_encoding(*size), expected) < 1e-6
    # In bfloat16 it is resized in float32 all the same.
    low = _vit(interpolate_offset=0.0).bfloat16()
    low.pos_embed.data = vit.pos_embed.data.bfloat16()
    exact = F.interpolate(grid.bfloat16().float(), size=(2, 5), mode="bicubic").bfloat16()
    assert torch.equal(low.interpolate_pos_encoding(2, 5)[:, 1:], exact.permute(0, 2, 3, 1).flatten(1, 2))
    # With an offset the factor, not the size, says where to sample.
    offset = randomize(_vit(interpolate_offset=0.1))
    shifted = F.interpolate(grid, scale_factor=(2.1 / 3, 5.1 / 3), mode="bicubic")
    assert rel(offset.interpolate_pos_encoding(2, 5)[:, 1:], shifted.permute(0, 2, 3, 1).flatten(1, 2)) < 1e-6


def test_hidden_patches_take_the_mask_token(randomize):
    vit = randomize(_vit()).eval()
    images = torch.randn(1, 3, 42, 42)
    masks = torch.zeros(1, 9, dtype=torch.bool)
    masks[0, 4] = True
    hidden, changed = vit(images, masks), images.clone()
    changed[:, :, 14:28, 14:28] = 0.5
    assert torch.equal(vit(changed, masks)["x_prenorm"], hidden["x_prenorm"])
    assert not torch.equal(vit(images)["x_prenorm"], hidden["x_prenorm"])


def test_nested_blocks_compute_the_same(randomize, rel):
    flat, nested = randomize(_vit(depth=4)).eval(), _vit(depth=4, block_chunks=2).eval()
    keys = {k.removeprefix("blocks."): k for k in nested.state_dict() if k.startswith("blocks.")}
    assert {k.split(".")[0] + "." + k.split(".")[1] for k in keys} == {"0.0", "0.1", "1.2", "1.3"}
    chunk = {0: 0, 1: 0, 2: 1, 3: 1}
    state = {
        (f"blocks.{chunk[int(k.split('.')[1])]}.{k.removeprefix('blocks.')}" if k.startswith("blocks.") else k): v
        for k, v in flat.state_dict().items()
    }
    nested.load_state_dict(state)
    images = torch.randn(1, 3, 28, 42)
    assert rel(nested(images)["x_prenorm"], flat(images)["x_prenorm"]) < 1e-6
    assert set(_vit(block_chunks=1).state_dict()) >= {"blocks.0.0.norm1.weight", "blocks.0.1.norm1.weight"}


def test_vit_options(randomize):
    assert _vit(num_register_tokens=0).register_tokens is None
    images = torch.randn(2, 3, 28, 28)
    assert _vit(num_register_tokens=0)(images)["x_norm_regtokens"].shape == (2, 0, 16)
    assert {"blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"} <= set(_vit(ffn_layer="swiglu").state_dict())
    assert [b.drop_path1.drop_prob for b in _vit(depth=3, drop_path_rate=0.2).blocks] == pytest.approx([0, 0.1, 0.2])
    uniform = _vit(depth=3, drop_path_rate=0.2, drop_path_uniform=True)
    assert [b.drop_path2.drop_prob for b in uniform.blocks] == [0.2] * 3
    trained = _vit(drop_path_rate=0.5).train()
    assert trained(images)["x_norm_patchtokens"].isfinite().all()
    with pytest.raises(VggtMvError, match=r"ffn_layer must be one of .* got 'relu'"):
        _vit(ffn_layer="relu")


@pytest.mark.parametrize(
    ("make", "width", "depth", "heads"),
    [(vit_small, 384, 12, 6), (vit_base, 768, 12, 12), (vit_large, 1024, 24, 16), (vit_giant2, 1536, 40, 24)],
)
def test_vit_sizes(make, width, depth, heads):
    with torch.device("meta"):
        vit = make(patch_size=14, num_register_tokens=4, img_size=518)
    assert (vit.embed_dim, len(vit.blocks[0]), vit.blocks[0][0].attn.num_heads) == (width, depth, heads)
    assert vit.pos_embed.shape == (1, 1370, width)
    assert vit.register_tokens.shape == (1, 4, width)


def test_vit_initialisation():
    vit = _vit(embed_dim=64, img_size=140)
    weight = vit.blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert weight.mean().abs() < 1e-3
    assert not vit.blocks[0].mlp.fc1.bias.any()
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0 < vit.register_tokens.abs().max() < 1e-5


@torch.no_grad()
def test_the_fused_gelu_is_the_activation(linear_layers):
    mlp = Mlp(16, 24)
    x = torch.randn(2, 70, 16)
    fused = mlp(x)
    seen = []
    handle = mlp.act.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    apart = mlp(x)
    handle.remove()
    ((before, after),) = seen
    assert torch.allclose(fused, apart, rtol=1e-5, atol=1e-6)
    assert torch.equal(before, mlp.fc1(x)) and torch.equal(after, nn.functional.gelu(before))
    for other in (nn.GELU(approximate="tanh"), nn.ReLU()):
        mlp.act = other
        assert torch.equal(mlp(x), mlp.fc2(other(mlp.fc1(x))))
    mlp = Mlp(16, 24)
    mlp.fc1 = nn.Linear(16, 24)  # as adapters and quantizers put another module into a layer's place
    assert torch.allclose(mlp(x), mlp.fc2(nn.functional.gelu(mlp.fc1(x))), rtol=1e-5, atol=1e-6)


def test_under_autocast_the_residual_stream_is_float32_and_norms_write_bfloat16():
    block = Block(32, 2, init_values=0.5).eval()
    seen = {}
    for name in ("norm1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        block.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0].dtype, output.dtype)})
        )
    context = GridContext(axis="frame", grid_hw=(7, 10), num_special=1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        x, normed = block(torch.randn(1, 1, 1, 71, 32), grid=context, normed=None, next_norm=nn.LayerNorm(32))
    assert x.dtype == torch.float32 and normed.dtype == torch.bfloat16
    bf16 = torch.bfloat16
    assert seen["norm1"] == (torch.float32, torch.float32)  # of the first block alone; the others get theirs normed
    assert all(seen[name] == (bf16, bf16) for name in ("attn.proj", "mlp.fc1", "mlp.fc2"))
