"""The dual stream of the aggregator: against the rounds written out, and what its mask does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.model import plain_streams
from vggt_mv.errors import VggtMvError
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.vggt import VGGT, VGGT_MV

TOLERANCE = 3e-6  # float32, four rounds; measured below 8e-7
STREAMS = ("pose", "geo")
DUAL = {"enable_dual_stream": True, "enable_spatial_mask": True, "mask_layer": 1}
every_grid = pytest.mark.parametrize(
    "grid", [(1, 1, 1), (1, 1, 3), (1, 3, 1), (2, 2, 3)], ids=["one_frame", "one_time", "one_view", "B2_T2_N3"]
)


def images_of(*grid: int, seed: int = 0, size: tuple[int, int] = (28, 42)) -> Tensor:
    return torch.rand(*grid, 3, *size, generator=torch.Generator().manual_seed(seed))


def mask_of(*grid: int, seed: int = 1, size: tuple[int, int] = (28, 42)) -> Tensor:
    return torch.rand(*grid, *size, generator=torch.Generator().manual_seed(seed)).square()


def patch_means(mask: Tensor) -> Tensor:
    rows, columns = mask.shape[-2] // 14, mask.shape[-1] // 14
    return mask.view(*mask.shape[:-2], rows, 14, columns, 14).mean(dim=(-3, -1))


def assert_close(actual, expected, rel, tolerance=TOLERANCE) -> None:  # type: ignore[no-untyped-def]
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert rel(a, e) < tolerance, f"output {i}: {rel(a, e)}"


@every_grid
@pytest.mark.parametrize("given", [False, True], ids=["predicted", "given and predicted"])
@pytest.mark.parametrize("order", [["view", "time"], ["time", "view"]], ids=["view_first", "time_first"])
@torch.no_grad()
def test_the_rounds_are_those_written_out(tiny_aggregator, rel, grid, given, order):
    model = tiny_aggregator(**DUAL, aa_order=order)
    images, mask = images_of(*grid), mask_of(*grid) if given else None
    outputs, _, extras = model(images, dynamic_mask=mask)
    plain = plain_streams.run(model, images, tuple(order), given=None if mask is None else patch_means(mask))
    for name in STREAMS:
        assert_close(extras[name], plain.outputs[name], rel)
    assert outputs is extras["geo"]
    assert rel(extras["dynamic_mask"], plain.predicted) < TOLERANCE
    if grid != (1, 1, 1):
        without, _, other = model(images, dynamic_mask=None if given else mask_of(*grid))
        assert rel(other["pose"][-1], extras["pose"][-1]) > 1e-5
        assert rel(without[-1], outputs[-1]) > 1e-5


@torch.no_grad()
def test_a_sequence_is_the_grid_of_one_time(tiny_aggregator, rel):
    model = tiny_aggregator(**DUAL)
    images, mask = images_of(2, 3), mask_of(2, 3)
    outputs, _, extras = model(images, dynamic_mask=mask)
    plain = plain_streams.run(model, images[:, None], ("time", "view"), given=patch_means(mask)[:, None])
    for name in STREAMS:
        assert_close(extras[name], [out[:, 0] for out in plain.outputs[name]], rel)
    assert extras["dynamic_mask"].shape == (2, 3, 2, 3)
    assert outputs[0].shape == (2, 3, 5 + 6, 64)
    four = model(images[0], dynamic_mask=mask[0])[2]
    assert_close(four["pose"], [out[:1] for out in extras["pose"]], rel)


@torch.no_grad()
def test_a_mask_layer_of_none_predicts_nothing(tiny_aggregator, rel):
    model = tiny_aggregator(**{**DUAL, "mask_layer": None})
    images = images_of(1, 2, 2)
    extras = model(images)[2]
    assert "dynamic_mask" not in extras
    assert_close(
        extras["pose"], plain_streams.run(model, images, ("view", "time"), predicts=False).outputs["pose"], rel
    )


@torch.no_grad()
def equal_streams(model, logit: float):
    """Copies the single stream's blocks into both streams and sets both logits."""
    for name, kind in itertools.product(STREAMS, ("frame_blocks", "global_blocks")):
        aggregator = getattr(model, "aggregator", model)
        getattr(aggregator, f"{name}_{kind}").load_state_dict(getattr(aggregator, kind).state_dict())
        getattr(aggregator, f"lambda_{name}_logit").fill_(logit)
    return model


