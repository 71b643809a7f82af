"""The four real checkpoints, end to end: what is loaded, what cannot be, and that planning is quick."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from weights_support import Tree, aggregator_of, check_accounting, manifest, with_aliases

from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.vggt import VGGT, VGGT_MV
from vggt_mv.weights import LoadReport, ModelSpec, dual_stream_spec, parameters_on_meta, plan_load
from vggt_mv.weights.preview import config_spec
from vggt_mv.weights.rules import canonical_name, module_of

VGGT_1B, PAGE4D, DUAL, PI3 = (
    manifest(name) for name in ("vggt_1b", "page4d_1b", "vggt_mv_aggregator_dual_memory", "pi3")
)


@pytest.fixture(scope="module")
def vggt_mv() -> VGGT_MV:
    with parameters_on_meta():
        return VGGT_MV()


@pytest.fixture(scope="module")
def vggt() -> VGGT:
    with parameters_on_meta():
        return VGGT()


def kept(report: LoadReport) -> dict[str, tuple[int, str, str]]:
    """module -> (tensors kept, cause, first reason)."""
    found: dict[str, tuple[int, str, str]] = {}
    for entry in report.kept():
        module = module_of(canonical_name(entry.target_key or ""))
        count, cause, reason = found.get(module, (0, entry.cause or "", entry.reason))
        found[module] = (count + 1, cause, reason)
    return found


def test_models_have_the_names_of_the_manifests(vggt: VGGT, vggt_mv: VGGT_MV) -> None:
    assert {name: info.shape for name, info in ModelSpec.of(vggt).tensors.items()} == VGGT_1B
    assert {name: info.shape for name, info in ModelSpec.of(vggt_mv).tensors.items()} == PAGE4D


def test_vggt_into_vggt_mv_misses_only_what_it_cannot_have(vggt_mv: VGGT_MV) -> None:
    plan = plan_load(vggt_mv, VGGT_1B)
    report = plan.report()
    check_accounting(plan, {"checkpoint": VGGT_1B})
    assert (report["checkpoint_loaded"], report["missing"], report["unexpected"]) == (1797, 0, 0)
    reason = "VGGT has no aggregator.spatial_mask_head; it stays untrained (mask_layer=None leaves it out)"
    assert kept(report) == {"aggregator.spatial_mask_head": (8, "cannot_have", reason)}
    assert report.warnings == ()


def test_page4d_into_vggt_mv_is_complete(vggt_mv: VGGT_MV) -> None:
    plan = plan_load(vggt_mv, PAGE4D)
    report = plan.report()
    check_accounting(plan, {"checkpoint": PAGE4D})
    assert {name: count for name, count in report.items() if count} == {
        "checkpoint_loaded": 1805,
        "loaded": 1805,
        "model_tensors": 1805,
        "source_tensors": 1805,
    }
    report.raise_unless_strict()


def test_page4d_into_vggt_has_a_mask_head_too_many(vggt: VGGT) -> None:
    plan = plan_load(vggt, PAGE4D)
    report = plan.report()
    check_accounting(plan, {"checkpoint": PAGE4D})
    assert (report["loaded"], report["missing"], report["unexpected"]) == (1797, 0, 8)
    reasons = {entry.reason for entry in report.entries if entry.status == "unexpected"}
    assert reasons == {"the model has no aggregator.spatial_mask_head (VGGT has none, VGGT_MV has one)"}


def test_whole_checkpoint_into_an_aggregator() -> None:
    """The load that once matched nothing: here it fills the aggregator and says what has no place."""
    with parameters_on_meta():
        model = Aggregator()
    plan = plan_load(model, VGGT_1B)
    report = plan.report()
    check_accounting(plan, {"checkpoint": VGGT_1B})
    assert (report["loaded"], report["missing"], report["unexpected"]) == (1210, 0, 587)
    reasons = {entry.reason for entry in report.entries if entry.status == "unexpected"}
    assert reasons == {"the model is the aggregator alone"}


def test_aggregator_file_into_a_whole_model(vggt_mv: VGGT_MV) -> None:
    file = aggregator_of(PAGE4D)
    plan = plan_load(vggt_mv, file)
    report = plan.report()
    check_accounting(plan, {"checkpoint": file})
    assert (report["loaded"], report["missing"], report["cannot_have"]) == (1218, 587, 0)
    assert kept(report)["track_head"] == (394, "missing", "the file holds the aggregator alone")


def test_dual_stream_file_with_its_aliases() -> None:
    plan = plan_load(DUAL, DUAL)
    report = plan.report()
    check_accounting(plan, {"checkpoint": DUAL})
    assert (report["loaded"], report["aliased"], report["missing"]) == (3813 - 864, 864, 0)
    assert len(plan.agreements) == 864
    # a name and its alias are one tensor with one winner
    assert plan.winner("view_blocks.3.norm1.bias") == plan.winner("global_blocks.3.norm1.bias")
    assert plan.winner("view_blocks.3.norm1.bias").source_key == "global_blocks.3.norm1.bias"


@pytest.mark.parametrize(("file", "family"), [(VGGT_1B, "VGGT"), (PAGE4D, "PAGE-4D")], ids=["vggt", "page4d"])
def test_dual_stream_starts_as_copies(file: dict[str, tuple[int, ...]], family: str) -> None:
    spec = dual_stream_spec(config_spec("vggt_mv_1b"), memory_tokens=32)
    plan = plan_load(spec, file)
    report = plan.report()
    check_accounting(plan, {"checkpoint": file})
    assert (report["loaded"], report["copied"], report["missing"]) == (len(file), 4 * 432, 0)
    modules = Counter(module_of(entry.target_key or "") for entry in report.entries if entry.status == "copied")
    assert modules == {f"aggregator.{s}_{kind}_blocks": 432 for s in ("pose", "geo") for kind in ("frame", "global")}
    entry = plan.winner("aggregator.geo_global_blocks.5.ls1.gamma")
    assert entry.copied_from == "aggregator.global_blocks.5.ls1.gamma"
    lambdas = kept(report)["aggregator.lambda_pose_logit"]
    assert lambdas == (1, "cannot_have", f"{family} has no aggregator.lambda_pose_logit")
    assert kept(report)["aggregator.memory_tokens"][1] == "cannot_have"


def test_dual_stream_spec_is_the_manifest() -> None:
    derived = dual_stream_spec(config_spec("vggt_mv_1b"), memory_tokens=32)
    real = ModelSpec.of(DUAL)
    aggregator = {name: info.shape for name, info in derived.tensors.items() if name.startswith("aggregator.")}
    assert aggregator == {name: info.shape for name, info in real.tensors.items()}
    assert len(real.aliases) == 864


def test_dual_stream_of_a_damaged_dual_file_is_missing_and_not_copied() -> None:
    file = {key: shape for key, shape in DUAL.items() if not key.startswith("geo_frame_blocks.7.")}
    plan = plan_load(DUAL, file)
    report = plan.report()
    check_accounting(plan, {"checkpoint": file})
    assert (report["copied"], report["missing"]) == (0, 18)
    assert kept(report) == {"aggregator.geo_frame_blocks": (18, "missing", "the file has no such tensor")}


def test_pi3_into_vggt_mv(vggt_mv: VGGT_MV) -> None:
    plan = plan_load(vggt_mv, pi3=PI3)
    report = plan.report()
    check_accounting(plan, {"pi3": PI3})
    assert (report["pi3_loaded"], report["remapped"], report["adapted"]) == (649, 648, 1)
    assert (report["unexpected"], report["excluded"], report["missing"]) == (218 + 0, 343, 0)
    assert {e.reason for e in report.entries if e.status == "unexpected"} == {"Pi3 has no such part in VGGT_MV"}
    rounds = "Pi3 has 36 decoder blocks: rounds 18 and later keep what they had"
    assert kept(report)["aggregator.frame_blocks"] == (6 * 18, "cannot_have", rounds)
    assert kept(report)["aggregator.global_blocks"] == (6 * 18, "cannot_have", rounds)
    targets = [entry.target_key or "" for entry in report.kept()]
    assert {int(key.split(".")[2]) for key in targets if "frame_blocks" in key} == set(range(18, 24))
    assert kept(report)["aggregator.patch_embed"][1:] == ("requested", "load_encoder=False")
    assert "Pi3's block LayerNorms were trained with eps 1e-6; these blocks compute with 1e-5" in report.notes
    assert report.warnings == (
        "only 649 of 1805 tensors of VGGT_MV are in state_dict: Pi3 holds only the attention blocks; "
        "a whole-model checkpoint (checkpoint_path) has the rest",
    )


def test_pi3_encoder_on_request(vggt_mv: VGGT_MV) -> None:
    plan = plan_load(vggt_mv, pi3=PI3, load_encoder=True)
    report = plan.report()
    check_accounting(plan, {"pi3": PI3})
    assert (report["remapped"], report["adapted"], report["excluded"]) == (648 + 343, 1, 0)
    assert kept(report)["aggregator.patch_embed"] == (1, "cannot_have", "Pi3's encoder has no mask token")


@pytest.mark.parametrize("prefer", ["checkpoint", "pi3"])
def test_combined_load(vggt_mv: VGGT_MV, prefer: str) -> None:
    plan = plan_load(vggt_mv, PAGE4D, pi3=PI3, prefer=prefer, load_encoder=True)  # type: ignore[arg-type]
    report = plan.report()
    check_accounting(plan, {"checkpoint": PAGE4D, "pi3": PI3})
    assert report["missing"] == report["kept_init"] == 0
    if prefer == "pi3":
        assert (report["checkpoint_loaded"], report["pi3_loaded"], report["overridden"]) == (1805 - 992, 992, 992)
        assert report.warnings == ()
        assert plan.winner("aggregator.register_token").status == "adapted"
        assert plan.winner("aggregator.frame_blocks.17.ls1.gamma").status == "remapped"
        assert plan.winner("aggregator.frame_blocks.18.ls1.gamma").status == "loaded"
    else:
        assert (report["checkpoint_loaded"], report["pi3_loaded"], report["overridden"]) == (1805, 0, 992)
        line = "nothing of state_dict (pi3) survives: the other file has all that it offers"
        assert report.warnings == (line,)
        loser = next(entry for entry in report.entries if entry.source_key == "decoder.0.norm1.weight")
        assert (loser.status, loser.reason) == ("overridden", "taken from the checkpoint file")


def test_pi3_into_dual_stream_copies_only_what_it_filled() -> None:
    plan = plan_load(dual_stream_spec(config_spec("vggt_mv_1b")), pi3=PI3)
    report = plan.report()
    check_accounting(plan, {"pi3": PI3})
    assert report["copied"] == 4 * 18 * 18
    entry = plan.winner("aggregator.pose_frame_blocks.18.norm1.bias")
    assert (entry.status, entry.cause) == ("kept_init", "cannot_have")
    assert entry.reason == "its single-stream block was not loaded, so there was nothing to copy"


def test_aliased_file_is_aliased_not_lost(vggt_mv: VGGT_MV) -> None:
    file = with_aliases(PAGE4D)
    plan = plan_load(vggt_mv, file)
    report = plan.report()
    check_accounting(plan, {"checkpoint": file})
    assert (report["loaded"], report["aliased"], report["missing"]) == (1805 - 864, 864, 0)
    assert report["checkpoint_loaded"] == 1805


@pytest.mark.parametrize(
    ("model", "file"),
    [(PAGE4D, PAGE4D), (DUAL, DUAL), (PAGE4D, PI3)],
    ids=["1805 tensors", "3813 tensors", "pi3"],
)
def test_planning_a_meta_model_takes_under_a_second(
    model: dict[str, tuple[int, ...]], file: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        tree = Tree(model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        plan_load(tree, file)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
