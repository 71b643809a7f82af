"""The aggregator on the token grid against a plain implementation that gathers every sequence, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.rope import PositionGetter
from vggt_mv.models.aggregator import Aggregator

TOLERANCE = 2e-6  # float32, eight blocks; measured below 5e-7


def _images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _plain_block(block, x, pos, bias, gate):
    """A block on sequences [B, L, C], its attention matrix written out; bias [B, L] of keys, gate [L] of queries."""
    batch, length, dim = x.shape
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.rope is not None:
        q, k = attn.rope(q, pos), attn.rope(k, pos)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + gate[None, None, :, None] * bias[:, None, None, :]
    y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim)
    x = x + block.ls1.gamma * attn.proj(y)
    return x + block.ls2.gamma * block.mlp(block.norm2(x))


def _plain_aggregator(model, images, order, mask=None, special=0, block_size=1):
    """Outputs for images [B,T,N,3,H,W]; mask [B,T,N,h,w]: bias -0.5 m in attentions over several frames."""
    batch, times, views, _, height, width = images.shape
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    patches = model.patch_embed((images.flatten(0, 2) - mean) / std)
    patches = patches["x_norm_patchtokens"] if isinstance(patches, dict) else patches
    patches = patches.view(batch, times, views, -1, model.embed_dim)
    num_special = 1 + model.num_register_tokens
    x = torch.empty(batch, times, views, num_special + patches.shape[3], model.embed_dim)
    for t in range(times):
        for n in range(views):
            variant = 0 if t == n == 0 else 1
            x[:, t, n, 0] = model.camera_token[0, variant, 0]
            x[:, t, n, 1:num_special] = model.register_token[0, variant]
    x[:, :, :, num_special:] = patches
    p = x.shape[3]
    pos = torch.full((p, 2), special)
    pos[num_special:] = PositionGetter()(1, height // 14, width // 14, "cpu")[0] + 1
    gate = (torch.arange(p) < num_special).float()
    bias = torch.zeros(batch, times, views, p)
    if mask is not None:
        bias[..., num_special:] = -0.5 * mask.flatten(-2)
    halves = {}
    for start in range(0, model.depth, block_size):
        for kind in order:
            for i in range(start, start + block_size):
                joined = views if kind == "view" else times
                if kind == "view":
                    tokens, keys = x.reshape(batch * times, views * p, -1), bias.reshape(batch * times, views * p)
                else:
                    tokens = x.transpose(1, 2).reshape(batch * views, times * p, -1)
                    keys = bias.transpose(1, 2).reshape(batch * views, times * p)
                block = (model.global_blocks if kind == "view" else model.frame_blocks)[i]
                keys = keys if joined > 1 else torch.zeros_like(keys)
                y = _plain_block(
                    block, tokens, pos.repeat(joined, 1).expand(len(tokens), -1, -1), keys, gate.repeat(joined)
                )
                if kind == "view":
                    x = y.view(batch, times, views, p, -1)
                else:
                    x = y.view(batch, views, times, p, -1).transpose(1, 2)
                halves[kind, i] = x
    return [torch.cat([halves["time", i], halves["view", i]], dim=-1) for i in range(model.depth)]


def _assert_close(actual, expected, rel):
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert rel(a, e) < TOLERANCE, f"output {i}: {rel(a, e)}"


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 28, 28), (1, 1, 3, 28, 28), (1, 3, 1, 28, 28), (2, 2, 3, 42, 28)],
    ids=["one_frame", "one_time", "one_view", "B2_T2_N3_not_square"],
)
@pytest.mark.parametrize("order", [["view", "time"], ["time", "view"]], ids=["view_first", "time_first"])
@torch.no_grad()
def test_times_by_views_is_the_plain_form(tiny_aggregator, rel, shape, order):
    model = tiny_aggregator(aa_order=order)
    images = _images(*shape[:3], 3, *shape[3:])
    outputs, patch_start_idx = model(images)
    assert patch_start_idx == 5
    _assert_close(outputs, _plain_aggregator(model, images, order), rel)


@pytest.mark.parametrize(
    "options", [{"qk_norm": False}, {"rope_freq": 0}, {"rope_freq": None, "qk_norm": False}], ids=str
)
@torch.no_grad()
def test_without_qk_norm_or_rope(tiny_aggregator, rel, options):
    model = tiny_aggregator(**options)
    images = _images(1, 2, 2, 3, 28, 42)
    if not options.get("qk_norm", True):
        assert not any("q_norm" in key for key in model.frame_blocks.state_dict())
    _assert_close(model(images)[0], _plain_aggregator(model, images, ("view", "time")), rel)


@torch.no_grad()
def test_blocks_of_one_kind_run_in_a_row(tiny_aggregator, rel):
    model = tiny_aggregator(aa_block_size=2)
    images = _images(1, 2, 2, 3, 28, 28)
    _assert_close(model(images)[0], _plain_aggregator(model, images, ("view", "time"), block_size=2), rel)


@pytest.mark.parametrize("registers", [0, 1, 7])
@torch.no_grad()
def test_any_number_of_register_tokens(tiny_aggregator, rel, registers):
    model = tiny_aggregator(num_register_tokens=registers)
    images = _images(1, 2, 2, 3, 28, 28)
    outputs, patch_start_idx = model(images)
    assert patch_start_idx == 1 + registers
    _assert_close(outputs, _plain_aggregator(model, images, ("view", "time")), rel)


@torch.no_grad()
def test_first_patch_position_is_for_times_by_views_only(tiny_aggregator, rel):
    model = tiny_aggregator(special_token_position="first_patch")
    images = _images(1, 2, 2, 3, 28, 42)
    _assert_close(model(images)[0], _plain_aggregator(model, images, ("view", "time"), special=1), rel)
    at_origin = tiny_aggregator()
    sequence = images.flatten(1, 2)
    _assert_close(model(sequence)[0], at_origin(sequence)[0], rel)


@torch.no_grad()
def test_a_sequence_is_the_grid_of_one_time(tiny_aggregator, rel):
    images = _images(2, 3, 3, 28, 42)
    sequence, grid = tiny_aggregator(), tiny_aggregator(aa_order=["time", "view"])
    outputs = sequence(images)[0]
    assert outputs[0].shape == (2, 3, 5 + 6, 64)
    _assert_close(outputs, [x[:, 0] for x in grid(images[:, None])[0]], rel)
    plain = _plain_aggregator(sequence, images[:, None], ("time", "view"))
    _assert_close(outputs, [x[:, 0] for x in plain], rel)


@torch.no_grad()
def test_four_dimensions_are_a_batch_of_one(tiny_aggregator):
    model, images = tiny_aggregator(), _images(3, 3, 28, 42)
    for a, b in zip(model(images)[0], model(images[None])[0], strict=True):
        assert a.shape == (1, 3, 5 + 6, 64)
        assert torch.equal(a, b)


@pytest.mark.parametrize("grid", [(3,), (2, 2)], ids=["sequence", "times_by_views"])
@torch.no_grad()
def test_scenes_of_a_batch_do_not_see_each_other(tiny_aggregator, rel, grid):
    model, images = tiny_aggregator(), _images(2, *grid, 3, 28, 28)
    single = [model(images[b : b + 1])[0] for b in range(2)]
    _assert_close(model(images)[0], [torch.cat(pair) for pair in zip(*single, strict=True)], rel)


@torch.no_grad()
def test_both_vocabularies_and_what_is_meant_by_default(tiny_aggregator):
    grid, sequence = _images(1, 2, 3, 3, 28, 28), _images(1, 3, 3, 28, 28)

    def last(images, **options):
        return tiny_aggregator(**options)(images)[0][-1]

    # Times x views: frame means time, global means view; view comes first unless something is said.
    assert torch.equal(last(grid), last(grid, aa_order=["view", "time"]))
    assert torch.equal(last(grid, aa_order=["frame", "global"]), last(grid, aa_order=["time", "view"]))
    assert torch.equal(last(grid, aa_order=["global", "frame"]), last(grid))
    assert not torch.equal(last(grid, aa_order=["time", "view"]), last(grid))
    # Sequences: frame first, unless the order is given in these names.
    for order in (["frame", "global"], ["view", "time"], ["time", "view"]):
        assert torch.equal(last(sequence, aa_order=order), last(sequence))
    assert not torch.equal(last(sequence, aa_order=["global", "frame"]), last(sequence))


@torch.no_grad()
def test_outputs_that_nobody_wants_are_none(tiny_aggregator):
    model, images = tiny_aggregator(), _images(1, 2, 2, 3, 28, 28)
    everything = model(images)[0]
    kept = model(images, keep_outputs=[3, 1])[0]
    assert [x is None for x in kept] == [True, False, True, False]
    assert torch.equal(kept[1], everything[1])
    assert torch.equal(kept[3], everything[3])
    assert model(images, keep_outputs=())[0] == [None] * 4
    with pytest.raises(VggtMvError, match=r"keep_outputs must be indices in 0\.\.3, got \[4\]"):
        model(images, keep_outputs=[4])


@torch.no_grad()
def test_progress_is_told_step_by_step(tiny_aggregator):
    calls = []
    tiny_aggregator()(_images(1, 2, 3, 28, 28), on_stage=lambda *call: calls.append(call))
    assert calls == [("patch_embed", i, 2) for i in range(3)] + [("attention", i, 8) for i in range(9)]
    calls.clear()
    tiny_aggregator(patch_embed="conv", patch_embed_options={})(
        _images(1, 2, 3, 28, 28), on_stage=lambda *call: calls.append(call)
    )
    assert calls[:2] == [("patch_embed", 0, 1), ("patch_embed", 1, 1)]


@torch.no_grad()
def test_patch_embedding_by_convolution_or_by_module(tiny_aggregator, rel):
    images = _images(1, 2, 2, 3, 28, 42)
    conv = tiny_aggregator(patch_embed="conv", patch_embed_options={})
    assert {k for k in conv.state_dict() if k.startswith("patch_embed")} == {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    outputs = conv(images)[0]
    _assert_close(outputs, _plain_aggregator(conv, images, ("view", "time")), rel)

    class Patches(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, dim, kernel_size=14, stride=14)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    own = tiny_aggregator(patch_embed=Patches(32), patch_embed_options={})
    own.load_state_dict(conv.state_dict())
    _assert_close(own(images)[0], outputs, rel)
    with pytest.raises(VggtMvError, match=r"patch_embed must return \[4, 6, 32\] for these images, got \[4, 6, 16\]"):
        tiny_aggregator(patch_embed=Patches(16), patch_embed_options={})(images)


# The dynamic mask


@pytest.mark.parametrize("grid", [(2, 2, 3), (1, 3, 1), (1, 1, 2), (1, 1, 1)], ids=str)
@torch.no_grad()
def test_a_given_mask_biases_the_keys_of_what_moves(tiny_aggregator, rel, grid):
    model = tiny_aggregator()
    images, mask = _images(*grid, 3, 28, 42), _images(*grid, 28, 42, seed=1)
    means = mask.view(*grid, 2, 14, 3, 14).mean(dim=(-3, -1))
    outputs = model(images, dynamic_mask=mask)[0]
    _assert_close(outputs, _plain_aggregator(model, images, ("view", "time"), mask=means), rel)
    difference = rel(outputs[-1], model(images)[0][-1])
    # One frame joins nothing, and a mask does nothing there.
    assert difference > 1e-5 if max(grid[1:]) > 1 else difference == 0


@torch.no_grad()
def test_a_given_mask_on_sequences_and_its_dtypes(tiny_aggregator, rel):
    model = tiny_aggregator()
    images, mask = _images(1, 3, 3, 28, 28), _images(1, 3, 28, 28, seed=1) > 0.5
    outputs = model(images, dynamic_mask=mask)[0]
    means = mask.float().view(1, 1, 3, 2, 14, 2, 14).mean(dim=(-3, -1))
    plain = _plain_aggregator(model, images[:, None], ("time", "view"), mask=means)
    _assert_close(outputs, [x[:, 0] for x in plain], rel)
    _assert_close(model(images[0], dynamic_mask=mask[0].float())[0], outputs, rel)
    still = model(images, dynamic_mask=torch.zeros_like(mask))[0]
    _assert_close(still, model(images)[0], rel)


@torch.no_grad()
def test_of_a_given_and_a_predicted_mask_the_larger_acts(tiny_aggregator, rel):
    model = tiny_aggregator(enable_spatial_mask=True, mask_layer=1)
    images = _images(1, 3, 3, 28, 28)
    predicted = model(images)[2]["dynamic_mask"]
    assert predicted.shape == (1, 3, 2, 2)
    assert predicted.min() > 0
    assert predicted.max() <= 1

    def as_pixels(mask):
        return mask.repeat_interleave(14, -1).repeat_interleave(14, -2)

    # Smaller than the predicted one in the first frame, larger in the second.
    given = predicted * torch.tensor([0.5, 1.5, 1.0]).view(1, 3, 1, 1)
    outputs, _, extras = model(images, dynamic_mask=as_pixels(given.clamp(max=1)))
    blocks = _masked_rounds(model, images[:, None], given.clamp(max=1)[:, None], extras["dynamic_mask"][:, None])
    _assert_close(outputs, [x[:, 0] for x in blocks], rel)


def _masked_rounds(model, images, given, predicted):
    """The plain form in two parts: the given mask in rounds 0 and 1, the larger of both in rounds 2 and 3."""
    first = _plain_aggregator(model, images, ("time", "view"), mask=given)
    # Rounds from 2 on start from the view half of output 1: run a model of those rounds on these tokens.
    x = first[1][..., model.embed_dim :]
    batch, _, views, p, _ = x.shape
    bias = torch.zeros(batch, views * p).view(batch, views, p)
    bias[..., 5:] = -0.5 * torch.maximum(given, predicted).flatten(-2)[:, 0]
    pos = torch.zeros(p, 2, dtype=torch.long)
    pos[5:] = PositionGetter()(1, *given.shape[-2:], "cpu")[0] + 1
    gate = (torch.arange(p) < 5).float()
    outputs = first[:2]
    for i in (2, 3):
        frames = x.reshape(batch * views, p, -1)
        time = _plain_block(
            model.frame_blocks[i], frames, pos.expand(len(frames), -1, -1), torch.zeros(len(frames), p), gate
        )
        tokens = time.view(batch, views * p, -1)
        x = _plain_block(
            model.global_blocks[i], tokens, pos.repeat(views, 1)[None], bias.view(batch, -1), gate.repeat(views)
        ).view(batch, 1, views, p, -1)
        outputs.append(torch.cat([time.view(x.shape), x], dim=-1))
    return outputs


@torch.no_grad()
def test_the_predicted_mask_does_not_act_on_times_by_views(tiny_aggregator, rel):
    masked, plain = tiny_aggregator(enable_spatial_mask=True, mask_layer=1), tiny_aggregator()
    plain.load_state_dict({k: v for k, v in masked.state_dict().items() if not k.startswith("spatial_mask_head")})
    images = _images(1, 2, 2, 3, 28, 28)
    outputs, _, extras = masked(images)
    assert extras is None
    _assert_close(outputs, plain(images)[0], rel)
    sequence = images.flatten(1, 2)
    assert rel(masked(sequence)[0][-1], plain(sequence)[0][-1]) > 1e-5


@torch.no_grad()
def test_the_spatial_mask_head_is_its_formula(tiny_aggregator, rel):
    head = tiny_aggregator(enable_spatial_mask=True, mask_layer=1).spatial_mask_head
    tokens = torch.randn(2, 3, 5 + 6, 32, generator=torch.Generator().manual_seed(0))
    maps = tokens[:, :, 5:].reshape(6, 2, 3, 32).permute(0, 3, 1, 2)
    z = head.head0(maps).view(2, 3, 2, 3)
    tau = torch.log1p(head.tau_logit.exp()) + 1e-6
    alpha = torch.log1p(head.alpha_logit.exp()) + 1e-6
    expected = (alpha / (1 + (z / tau).exp())).clamp(0, 1)
    assert rel(head(tokens, (2, 3), 5), expected) < 1e-6


def test_the_spatial_mask_head_starts_where_it_should():
    head = Aggregator(
        embed_dim=32, num_heads=2, patch_embed="conv", enable_spatial_mask=True, depth=8
    ).spatial_mask_head
    assert torch.nn.functional.softplus(head.alpha_logit).item() == pytest.approx(0.6931, abs=1e-4)
    assert torch.nn.functional.softplus(head.tau_logit).item() == pytest.approx(1.0986, abs=1e-4)


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5, "aa_block_size": 2}, r"depth must be a positive multiple of aa_block_size, got depth = 5 and"),
        ({"depth": 0}, r"got depth = 0"),
        ({"enable_spatial_mask": True}, r"mask_layer must lie in 0\.\.depth-1 = 0\.\.3 or be None, got 7"),
        (
            {"special_token_position": "corner"},
            r"special_token_position must be 'origin' or 'first_patch', got 'corner'",
        ),
        ({"num_heads": 5}, r"embed_dim must be num_heads = 5 times a head width"),
        ({"num_heads": 16}, r"multiple of 4 \(rope_freq > 0\), got 32"),
        ({"aa_order": ["frame", "view"]}, r"aa_order must hold .* each once .* got \['frame', 'view'\]"),
        ({"aa_order": ["view"]}, r"got \['view'\]"),
        ({"patch_embed": "dinov3"}, r"patch_embed must be one of dinov2_vitl14_reg, .* got 'dinov3'"),
        ({"patch_embed_options": {"dept": 2}}, r"unknown option 'dept'; the nearest known one is 'depth'"),
        ({"patch_embed_options": {}}, r"'dinov2_vits14_reg' gives 384; take another one or set patch_embed_options={"),
        ({"patch_embed": nn.Identity()}, r"patch_embed_options must be empty where patch_embed is a module"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(tiny_aggregator, options, message):
    with pytest.raises(VggtMvError, match=message):
        tiny_aggregator(**options)


def test_a_mask_of_another_shape_is_refused(tiny_aggregator):
    message = r"dynamic_mask must have the shape of images without the channels, \[1, 2, 28, 28\], got \[1, 2, 2, 2\]"
    with pytest.raises(VggtMvError, match=message):
        tiny_aggregator()(_images(1, 2, 3, 28, 28), dynamic_mask=torch.zeros(1, 2, 2, 2))