QUERIES = torch.tensor([[[5.0, 7.0], [20.0, 11.0]]])


@pytest.mark.parametrize("grid", [(3,), (1, 4), (1, 2, 3)], ids=["4-D", "5-D", "6-D"])
@torch.no_grad()
def test_equal_weights_without_lambdas_are_the_single_stream(tiny_model, rel, grid):
    """Every prediction, with a mask predicted and one given, of which neither acts."""
    dual = equal_streams(tiny_model(VGGT_MV, enable_dual_stream=True), -torch.inf)
    single = tiny_model(VGGT_MV, enable_spatial_mask=False)
    single.load_state_dict({k: v for k, v in dual.state_dict().items() if k in single.state_dict()})
    images, mask = images_of(*grid), mask_of(*grid)
    got, want = dual(images, QUERIES, dynamic_mask=mask), single(images, QUERIES)
    assert set(got) - set(want) == {"dynamic_mask"}
    for name, value in want.items():
        for a, b in zip(got[name], value, strict=True) if isinstance(value, list) else [(got[name], value)]:
            # "The model's own noise" of the tracker: rounding grows by 1e3 in an iteration.
            assert rel(a, b) < (1e-4 if name.startswith(("track", "vis", "conf")) else 1e-6), name
    for logit in (0.0, 1.0):
        moved = equal_streams(dual, logit)(images, dynamic_mask=mask)
        assert rel(moved["pose_enc"], want["pose_enc"]) > 1e-6
        assert rel(moved["depth"], want["depth"]) > 1e-6


@torch.no_grad()
def test_cameras_come_from_the_pose_stream_and_all_else_from_the_geometry_stream(tiny_model, rel):
    model, images = tiny_model(VGGT_MV, enable_dual_stream=True), images_of(1, 2, 2)
    before = model(images, QUERIES)
    for stream, changed in (("pose", {"pose_enc"}), ("geo", {"depth", "world_points", "track"})):
        model = tiny_model(VGGT_MV, enable_dual_stream=True)
        for block in getattr(model.aggregator, f"{stream}_frame_blocks"):
            block.ls1.gamma.mul_(0.5)
        after = model(images, QUERIES)
        for name in ("pose_enc", "depth", "world_points", "track"):
            # The mask is predicted from the geometry stream: through it the cameras see that stream, a little.
            if stream == "pose" or name != "pose_enc":
                assert (rel(after[name], before[name]) > 1e-5) == (name in changed), (stream, name)
    assert set(before) - {"dynamic_mask"} == set(tiny_model(VGGT_MV)(images, QUERIES))
    assert before["dynamic_mask"].shape == (1, 2, 2, 2, 3)


@torch.no_grad()
def test_vggt_and_joint_attention_know_it_too(tiny_model, rel):
    images = images_of(1, 2, 2)
    joint = tiny_model(VGGT_MV, enable_dual_stream=True, attention="joint")
    sequence = joint(images.flatten(1, 2), dynamic_mask=mask_of(1, 2, 2).flatten(1, 2))
    together = joint(images, dynamic_mask=mask_of(1, 2, 2))
    assert rel(together["pose_enc"].flatten(1, 2), sequence["pose_enc"]) < 1e-6
    assert together["dynamic_mask"].shape == (1, 2, 2, 2, 3)
    vggt = tiny_model(VGGT, enable_dual_stream=True)
    assert "dynamic_mask" not in vggt(images[:, 0])
    kept = {k: v for k, v in joint.state_dict().items() if k in vggt.state_dict()}
    vggt.load_state_dict(kept)
    quiet = tiny_model(VGGT_MV, enable_dual_stream=True, mask_layer=None)
    assert rel(vggt(images[:, 0])["depth"], quiet(images[:, 0])["depth"]) < 1e-6


# What the mask does to attention


