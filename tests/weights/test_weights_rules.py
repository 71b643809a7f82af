"""Names to names: prefixes, aliases, families, Pi3."""

from __future__ import annotations

import pytest
from weights_support import MANIFESTS, aggregator_of, manifest, with_aliases

from vggt_mv.weights import rules


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("aggregator.frame_blocks.0.norm1.weight", "aggregator.frame_blocks.0.norm1.weight"),
        ("time_blocks.23.ls1.gamma", "aggregator.frame_blocks.23.ls1.gamma"),
        ("aggregator.view_blocks.3.attn.qkv.bias", "aggregator.global_blocks.3.attn.qkv.bias"),
        ("module.model.aggregator.camera_token", "aggregator.camera_token"),
        ("_orig_mod.module.camera_head.token_norm.bias", "camera_head.token_norm.bias"),
        ("aggregator._orig_mod.frame_blocks.1.norm1.bias", "aggregator.frame_blocks.1.norm1.bias"),
        ("lambda_pose_logit", "aggregator.lambda_pose_logit"),
        ("patch_embed.blocks.0.norm1.weight", "aggregator.patch_embed.blocks.0.norm1.weight"),
        ("something.else", "something.else"),
        ("model.", "model."),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert rules.canonical_name(name) == canonical


def test_peel_names_what_it_took() -> None:
    assert rules.peel("module._orig_mod.model.x") == ("x", ("module.", "_orig_mod.", "model."))
    assert rules.peel("modulex.y") == ("modulex.y", ())


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_real_name_is_known(name: str) -> None:
    unknown = [
        k for k in manifest(name) if not rules.known_families(rules.canonical_name(k)) and not rules.is_pi3_name(k)
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("vggt_1b", "vggt"),
        ("page4d_1b", "page4d"),
        ("vggt_mv_aggregator_dual_memory", "vggt_mv (aggregator alone)"),
        ("pi3", "pi3"),
    ],
)
def test_family_of_real_files(name: str, label: str) -> None:
    found = rules.detect(manifest(name))
    assert (found.label, found.known, found.recorded) == (label, len(manifest(name)), False)


def test_family_of_variants() -> None:
    page4d = manifest("page4d_1b")
    assert rules.detect(aggregator_of(page4d)).label == "page4d (aggregator alone)"
    assert rules.detect(with_aliases(page4d)).label == "vggt_mv"
    assert rules.detect(f"module.{key}" for key in page4d).label == "page4d"
    assert rules.detect(page4d, {rules.FAMILY_KEY: "vggt_mv"}).label == "vggt_mv"
    assert rules.detect(page4d, {rules.FAMILY_KEY: "vggt_mv"}).recorded
    # a record that the names contradict is not believed
    assert rules.detect(page4d, {rules.FAMILY_KEY: "pi3"}).label == "page4d"
    assert rules.detect(page4d, {rules.FAMILY_KEY: "nonsense"}).label == "page4d"
    assert rules.detect(["conv1.weight", "fc.bias"]).label == "unknown"
    assert rules.detect([]).label == "unknown"


@pytest.mark.parametrize(
    ("name", "target", "encoder"),
    [
        ("decoder.0.norm1.weight", "aggregator.frame_blocks.0.norm1.weight", False),
        ("decoder.1.norm1.weight", "aggregator.global_blocks.0.norm1.weight", False),
        ("decoder.34.ls2.gamma", "aggregator.frame_blocks.17.ls2.gamma", False),
        ("decoder.35.ls2.gamma", "aggregator.global_blocks.17.ls2.gamma", False),
        ("register_token", "aggregator.register_token", False),
        ("encoder.register_token", "aggregator.register_token", False),
        ("encoder.register_tokens", "aggregator.patch_embed.register_tokens", True),
        ("encoder.pos_embed", "aggregator.patch_embed.pos_embed", True),
        ("module.encoder.blocks.3.ls1.gamma", "aggregator.patch_embed.blocks.3.ls1.gamma", True),
        ("point_decoder.blocks.0.norm1.weight", None, False),
        ("conf_head.proj.bias", None, False),
        ("camera_head.fc_t.weight", None, False),
        ("image_mean", None, False),
    ],
)
def test_pi3_names(name: str, target: str | None, encoder: bool) -> None:
    assert rules.pi3_target(name) == (target, encoder)


def test_module_and_index() -> None:
    assert rules.module_of("aggregator.frame_blocks.7.norm1.bias") == "aggregator.frame_blocks"
    assert rules.index_of("aggregator.frame_blocks.7.norm1.bias") == 7
    assert rules.module_of("track_head.tracker.fmap_norm.bias") == "track_head"
    assert rules.index_of("track_head.tracker.fmap_norm.bias") is None


def test_nearest_schemes() -> None:
    names = [*aggregator_of(manifest("vggt_1b"))][:40]
    assert rules.nearest_schemes([*names, *("x.y" + n for n in names)])[0] == ("vggt (aggregator alone)", 40)
    assert [count for _, count in rules.nearest_schemes(["a.b"])] == [0, 0, 0]


def test_foreign_prefix() -> None:
    names = manifest("vggt_1b")
    assert rules.foreign_prefix([f"net.core.{name}" for name in names]) == "net.core."
    assert rules.foreign_prefix([*(f"net.{name}" for name in names), "other"]) is None
    assert rules.foreign_prefix(["net.a", "net.b"]) is None
    assert rules.foreign_prefix([]) is None
