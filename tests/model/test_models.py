"""VGGT and VGGT_MV from images to predictions."""

from __future__ import annotations

import pytest
import torch

from vggt_mv.models.vggt import VGGT, VGGT_MV

SIZE = (28, 42)
QUERIES = torch.tensor([[[3.0, 4.0], [30.0, 20.0]]])


def _images(*leading: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*leading, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def _assert_same(actual, expected, rel, tolerance=0.0, skip=()):
    """All predictions agree; tolerance 0 means bit by bit."""
    assert actual.keys() - set(skip) == expected.keys() - set(skip)
    for name in actual.keys() - set(skip):
        a, e = actual[name], expected[name]
        pairs = zip(a, e, strict=True) if isinstance(a, list) else [(a, e)]
        for x, y in pairs:
            assert x.shape == y.shape, name
            assert torch.equal(x, y) if tolerance == 0 else rel(x, y) <= tolerance, (name, rel(x, y))


def _reshape(predictions, leading):
    """Predictions [B, S, ...] with other leading dimensions instead of S."""

    def reshape(x):
        return x.unflatten(1, leading)

    return {k: [reshape(x) for x in v] if isinstance(v, list) else reshape(v) for k, v in predictions.items()}


@pytest.mark.parametrize(
    ("model_class", "leading"),
    [
        (VGGT, (3,)),
        (VGGT, (1, 1)),
        (VGGT, (2, 3)),
        (VGGT_MV, (2, 3)),
        (VGGT_MV, (2, 2, 3)),
        (VGGT_MV, (1, 1, 3)),
        (VGGT_MV, (1, 3, 1)),
        (VGGT_MV, (1, 1, 1)),
    ],
    ids=str,
)
@torch.no_grad()
def test_shapes_of_all_predictions(tiny_model, model_class, leading):
    images = _images(*leading)
    batch = 1 if len(leading) == 1 else leading[0]
    frames = (batch, *(leading if len(leading) == 1 else leading[1:]))
    queries = QUERIES.expand(batch, -1, -1) if batch > 1 else QUERIES[0]
    predictions = tiny_model(model_class)(images, queries)
    expected = {
        "pose_enc": (9,),
        "depth": (*SIZE, 1),
        "depth_conf": SIZE,
        "world_points": (*SIZE, 3),
        "world_points_conf": SIZE,
        "track": (2, 2),
        "vis": (2,),
        "conf": (2,),
        "images": (3, *SIZE),
    }
    if model_class is VGGT_MV and len(leading) < 3:
        expected["dynamic_mask"] = (2, 3)
    lists = {name: predictions.pop(name) for name in ("pose_enc_list", "track_list")}
    assert {k: tuple(v.shape) for k, v in predictions.items()} == {k: (*frames, *v) for k, v in expected.items()}
    assert [tuple(x.shape) for x in lists["pose_enc_list"]] == [(*frames, 9)] * 4
    assert [tuple(x.shape) for x in lists["track_list"]] == [(*frames, 2, 2)] * 2
    assert torch.equal(lists["pose_enc_list"][-1], predictions["pose_enc"])
    assert torch.equal(lists["track_list"][-1], predictions["track"])
    assert torch.equal(predictions["images"], images if len(leading) > 1 else images[None])
    assert all(v.isfinite().all() for v in predictions.values())


@torch.no_grad()
def test_a_sequence_is_times_by_views_with_one_time(tiny_model, rel):
    vggt = tiny_model(VGGT)
    model = tiny_model(VGGT_MV, aa_order=["time", "view"], enable_spatial_mask=False)
    model.load_state_dict(vggt.state_dict())
    images = _images(2, 3)
    queries = QUERIES.expand(2, -1, -1)
    _assert_same(model(images[:, None], queries), _reshape(vggt(images[:, :], queries), (1, 3)), rel, 1e-6)


@torch.no_grad()
def test_joint_attention_is_the_sequence_of_all_frames(tiny_model, rel):
    images, mask = _images(1, 2, 3), torch.rand(1, 2, 3, *SIZE)
    model = tiny_model(VGGT_MV, attention="joint")
    for given in (None, mask):
        sequence = model(images.flatten(1, 2), QUERIES, dynamic_mask=None if given is None else given.flatten(1, 2))
        joint = model(images, QUERIES, dynamic_mask=given)
        assert joint["dynamic_mask"].shape == (1, 2, 3, 2, 3)
        _assert_same(joint, _reshape(sequence, (2, 3)), rel)
    alternating = model(images, QUERIES, attention="alternating")
    assert "dynamic_mask" not in alternating
    assert rel(alternating["pose_enc"], joint["pose_enc"]) > 1e-4
    other = tiny_model(VGGT_MV)
    _assert_same(other(images, QUERIES), alternating, rel)
    _assert_same(other(images, QUERIES, dynamic_mask=mask, attention="joint"), joint, rel)


@torch.no_grad()
def test_page4d_is_vggt_with_a_mask(tiny_model, rel):
    images = _images(1, 3)
    model = tiny_model(VGGT_MV)
    masked = model(images)
    vggt = tiny_model(VGGT)
    vggt.load_state_dict({k: v for k, v in model.state_dict().items() if "spatial_mask_head" not in k})
    assert rel(vggt(images)["pose_enc"], masked["pose_enc"]) > 1e-6
    without = tiny_model(VGGT_MV, mask_layer=None)
    _assert_same(without(images), vggt(images), rel)
    assert masked["dynamic_mask"].min() >= 0
    assert masked["dynamic_mask"].max() <= 1


@torch.no_grad()
def test_a_given_mask_changes_cameras_on_times_by_views(tiny_model, rel):
    model, images = tiny_model(VGGT_MV), _images(1, 2, 2)
    mask = (torch.rand(1, 2, 2, *SIZE, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    assert rel(model(images, dynamic_mask=mask)["pose_enc"], model(images)["pose_enc"]) > 1e-6
    _assert_same(model(images, dynamic_mask=0 * mask), model(images), rel, 1e-6)
    sequence = images.flatten(1, 2)
    four = model(sequence[0], dynamic_mask=mask[0].flatten(0, 1))
    _assert_same(four, model(sequence, dynamic_mask=mask.flatten(1, 2)), rel)


@pytest.mark.parametrize(
    ("switched_off", "gone"),
    [
        ("enable_camera", {"pose_enc", "pose_enc_list"}),
        ("enable_depth", {"depth", "depth_conf"}),
        ("enable_point", {"world_points", "world_points_conf"}),
    ],
)
@torch.no_grad()
def test_heads_can_be_left_out(tiny_model, rel, switched_off, gone):
    full = tiny_model(VGGT)
    part = tiny_model(VGGT, **{switched_off: False})
    keys = part.state_dict().keys()
    part.load_state_dict({k: v for k, v in full.state_dict().items() if k in keys})
    everything, something = full(_images(1, 2), QUERIES), part(_images(1, 2), QUERIES)
    assert everything.keys() - something.keys() == gone
    _assert_same({k: v for k, v in everything.items() if k not in gone}, something, rel)


@torch.no_grad()
def test_only_outputs_that_heads_read_are_kept(tiny_model):
    options = {"dpt_head_options": {"features": 8, "out_channels": [8] * 4, "intermediate_layer_idx": [0, 1, 1, 2]}}
    for heads, queries, kept in [
        ({}, None, [0, 1, 2, 3]),
        ({"enable_camera": False}, None, [0, 1, 2]),
        ({"enable_camera": False, "enable_depth": False, "enable_point": False}, None, []),
        ({"enable_depth": False, "enable_point": False}, None, [3]),
        ({"enable_depth": False, "enable_point": False}, QUERIES, [0, 1, 2, 3]),
    ]:
        model, seen = tiny_model(VGGT, **options, **heads), []
        model.aggregator.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1][0]))
        model(_images(1, 2), queries)
        assert [i for i, output in enumerate(seen[0]) if output is not None] == kept