def attention_on_marked_keys(model, images, mask, monkeypatch) -> dict[str, list[Tensor]]:  # type: ignore[no-untyped-def]
    """The share of attention that goes to tokens with m = 1, for each joining attention of each stream, by row."""
    from vggt_mv.models import streams

    shares: dict[str, list[Tensor]] = {"pose": [], "geo": []}
    plain = streams.dual_stream_attention

    def watched(pose, geo, axis, moving, lambda_pose, lambda_geo, *, scale):  # type: ignore[no-untyped-def]
        if moving is not None:
            marks = moving[..., None, None].expand(*moving.shape, pose.shape[-2], 1).double()
            for name, qkv in (("pose", pose), ("geo", geo)):
                # A value that is 1 on marked keys and 0 on others makes the output the probability of the marked.
                probe = qkv.double()
                probe = torch.cat([probe[..., :2, :, :], marks.expand_as(probe[..., 0, :, :])[..., None, :, :]], dim=-3)
                weights = (lambda_pose.double(), lambda_geo.double())
                both = plain(probe, None, axis, moving.double(), *weights, scale=scale)
                shares[name].append(both[0 if name == "pose" else 1])
        return plain(pose, geo, axis, moving, lambda_pose, lambda_geo, scale=scale)

    with monkeypatch.context() as patch:
        patch.setattr(streams, "dual_stream_attention", watched)
        model(images, dynamic_mask=mask)
    return shares


def half_mask(*grid: int) -> Tensor:
    """Ones on the left part of every frame, aligned with patches."""
    mask = torch.zeros(*grid, 28, 56)
    mask[..., :28] = 1
    return mask


@torch.no_grad()
def test_lambda_of_four_lowers_the_odds_by_e_to_the_minus_four(tiny_aggregator, monkeypatch):
    """In the first joining attention, which sees the same tokens whatever the mask is."""
    model = tiny_aggregator(enable_dual_stream=True)
    images, mask = images_of(1, 2, 2, size=(28, 56)), half_mask(1, 2, 2)
    odds = {}
    for logit in (-torch.inf, 100.0):  # clamp(softplus(100), 0, 4) = 4
        for name in STREAMS:
            getattr(model, f"lambda_{name}_logit").fill_(logit)
        shares = attention_on_marked_keys(model, images, mask, monkeypatch)
        odds[logit] = {name: shares[name][0] / (1 - shares[name][0]) for name in STREAMS}
    for name, sign in (("pose", -4), ("geo", 4)):
        ratio = odds[100.0][name] / odds[-torch.inf][name]
        assert (ratio * torch.tensor(-sign, dtype=torch.float64).exp() - 1).abs().max() < 1e-6  # lambda is float32


@torch.no_grad()
def test_flipping_the_mask_moves_attention_to_the_other_half(tiny_aggregator, monkeypatch):
    model = tiny_aggregator(enable_dual_stream=True)
    images, mask = images_of(1, 2, 2, size=(28, 56)), half_mask(1, 2, 2)
    left = attention_on_marked_keys(model, images, mask, monkeypatch)
    right = attention_on_marked_keys(model, images, 1 - mask, monkeypatch)
    nothing = attention_on_marked_keys(model, images, 0 * mask, monkeypatch)
    for name in STREAMS:
        getattr(model, f"lambda_{name}_logit").fill_(-torch.inf)
    free = attention_on_marked_keys(model, images, mask, monkeypatch)
    free_right = attention_on_marked_keys(model, images, 1 - mask, monkeypatch)
    assert all(share.count_nonzero() == 0 for shares in nothing.values() for share in shares)
    for marked, unbiased in ((left, free), (right, free_right)):
        assert (marked["pose"][0] < unbiased["pose"][0]).all()
        assert (marked["geo"][0] > unbiased["geo"][0]).all()


# Gradients


def test_gradients_of_both_lambdas_against_finite_differences(tiny_aggregator):
    """With a given mask: a predicted one depends on tokens that are detached, which a difference does not know."""
    model = tiny_aggregator(enable_dual_stream=True).double().requires_grad_(False)
    images, mask = images_of(1, 2, 2, size=(28, 28)).double(), mask_of(1, 2, 2, size=(28, 28))
    logits = [model.lambda_pose_logit.requires_grad_(), model.lambda_geo_logit.requires_grad_()]

    def loss() -> Tensor:
        extras = model(images, dynamic_mask=mask)[2]
        return extras["pose"][-1].square().mean() + extras["geo"][-1].sin().mean()

    got = torch.autograd.grad(loss(), logits)
    step = 1e-5
    for logit, gradient in zip(logits, got, strict=True):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                logit.add_(sign * step)
                ends.append(loss())
                logit.sub_(sign * step)
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert gradient.abs() > 1e-7
        assert abs(gradient - numeric) < 1e-5 * abs(numeric)


