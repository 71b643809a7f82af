"""Sparse global attention: against the rounds written out, the exchange by itself, its options and its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model import plain_streams
from vggt_mv.errors import VggtMvError
from vggt_mv.layers.grid import GridContext
from vggt_mv.models import sparse_global
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.sparse_global import STRATEGIES, SparseGlobal, dilated_neighbours, landmark_indices
from vggt_mv.models.vggt import VGGT_MV
from vggt_mv_ext import alternating_attention

TOLERANCE = 3e-6  # float32, four rounds; measured below 8e-7
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def images_of(*grid: int, seed: int = 0, size: tuple[int, int] = (28, 42)) -> Tensor:
    return torch.rand(*grid, 3, *size, generator=torch.Generator().manual_seed(seed))


def mask_of(*grid: int, seed: int = 1, size: tuple[int, int] = (28, 42)) -> Tensor:
    return torch.rand(*grid, *size, generator=torch.Generator().manual_seed(seed)).square()


def patch_means(mask: Tensor) -> Tensor:
    rows, columns = mask.shape[-2] // 14, mask.shape[-1] // 14
    return mask.view(*mask.shape[:-2], rows, 14, columns, 14).mean(dim=(-3, -1))


def assert_close(actual, expected, rel) -> None:  # type: ignore[no-untyped-def]
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert rel(a, e) < TOLERANCE, f"output {i}: {rel(a, e)}"


def options_of(strategy: str, **more):  # type: ignore[no-untyped-def]
    return {
        "enable_sparse_global": True,
        "sparse_strategy": strategy,
        "landmark_k": 2,
        "num_memory_tokens": 5,
        **more,
    }


# The neighbours of a frame


@pytest.mark.parametrize(("times", "views"), [(1, 1), (1, 9), (9, 1), (2, 3), (6, 2), (11, 10)])
def test_dilated_neighbours_against_the_definition(times: int, views: int) -> None:
    found = dilated_neighbours(times, views)
    assert found.shape[0] == times * views
    assert found.shape[1] <= 25
    for frame, row in enumerate(found.tolist()):
        t, v = divmod(frame, views)
        expected = set()
        for length in (1, 2, 4):
            for dt in (-length, 0, length):
                for dv in (-length, 0, length):
                    if 0 <= t + dt < times and 0 <= v + dv < views:
                        expected.add((t + dt) * views + v + dv)
        assert row == sorted(expected) + [-1] * (found.shape[1] - len(expected))
        assert frame in row


def test_a_frame_in_the_middle_has_all_neighbours() -> None:
    assert (dilated_neighbours(9, 9)[40] >= 0).sum() == 25


# All combinations against the rounds written out


@every_strategy
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("grid", [(1, 1, 3), (1, 6, 1), (2, 3, 2)], ids=["one_time", "one_view", "B2_T3_N2"])
@torch.no_grad()
def test_the_rounds_are_those_written_out(tiny_aggregator, rel, strategy, dual, masked, grid):
    model = tiny_aggregator(
        **options_of(strategy), enable_dual_stream=dual, enable_spatial_mask=dual and masked, mask_layer=1
    )
    images, mask = images_of(*grid), mask_of(*grid) if masked else None
    outputs, _, extras = model(images, dynamic_mask=mask)
    plain = plain_streams.run(model, images, ("view", "time"), given=None if mask is None else patch_means(mask))
    assert_close(outputs, plain.outputs["geo" if dual else "single"], rel)
    if dual:
        assert_close(extras["pose"], plain.outputs["pose"], rel)
    state = (extras or {}).get("memory_state")
    assert (state is None) == (strategy != "memory_bank")
    if state is not None:
        assert state.shape == (1 + dual, 2, grid[0], 5, 32)
        assert not state.requires_grad
        for got, want in zip(state, plain.memory, strict=True):
            assert rel(got, want) < TOLERANCE


@every_strategy
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
@torch.no_grad()
def test_a_sequence_is_the_grid_of_one_time(tiny_aggregator, rel, strategy, dual):
    """With the predicted mask, which on a sequence acts in the exchange too."""
    model = tiny_aggregator(**options_of(strategy), enable_dual_stream=dual, enable_spatial_mask=True, mask_layer=1)
    images = images_of(2, 3)
    outputs, _, extras = model(images)
    plain = plain_streams.run(model, images[:, None], ("time", "view"))
    assert_close(outputs, [out[:, 0] for out in plain.outputs["geo" if dual else "single"]], rel)
    assert extras["dynamic_mask"].shape == (2, 3, 2, 3)
    assert torch.equal(model(images[0])[0][-1], model(images[:1])[0][-1])


@every_strategy
@torch.no_grad()
def test_it_follows_any_round_in_any_order(tiny_aggregator, rel, strategy):
    images = images_of(1, 3, 2)
    for layers, order in (((0,), ("time", "view")), ((3, 0, 2), ("view", "time")), (range(4), ("time", "view"))):
        model = tiny_aggregator(**options_of(strategy, sparse_global_layers=layers), aa_order=list(order))
        assert model.sparse_global_layers == tuple(sorted(layers))
        assert_close(model(images)[0], plain_streams.run(model, images, order).outputs["single"], rel)


@every_strategy
@torch.no_grad()
def test_with_blocks_of_a_kind_in_a_row_it_follows_its_pair(tiny_aggregator, rel, strategy):
    """Two blocks of a kind: the exchange after round 0 comes after view block 0 and before view block 1."""
    options = options_of(strategy, sparse_global_layers=[0], aa_block_size=2, aa_order=["time", "view"], depth=2)
    model, images = tiny_aggregator(**options), images_of(1, 3, 2)
    assert model._schedule(("time", "view")) == [("time", 0), ("time", 1), ("view", 0), ("sparse", 0), ("view", 1)]
    outputs = model(images)[0]
    before = tiny_aggregator(**{**options, "enable_sparse_global": False})
    before.load_state_dict({k: v for k, v in model.state_dict().items() if k != "memory_tokens"})
    plain = before(images)[0]
    assert torch.equal(outputs[0][..., :32], plain[0][..., :32])  # time 0
    assert torch.equal(outputs[1][..., :32], plain[1][..., :32])  # time 1 ran before the exchange
    assert rel(outputs[0][..., 32:], plain[0][..., 32:]) > 1e-4
    assert rel(outputs[1][..., 32:], plain[1][..., 32:]) > 1e-4


@every_strategy
@torch.no_grad()
def test_an_exchange_in_the_last_round_changes_the_predictions(tiny_model, rel, strategy):
    model = tiny_model(VGGT_MV, **options_of(strategy, sparse_global_layers=[3]))
    without = tiny_model(VGGT_MV)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("memory_tokens")})
    images = images_of(1, 2, 2)
    got, plain = model(images), without(images)
    for name in ("pose_enc", "depth", "world_points"):
        assert rel(got[name], plain[name]) > 1e-5, name


# The exchange by itself


def exchange(model: Aggregator, x: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """What it adds to tokens [1, T, N, P, C] of frames of 2 x 3 patches."""
    sparse = SparseGlobal(
        model.sparse_strategy, (3,), model.landmark_k, getattr(model, "memory_tokens", None), **options
    )
    grid = GridContext(axis="global", grid_hw=(2, 3), num_special=5)
    return sparse.exchange(model.global_blocks[3], x, sparse.start_of(0, 3, x), grid, None, None)[0] - x


@every_strategy
@torch.no_grad()
def test_it_passes_information_between_times_and_views(tiny_aggregator, strategy):
    """Between any two frames (block_dilated: between neighbours), each of which is changed in turn."""
    model = tiny_aggregator(**options_of(strategy, landmark_k=1))
    times, views = 4, 3
    x = torch.randn(1, times, views, 11, 32)
    before = exchange(model, x)
    near = dilated_neighbours(times, views).tolist()
    for source in range(times * views):
        changed = x.clone()
        changed[0, source // views, source % views] = torch.randn(11, 32)
        moved = (exchange(model, changed) - before)[0].flatten(0, 1).abs().amax(dim=(1, 2))
        for target in range(times * views):
            reached = strategy != "block_dilated" or source in near[target]
            assert (moved[target].item() > 1e-5) == reached, (source, target)


@torch.no_grad()
def test_without_its_memory_nothing_passes(tiny_aggregator, monkeypatch):
    """If nothing is written, what a token reads does not depend on any other token."""
    model = tiny_aggregator(**options_of("memory_bank"))
    x = torch.randn(1, 2, 2, 11, 32)
    changed = x.clone()
    changed[0, 1, 1] = torch.randn(11, 32)
    assert not torch.equal(exchange(model, x)[0, 0, 0], exchange(model, changed)[0, 0, 0])
    monkeypatch.setattr(
        sparse_global, "memory_write", lambda qkv, memory_qkv, **_: torch.zeros_like(memory_qkv[:, :, 0].flatten(2))
    )
    model.global_blocks[3].attn.proj.bias.zero_()
    assert torch.equal(exchange(model, x)[0, 0, 0], exchange(model, changed)[0, 0, 0])
    # A memory whose values are nothing gives nothing.
    model.global_blocks[3].norm1.bias.zero_()
    model.global_blocks[3].attn.qkv.bias.zero_()
    model.memory_tokens.zero_()
    assert exchange(model, x).count_nonzero() == 0


@torch.no_grad()
def test_all_patches_as_landmarks_are_dense_attention(tiny_aggregator, rel):
    model = tiny_aggregator(**options_of("landmark", landmark_k=1000))
    x, block = torch.randn(2, 3, 2, 11, 32), model.global_blocks[3]
    qkv = block.attn.project(block.norm1(x), GridContext(axis="global", grid_hw=(2, 3), num_special=5))
    dense = block.ls1(block.attn.merge(alternating_attention(qkv, "global")))
    assert rel(exchange(model, x), dense) < 1e-6
    few = tiny_aggregator(**options_of("landmark", landmark_k=5))
    assert rel(exchange(few, x), dense) > 1e-4


@every_strategy
@torch.no_grad()
def test_the_order_of_views_does_not_matter_beyond_the_first_frame(tiny_model, rel, strategy):
    """block_dilated excepted, whose neighbours follow from that order."""
    model, images = tiny_model(VGGT_MV, **options_of(strategy)), images_of(1, 2, 5)
    order = torch.tensor([0, 4, 2, 1, 3])
    want, shuffled = model(images), model(images[:, :, order])
    for name in ("pose_enc", "depth", "world_points"):
        error = rel(shuffled[name], want[name][:, :, order])
        assert error < 5e-6 if strategy != "block_dilated" else error > 1e-5, name


# Landmarks


def test_landmarks_are_the_tokens_of_largest_norm_and_carry_no_gradient() -> None:
    x = torch.randn(2, 2, 3, 7, 4, requires_grad=True)
    found = landmark_indices(x, 2, 3)
    assert found.shape == (2, 2 * 3 * 5)
    assert not found.requires_grad
    for b, (t, n) in ((b, divmod(f, 3)) for b in range(2) for f in range(6)):
        frame = found[b].view(6, 5)[t * 3 + n] - (t * 3 + n) * 7
        assert frame[:2].tolist() == [0, 1]
        assert set(frame[2:].tolist()) == set((x[b, t, n, 2:].norm(dim=-1).topk(3).indices + 2).tolist())


@torch.no_grad()
def test_landmarks_by_confidence(tiny_aggregator, tiny_model, rel):
    model = tiny_aggregator(**options_of("landmark"))
    images, confidence = images_of(1, 2, 2), 1 + mask_of(1, 2, 2, seed=5)
    outputs = model(images, landmark_confidence=confidence)[0]
    plain = plain_streams.run(model, images, ("view", "time"), confidence=patch_means(confidence))
    assert_close(outputs, plain.outputs["single"], rel)
    assert rel(model(images)[0][-1], outputs[-1]) > 1e-5
    whole = tiny_model(VGGT_MV, **options_of("landmark"))
    chosen, joint = (
        whole(images, landmark_confidence=confidence, attention=attention) for attention in ("alternating", "joint")
    )
    assert rel(chosen["depth"], whole(images)["depth"]) > 1e-6
    sequence = whole(images.flatten(1, 2), landmark_confidence=confidence.flatten(1, 2))
    assert rel(joint["depth"].flatten(1, 2), sequence["depth"]) < 1e-6


# Memory


@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
@torch.no_grad()
def test_a_memory_goes_on_from_where_it_was(tiny_model, rel, dual):
    model = tiny_model(VGGT_MV, **options_of("memory_bank"), enable_dual_stream=dual)
    first, second = images_of(1, 2, 2), images_of(1, 2, 2, seed=7)
    state = model(first)["memory_state"]
    assert state.shape == (1 + dual, 2, 1, 5, 32)
    carried, fresh = model(second, memory_state=state), model(second)
    assert rel(carried["pose_enc"], fresh["pose_enc"]) > 1e-6
    plain = plain_streams.run(model.aggregator, second, ("view", "time"), memory_state=state, predicts=dual)
    for got, want in zip(carried["memory_state"], plain.memory, strict=True):
        assert rel(got, want) < TOLERANCE
    tokens = model.aggregator.memory_tokens
    same = model(second, memory_state=tokens.expand(1 + dual, 2, 1, -1, -1))
    assert rel(same["depth"], fresh["depth"]) < 1e-6
    # Every stream and layer has a slot of its own.
    for slot in range((1 + dual) * 2):
        other = state.clone()
        other.flatten(0, 1)[slot].zero_()
        assert rel(model(second, memory_state=other)["memory_state"], carried["memory_state"]) > 1e-5


def test_memory_tokens_exist_for_the_memory_bank_alone(tiny_aggregator):
    for strategy in STRATEGIES:
        names = tiny_aggregator(**options_of(strategy)).state_dict()
        assert ("memory_tokens" in names) == (strategy == "memory_bank")
    assert "memory_tokens" not in tiny_aggregator().state_dict()
    assert tiny_aggregator(enable_sparse_global=True).memory_tokens.shape == (1, 32, 32)
    assert Aggregator(depth=1, embed_dim=32, num_heads=2, patch_embed="conv", enable_sparse_global=True,
                      mask_layer=None).sparse_global_layers == (0,)  # fmt: skip


@every_strategy
def test_training_with_and_without_checkpointing(tiny_model, rel, strategy):
    found = []
    for checkpointing in (False, True):
        model = tiny_model(
            VGGT_MV, **options_of(strategy), gradient_checkpointing=checkpointing, enable_track=False
        ).train()
        predictions = model(images_of(1, 2, 2))
        (predictions["pose_enc"].sum() + predictions["depth"].sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if strategy == "memory_bank":
        assert found[0]["aggregator.memory_tokens"].norm() > 0
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert rel(found[1][name], grad) < 1e-4 or grad.norm() < 1e-5, name


@every_strategy
def test_compiles_without_a_graph_break(tiny_aggregator, rel, strategy):
    model = tiny_aggregator(**options_of(strategy))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = images_of(1, 2, 2)
    with torch.no_grad():
        assert_close(compiled(images)[0], model(images)[0], rel)


# Bad options and inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_strategy": "dense"}, r"sparse_strategy must be one of \['memory_bank', .*\], got 'dense'"),
        ({"sparse_global_layers": [4]}, r"sparse_global_layers must be indices in 0\.\.depth-1 = 0\.\.3.*got \[4\]"),
        ({"sparse_global_layers": [-1]}, r"got \[-1\]"),
        ({"sparse_global_layers": []}, r"at least one, got \[\]"),
        ({"landmark_k": 0}, r"landmark_k must be at least 1, got 0"),
        ({"num_memory_tokens": 0}, r"num_memory_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(tiny_aggregator, options, message):
    with pytest.raises(VggtMvError, match=message):
        tiny_aggregator(enable_sparse_global=True, **options)


def test_bad_inputs_are_named(tiny_aggregator):
    images = images_of(1, 2, 2)
    memory, landmark = (tiny_aggregator(**options_of(strategy)) for strategy in ("memory_bank", "landmark"))
    state = torch.zeros(1, 2, 1, 5, 32)
    with pytest.raises(
        VggtMvError, match=r"memory_state must be \[streams, layers, B, M, C\] = \[1, 2, 1, 5, 32\], got"
    ):
        memory(images, memory_state=state[0])
    with pytest.raises(VggtMvError, match=r"memory_state must be a floating-point tensor, got torch.int64"):
        memory(images, memory_state=state.long())
    with pytest.raises(VggtMvError, match=r"memory_state must be None without enable_sparse_global=True and"):
        landmark(images, memory_state=state)
    with pytest.raises(VggtMvError, match=r"landmark_confidence must be None without enable_sparse_global=True and"):
        memory(images, landmark_confidence=torch.ones(1, 2, 2, 28, 42))
    with pytest.raises(VggtMvError, match=r"landmark_confidence must have the shape of images without the channels"):
        landmark(images, landmark_confidence=torch.ones(1, 2, 2, 28, 28))
