"""Arguments, shape rules, aliases, reasons and warnings of a plan: each text that a person may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from weights_support import Tree, aggregator_of, check_accounting, manifest, shallow, small, with_aliases

from vggt_mv.weights import (
    AliasConflictError,
    Entry,
    ModelSpec,
    TensorValueError,
    UnknownSchemeError,
    WeightsError,
    dual_stream_spec,
    plan_load,
)
from vggt_mv.weights.plan import LoadPlan

PAGE4D, VGGT_1B, PI3 = small("page4d_1b"), small("vggt_1b"), small("pi3")
TOKEN = "aggregator.camera_token"


def entry_of(plan: LoadPlan, key: str) -> Entry:
    (found,) = [entry for entry in plan.entries if entry.source_key == key]
    return found


def fails(kind: type[Exception], text: str, *args: Any, **options: Any) -> str:
    with pytest.raises(kind, match=text) as error:
        plan_load(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- arguments


def test_arguments() -> None:
    fails(WeightsError, "prefer must be 'checkpoint' or 'pi3', got 'both'", PAGE4D, PAGE4D, prefer="both")
    fails(WeightsError, "source must be 'auto' or one of vggt, page4d, vggt_mv, pi3, got 'mv'", PAGE4D, PAGE4D, "mv")
    fails(WeightsError, "nothing to load: give checkpoint_path, pi3_path or both", PAGE4D)
    fails(WeightsError, "model must be a module or a mapping name -> shape, got list", [], PAGE4D)
    fails(WeightsError, "the value of 'a' must be a tensor or a shape, got float", PAGE4D, {"a": 1.5})
    fails(WeightsError, "the value of 'a' must be a tensor or a shape, got tuple", PAGE4D, {"a": (1, -2)})
    fails(WeightsError, "state_dict holds no tensors: the mapping is empty", PAGE4D, {})
    fails(WeightsError, "pi3_path must be a Pi3 checkpoint, but state_dict is vggt", PAGE4D, pi3=VGGT_1B)
    fails(WeightsError, "both files are Pi3 checkpoints: state_dict and state_dict", PAGE4D, PI3, pi3=PI3)


def test_a_pi3_file_as_checkpoint_counts_as_pi3() -> None:
    report = plan_load(PAGE4D, PI3).report()
    assert report["checkpoint_loaded"] == 0
    assert report["pi3_loaded"] == 2 * 2 * 18 + 1


def test_an_explicit_source_is_believed() -> None:
    plan = plan_load(PAGE4D, PI3, "vggt")
    check_accounting(plan, {"checkpoint": PI3})
    assert plan.report()["loaded"] == 0


# ---- models


def test_a_module_a_meta_module_and_a_mapping_plan_alike() -> None:
    with torch.device("meta"):
        meta = Tree(PAGE4D)
    plans = [plan_load(model, VGGT_1B) for model in (Tree(PAGE4D), meta, PAGE4D)]
    assert plans[0].entries == plans[1].entries
    strip = [(e.status, e.source_key, e.target_key, e.wins) for e in plans[0].entries]
    assert strip == [(e.status, e.source_key, e.target_key, e.wins) for e in plans[2].entries]
    assert plan_load(PAGE4D, meta.state_dict()).report()["loaded"] == len(PAGE4D)


def test_wrapped_models() -> None:
    model = nn.Sequential()
    model.add_module("module", Tree(PAGE4D))
    plan = plan_load(model, VGGT_1B)
    check_accounting(plan, {"checkpoint": VGGT_1B})
    assert plan.winner(TOKEN).target_key == f"module.{TOKEN}"


def test_a_model_that_names_a_tensor_twice() -> None:
    spec = ModelSpec.of(with_aliases(aggregator_of(PAGE4D), both=True))
    assert spec.aliases["view_blocks.0.norm1.weight"] == "aggregator.global_blocks.0.norm1.weight"
    assert spec.names["aggregator.global_blocks.0.norm1.weight"] == "global_blocks.0.norm1.weight"
    shapes = {"view_blocks.0.ls1.gamma": (8,), "global_blocks.0.ls1.gamma": (9,)}
    with pytest.raises(WeightsError, match=r"are one tensor and must have one shape, got \[8\] and \[9\]"):
        ModelSpec.of(shapes)


def test_a_tensor_that_is_not_there_has_no_winner() -> None:
    with pytest.raises(WeightsError, match="the model has no tensor 'nothing'"):
        plan_load(PAGE4D, PAGE4D).winner("nothing")


def test_dual_stream_twice() -> None:
    with pytest.raises(WeightsError, match="model has dual-stream blocks already"):
        dual_stream_spec(dual_stream_spec(ModelSpec.of(PAGE4D)))


# ---- shape rules


def test_pi3_register_token_is_adapted() -> None:
    entry = plan_load(PAGE4D, pi3=PI3).winner("aggregator.register_token")
    assert (entry.status, entry.source_shape, entry.target_shape) == ("adapted", (1, 1, 5, 8), (1, 2, 4, 8))
    assert entry.reason == "the first 4 of 5 register tokens, for both variants"


@pytest.mark.parametrize("shape", [(1, 2, 6, 8), (1, 2, 4, 9), (2, 2, 4, 8), (2, 4, 8)])
def test_register_tokens_that_do_not_fit(shape: tuple[int, ...]) -> None:
    plan = plan_load({**PAGE4D, "aggregator.register_token": shape}, pi3=PI3)
    check_accounting(plan, {"pi3": PI3})
    assert plan.winner("aggregator.register_token").status == "shape_mismatch"


def test_a_checkpoint_of_other_registers_is_a_mismatch() -> None:
    plan = plan_load({**PAGE4D, "aggregator.register_token": (1, 2, 2, 8)}, PAGE4D)
    entry = plan.winner("aggregator.register_token")
    assert (entry.status, entry.reason) == ("shape_mismatch", "[1, 2, 4, 8] in the file, [1, 2, 2, 8] in the model")


@pytest.mark.parametrize("source", ["page4d_1b", "pi3"])
def test_position_grids_are_resampled(source: str) -> None:
    model = {**PAGE4D, "aggregator.patch_embed.pos_embed": (1, 1 + 36, 8)}
    plan = plan_load(model, small(source), load_encoder=True)
    check_accounting(plan, {"pi3" if source == "pi3" else "checkpoint": small(source)})
    entry = plan.winner("aggregator.patch_embed.pos_embed")
    reason = "position grid 4x4 resampled to 6x6 (bicubic, antialiased)"
    assert (entry.status, entry.reason) == ("adapted", reason)


@pytest.mark.parametrize("shape", [(1, 36, 8), (1, 37, 9), (2, 37, 8), (37, 8)])
def test_position_embeddings_that_do_not_fit(shape: tuple[int, ...]) -> None:
    plan = plan_load({**PAGE4D, "aggregator.patch_embed.pos_embed": shape}, PAGE4D)
    assert plan.winner("aggregator.patch_embed.pos_embed").status == "shape_mismatch"


def test_a_mismatch_leaves_the_place_to_the_other_file() -> None:
    key = "aggregator.frame_blocks.0.norm1.weight"
    file = {**PAGE4D, key: (99,)}
    plan = plan_load(PAGE4D, file, pi3=PI3)
    check_accounting(plan, {"checkpoint": file, "pi3": PI3})
    assert (plan.winner(key).source, plan.winner(key).status) == ("pi3", "remapped")
    assert (entry_of_role(plan, "checkpoint", key).status, entry_of_role(plan, "checkpoint", key).wins) == (
        "shape_mismatch",
        False,
    )


def entry_of_role(plan: LoadPlan, role: str, key: str) -> Entry:
    (found,) = [entry for entry in plan.entries if (entry.source, entry.source_key) == (role, key)]
    return found


# ---- aliases


def test_alias_shapes_must_agree() -> None:
    file = {**PAGE4D, "aggregator.view_blocks.1.norm1.bias": (3,)}
    text = fails(AliasConflictError, "are one tensor and must be equal, got shapes", PAGE4D, file)
    assert "'aggregator.global_blocks.1.norm1.bias' and 'aggregator.view_blocks.1.norm1.bias'" in text
    assert text.endswith("got shapes [8] and [3]")


def test_the_same_name_with_and_without_prefix_is_one_tensor() -> None:
    file = {**PAGE4D, "module.aggregator.camera_token": PAGE4D[TOKEN]}
    plan = plan_load(PAGE4D, file)
    check_accounting(plan, {"checkpoint": file})
    assert plan.agreements == [("checkpoint", TOKEN, f"module.{TOKEN}")]
    assert entry_of(plan, f"module.{TOKEN}").reason == f"same values as {TOKEN}"


def test_twins_of_an_overridden_tensor_are_overridden() -> None:
    file = with_aliases(PAGE4D, both=True)
    plan = plan_load(PAGE4D, file, pi3=PI3, prefer="pi3")
    check_accounting(plan, {"checkpoint": file, "pi3": PI3})
    assert entry_of(plan, "aggregator.time_blocks.0.norm1.weight").status == "overridden"


def test_both_names_of_the_pi3_register_token() -> None:
    file = {**PI3, "encoder.register_token": PI3["register_token"]}
    plan = plan_load(PAGE4D, pi3=file)
    check_accounting(plan, {"pi3": file})
    assert plan.winner("aggregator.register_token").source_key == "register_token"
    assert entry_of(plan, "encoder.register_token").status == "aliased"


# ---- only


@pytest.mark.parametrize(
    ("only", "loaded"),
    [
        ("camera_head", 69),
        (["camera_head", "aggregator.frame_blocks.8-15"], 69 + 8 * 18),
        (["aggregator.view_blocks.3"], 18),
        (["frame_blocks.0-1", "time_blocks.1-2"], 3 * 18),
        (["aggregator.frame_blocks.0-1.attn.qkv"], 4),
        ([TOKEN], 1),
        (["aggregator", "track_head"], 1210 + 394),
        ("aggregator.", 1210),
    ],
    ids=str,
)
def test_only(only: Any, loaded: int) -> None:
    model, file = manifest("page4d_1b"), manifest("vggt_1b")
    plan = plan_load(model, file, only=only)
    check_accounting(plan, {"checkpoint": file})
    report = plan.report()
    assert (report["loaded"], report["excluded"]) == (loaded, 1797 - loaded)
    assert report["missing"] == 0
    assert report.warnings == ()  # a part was asked for: that most of the model is not in it is no news
    assert {e.reason for e in report.entries if e.status == "excluded"} == {"not selected by only="}


@pytest.mark.parametrize(
    ("only", "text"),
    [
        ([], "only must name at least one module, got an empty list"),
        (["camara_head"], "only: the model has no 'camara_head'; did you mean 'camera_head'?"),
        (["aggregator.frame_blocks.30"], r"only: the model has no 'aggregator.frame_blocks.30'; did you mean"),
        (["aggregator.frame_blocks.5-3"], "only: a range must run upwards, got '5-3' in 'aggregator.frame_blocks.5-3'"),
        (["zzz"], "only: the model has no 'zzz'; it has aggregator.camera_token, "),
        ([""], "only must hold names such as 'camera_head', got ''"),
        ([3], "only must hold names such as 'camera_head', got 3"),
    ],
)
def test_only_errors(only: Any, text: str) -> None:
    fails(WeightsError, text.replace("?", r"\?"), PAGE4D, PAGE4D, only=only)


def test_only_can_keep_a_stream_from_being_copied() -> None:
    spec = dual_stream_spec(ModelSpec.of(PAGE4D))
    plan = plan_load(spec, VGGT_1B, only=["aggregator.frame_blocks", "aggregator.pose_frame_blocks.0"])
    assert plan.report()["copied"] == 18
    plan = plan_load(spec, VGGT_1B, only=["aggregator.pose_frame_blocks"])
    entry = plan.winner("aggregator.pose_frame_blocks.0.norm1.bias")
    assert (plan.report()["copied"], entry.cause) == (0, "requested")
    assert entry.reason == "only= leaves out its single-stream block, so there was nothing to copy"


# ---- reasons


def reason(model: dict[str, Any], file: dict[str, Any], key: str) -> str:
    plan = plan_load(model, file)
    check_accounting(plan, {"checkpoint": file})
    found = [entry for entry in plan.entries if key in (entry.source_key, entry.target_key) and entry.reason]
    return found[0].reason


def test_reasons_of_what_is_not_used() -> None:
    without = {key: shape for key, shape in PAGE4D.items() if not key.startswith("track_head.")}
    key = "track_head.tracker.fmap_norm.weight"
    assert reason(without, PAGE4D, key) == "the model has no track_head (enable_track=False)"
    key = "aggregator.frame_blocks.1.norm1.weight"
    one_block = {k: shape for k, shape in PAGE4D.items() if "frame_blocks.1." not in k}
    assert reason(one_block, PAGE4D, key) == "the model has only 1 blocks in aggregator.frame_blocks"
    assert reason(PAGE4D, {**PAGE4D, "extra.thing": (1,)}, "extra.thing") == "no such name in any known scheme"
    assert reason(PAGE4D, {**PAGE4D, "camera_head.odd": (1,)}, "camera_head.odd") == "no such tensor in camera_head"
    gone = {k: shape for k, shape in PAGE4D.items() if k != "camera_head.token_norm.bias"}
    assert reason(gone, PAGE4D, "camera_head.token_norm.bias") == "the model has no such tensor in camera_head"
    dual = {**PAGE4D, "aggregator.lambda_pose_logit": (), "aggregator.memory_tokens": (1, 32, 8)}
    text = "the model has no aggregator.lambda_pose_logit (enable_dual_stream=False)"
    assert reason(PAGE4D, dual, "aggregator.lambda_pose_logit") == text
    text = "the model has no aggregator.memory_tokens (no memory bank)"
    assert reason(PAGE4D, dual, "aggregator.memory_tokens") == text


def test_buffers_that_the_model_makes_itself() -> None:
    file = {**PAGE4D, "_scale": (1,)}
    plan = plan_load(Tree(PAGE4D), file)
    assert entry_of(plan, "_scale").reason == "a buffer that the model makes itself"


def test_reasons_of_what_is_missing() -> None:
    def without(*parts: str) -> dict[str, Any]:
        return {key: shape for key, shape in PAGE4D.items() if not any(part in key for part in parts)}

    assert reason(PAGE4D, without("point_head."), "point_head.norm.bias") == "the file holds nothing of point_head"
    key = "aggregator.frame_blocks.1.norm1.weight"
    assert reason(PAGE4D, without("frame_blocks.1."), key) == "the file has only 1 blocks in aggregator.frame_blocks"
    assert reason(PAGE4D, without(key), key) == "the file has no such tensor"
    plan = plan_load(PAGE4D, without("point_head."))
    assert plan.report()["missing"] == 62


def test_parts_that_a_vggt_mv_file_was_saved_without() -> None:
    dual = small("vggt_mv_aggregator_dual_memory")
    file = {key: shape for key, shape in dual.items() if "spatial_mask" not in key and key != "memory_tokens"}
    report = plan_load(dual, file).report()
    assert (report["missing"], report["cannot_have"]) == (0, 9)
    reasons = {entry.reason for entry in report.kept()}
    assert reasons == {
        "the file was saved without aggregator.spatial_mask_head; it stays untrained (mask_layer=None leaves it out)",
        "the file was saved without aggregator.memory_tokens",
    }


# ---- warnings: one line with the likely cause


def warning(model: Any, *args: Any, **options: Any) -> str:
    (line,) = plan_load(model, *args, **options).report().warnings
    assert "\n" not in line
    return line


def test_warning_for_another_size() -> None:
    wide = {key: shape if "head" in key else (*shape[:-1], 2 * shape[-1]) for key, shape in PAGE4D.items() if shape}
    line = warning(wide, {key: shape for key, shape in VGGT_1B.items() if "head" not in key})
    assert line.endswith(
        ": a model of another size: aggregator.camera_token is [1, 2, 1, 8] in the file and [1, 2, 1, 16] in the model"
    )
    assert line.startswith("only 0 of ")


def test_warning_for_strange_names() -> None:
    file = {f"backbone.{key}" if i % 3 else key: shape for i, (key, shape) in enumerate(VGGT_1B.items())}
    line = warning(PAGE4D, file)
    strange = sum(key.startswith("backbone.") for key in file)
    first = next(key for key in file if key.startswith("backbone."))
    assert f"{strange} of {len(file)} names of the file are not of this model ({first!r}: no such name" in line


def test_warning_for_a_partial_file() -> None:
    file = {key: shape for key, shape in VGGT_1B.items() if key.startswith("camera_head.")}
    line = warning(PAGE4D, file)
    assert line.startswith(
        f"only {len(file)} of {len(PAGE4D)} tensors of manifest are in state_dict: the file holds only"
    )
    assert "nothing or little was found for track_head" in line


def test_warning_for_an_aggregator_in_a_model_with_large_heads() -> None:
    file = {key: shape for key, shape in aggregator_of(VGGT_1B).items() if "frame_blocks" in key}
    assert warning(PAGE4D, file).endswith("the file holds the aggregator alone")


# ---- names of no known scheme


def test_names_of_another_model() -> None:
    file = {f"layer{i}.conv.weight": (3, 3) for i in range(10)}
    text = fails(UnknownSchemeError, "weights of another model, such as 'layer0.conv.weight'", PAGE4D, file)
    known = "vggt (0 of 10 names), vggt (aggregator alone) (0 of 10 names), page4d (0 of 10 names)"
    assert text.endswith(f"nearest known schemes: {known}; give weights of VGGT, PAGE-4D, VGGT_MV or Pi3")
    file |= {TOKEN: (1, 2, 1, 8)}
    text = fails(UnknownSchemeError, "weights of another model", PAGE4D, file)
    assert "vggt (1 of 11 names), page4d (1 of 11 names), vggt_mv (1 of 11 names)" in text


def test_an_unknown_prefix_is_named() -> None:
    file = {f"net.{key}": shape for key, shape in VGGT_1B.items()}
    text = fails(UnknownSchemeError, "are of no known scheme because of the prefix 'net.'", PAGE4D, file)
    assert "known prefixes: module., _orig_mod., model." in text


def test_names_that_only_the_model_knows_are_fine() -> None:
    shapes = {"custom.a": (2,), "custom.b": (3,)}
    plan = plan_load(shapes, shapes)
    assert plan.report()["loaded"] == 2
    assert plan.report().sources[0].family == "unknown"


# ---- dtypes


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "int64"),
        (torch.uint8, "uint8"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_dtypes_that_are_no_weights(dtype: torch.dtype, name: str) -> None:
    file = {key: torch.empty(shape, device="meta") for key, shape in PAGE4D.items()}
    file[TOKEN] = file[TOKEN].to(dtype)
    text = fails(TensorValueError, f"'{TOKEN}' must have a float dtype", Tree(PAGE4D), file)
    assert text.endswith(f"(float64, float32, float16, bfloat16), got {name}")
    # where nothing of the model is made of it, its dtype is nobody's business
    plan = plan_load(Tree(PAGE4D), file, only="camera_head")
    assert plan.report()["loaded"] == 69 - 0


def test_integer_buffers_need_their_dtype() -> None:
    model = Tree(PAGE4D)
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    file: dict[str, Any] = {**{k: torch.empty(s, device="meta") for k, s in PAGE4D.items()}, "count": torch.tensor(1.0)}
    fails(TensorValueError, "'count' must have int64, got float32", model, file)
    file["count"] = torch.tensor(3)
    assert plan_load(model, file).report()["loaded"] == len(PAGE4D) + 1


def test_shallow_manifests_keep_their_families() -> None:
    """The helper of the property tests does not change what the files are."""
    for name in ("vggt_1b", "page4d_1b", "vggt_mv_aggregator_dual_memory", "pi3"):
        found = plan_load(shallow(name), shallow(name), "auto").report().sources[0].family
        assert found.startswith(name[: name.index("_1b")] if "_1b" in name else name[:3])