@pytest.mark.parametrize("options", [{}, {"enable_sparse_global": True, "num_memory_tokens": 3}], ids=["", "memory"])
def test_training_with_and_without_checkpointing(tiny_model, rel, options):
    """The same gradients, and one for every parameter that trains; the mask head's comes through both streams."""
    images, mask = images_of(1, 2, 2), 0.1 * mask_of(1, 2, 2)
    found = []
    for checkpointing in (False, True):
        model = tiny_model(
            VGGT_MV, enable_dual_stream=True, gradient_checkpointing=checkpointing, enable_track=False, **options
        ).train()
        predictions = model(images, dynamic_mask=mask)
        (predictions["pose_enc"].sum() + predictions["depth"].sum() + predictions["world_points"].sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    without = [name for name, grad in found[0].items() if grad is None]
    assert without == [], f"no gradient: {without}"
    for name in ("lambda_pose_logit", "lambda_geo_logit", "spatial_mask_head.alpha_logit"):
        assert found[0][f"aggregator.{name}"].abs() > 0
    for name, grad in found[0].items():
        assert rel(found[1][name], grad) < 1e-4 or grad.norm() < 1e-5, name
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen >= {"frame_blocks", "global_blocks"}


def test_compiles_without_a_graph_break(tiny_aggregator, rel):
    model = tiny_aggregator(**DUAL, enable_sparse_global=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = images_of(1, 2, 2)
    with torch.no_grad():
        assert_close(compiled(images)[0], model(images)[0], rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@torch.no_grad()
def test_autocast_and_low_precision_models(tiny_aggregator, rel, dtype):
    images = images_of(1, 2, 2)
    exact = tiny_aggregator(**DUAL)(images)[2]
    with torch.autocast("cpu", torch.bfloat16):
        got = tiny_aggregator(**DUAL)(images)[2]
    low = tiny_aggregator(**DUAL).to(dtype)(images.to(dtype))[2]
    for name in STREAMS:
        assert rel(got[name][-1].float(), exact[name][-1]) < 3e-2
        assert rel(low[name][-1].float(), exact[name][-1]) < 3e-2


# State dict and options


def test_the_aggregator_loads_the_public_one_strictly(manifest):
    shapes = manifest("vggt_mv_aggregator_dual_memory")
    assert len(shapes) == 3813
    with torch.device("meta"):
        model = Aggregator(enable_spatial_mask=True, enable_dual_stream=True, enable_sparse_global=True)
    expected = {k: v for k, v in shapes.items() if not k.startswith(("view_blocks", "time_blocks"))}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    result = model.load_state_dict(state, strict=True, assign=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_the_new_scalars_start_at_the_logarithm_of_a_tenth(tiny_options):
    model = VGGT_MV(**tiny_options, mask_layer=1, enable_dual_stream=True).aggregator
    assert model.lambda_pose_logit.item() == model.lambda_geo_logit.item() == pytest.approx(-2.302585)


def test_a_mask_layer_beyond_the_last_round_is_refused(tiny_aggregator):
    with pytest.raises(VggtMvError, match=r"mask_layer must lie in 0\.\.depth-1 = 0\.\.3 or be None, got 4"):
        tiny_aggregator(**{**DUAL, "mask_layer": 4})


@torch.no_grad()
def test_each_stream_keeps_the_outputs_that_are_wanted(tiny_aggregator):
    model, images = tiny_aggregator(**DUAL), images_of(1, 2, 2)
    everything = model(images)[2]
    kept = model(images, keep_outputs=[0, 2], keep_pose_outputs=[3])[2]
    assert [x is None for x in kept["geo"]] == [False, True, False, True]
    assert [x is None for x in kept["pose"]] == [True, True, True, False]
    assert torch.equal(kept["pose"][3], everything["pose"][3])
    with pytest.raises(VggtMvError, match=r"keep_pose_outputs must be indices in 0\.\.3, got \[7\]"):
        model(images, keep_pose_outputs=[7])


@torch.no_grad()
def test_the_order_of_views_does_not_matter_beyond_the_first_frame(tiny_model, rel):
    """Times and views but the first, whose frame has tokens of its own, may be given in any order."""
    model, images, mask = tiny_model(VGGT_MV, enable_dual_stream=True), images_of(1, 3, 3), mask_of(1, 3, 3)
    order = torch.tensor([0, 2, 1])
    want = model(images, dynamic_mask=mask)
    shuffled = model(images[:, :, order], dynamic_mask=mask[:, :, order])
    for name in ("pose_enc", "depth", "world_points", "dynamic_mask"):
        assert rel(shuffled[name], want[name][:, :, order]) < 5e-6, name
        assert rel(shuffled[name], want[name]) > 1e-5, name