@torch.no_grad()
@pytest.mark.parametrize("frames", [(1,), (1, 1), (2,), (2, 1)], ids=str)
def test_kept_memory_is_given_back_for_several_frames(tiny_model, monkeypatch, frames):
    """Before the aggregator, and between it and the heads."""
    calls = []
    monkeypatch.setattr("vggt_mv.weights.pages.trim_kept", lambda: calls.append("trim"))
    tiny_model(VGGT_MV)(_images(1, *frames), on_stage=lambda stage, *_: calls.append(stage))
    trims = ["trim"] if 2 in frames else []
    assert calls[:1] == (trims or ["patch_embed"])
    assert calls.count("trim") == 2 * len(trims)
    if trims:
        assert calls[calls.index("camera") - 1] == "trim"


@torch.no_grad()
def test_progress_names_every_stage(tiny_model):
    calls = []
    tiny_model(VGGT_MV)(_images(1, 2, 2), QUERIES, on_stage=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["patch_embed", "attention", "camera", "depth", "points", "tracks"]
    for stage in stages:
        steps = [(done, total) for name, done, total in calls if name == stage]
        total = steps[0][1]
        assert steps == [(i, total) for i in range(total + 1)]
    calls.clear()
    tiny_model(VGGT)(_images(1, 2), on_stage=lambda *call: calls.append(call))
    assert "tracks" not in {stage for stage, _, _ in calls}


@torch.no_grad()
def test_autocast_stays_close_and_heads_stay_out_of_it(tiny_model, rel):
    model, images = tiny_model(VGGT_MV), _images(1, 2, 2)
    exact_tokens, exact = model.aggregator(images)[0], model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, low = model.aggregator(images)[0], model(images)
    for a, e in zip(tokens, exact_tokens, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < rel(a, e) < 1e-2  # bfloat16 rounds at 2**-9 = 2e-3; measured 5e-3
    for name in ("pose_enc", "depth", "world_points"):
        assert low[name].dtype == torch.float32
        assert rel(low[name], exact[name]) < 3e-2
    # What the heads make of the same tokens is what they make outside autocast.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = model(images)
    flat = [x.flatten(1, 2) for x in tokens]
    depth, _ = model.depth_head(flat, images.flatten(1, 2), 5)
    assert torch.equal(predictions["depth"].flatten(1, 2), depth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_a_model_of_another_dtype(tiny_model, rel, dtype):
    model, images = tiny_model(VGGT_MV), _images(1, 3)
    exact = model(images)
    other = model.to(dtype)(images)
    assert other["depth"].dtype == dtype
    assert rel(other["depth"], exact["depth"]) < (5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("leading", [(1, 3), (1, 2, 2)], ids=["sequence", "times_by_views"])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(tiny_model, rel, leading):
    gradients = []
    for checkpointing in (True, False):
        model = tiny_model(VGGT_MV, gradient_checkpointing=checkpointing).train()
        predictions = model(_images(*leading), QUERIES)
        used = [v for k, v in predictions.items() if k not in ("images", "pose_enc_list", "track_list", "dynamic_mask")]
        sum(x.sin().mean() for x in (*used, *predictions["pose_enc_list"])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    without = {name for name, grad in gradients[0].items() if grad is None or not grad.abs().max() > 0}
    expected = {"aggregator.patch_embed.mask_token"}
    if len(leading) == 3:  # the mask is not predicted there
        expected |= {name for name in gradients[0] if "spatial_mask_head" in name}
    assert without == expected
    for name in gradients[0].keys() - expected:
        # The tracker's own embedding amplifies rounding a thousandfold.
        tolerance = 1e-2 if name.startswith("track_head") else 1e-4
        assert rel(gradients[0][name], gradients[1][name]) < tolerance, name


def test_training_mode_keeps_less_for_the_backward_pass(tiny_aggregator):
    images, kept = torch.rand(1, 2, 3, 3, 28, 28), {}
    for checkpointing in (True, False):
        model, sizes = tiny_aggregator(gradient_checkpointing=checkpointing).train(), []

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(images, keep_outputs=())
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.3 * kept[False], kept


@pytest.mark.parametrize("leading", [(1, 2), (1, 2, 2)], ids=["sequence", "times_by_views"])
@torch.no_grad()
def test_the_aggregator_compiles_without_a_break(tiny_aggregator, leading):
    options = {"patch_embed": "conv", "patch_embed_options": {}, "enable_spatial_mask": True, "mask_layer": 0}
    aggregator, images = tiny_aggregator(depth=2, **options), _images(*leading)
    torch._dynamo.reset()
    compiled = torch.compile(aggregator, backend="eager", fullgraph=True)
    for a, e in zip(compiled(images)[0], aggregator(images)[0], strict=True):
        torch.testing.assert_close(a, e)


@torch.no_grad()
def test_shapes_can_be_had_on_the_meta_device(tiny_model):
    predictions = tiny_model(VGGT_MV).to("meta")(torch.empty(1, 2, 2, 3, *SIZE, device="meta"))
    assert predictions["depth"].shape == (1, 2, 2, *SIZE, 1)
    assert predictions["depth"].is_meta
