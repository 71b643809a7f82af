"""Random subsets, renames, prefixes, aliases and corruptions of the real manifests: every tensor is accounted for.

What a change does to a tensor is known when the change is made, so besides the bookkeeping each entry is checked
against what it must be.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_support import Shapes, aggregator_of, check_accounting, manifest, shallow, with_aliases

from vggt_mv.weights import LoadPlan, UnknownSchemeError, plan_load
from vggt_mv.weights.rules import KNOWN_SHARE, canonical_name

_SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
_PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.model.")


def damage(
    shapes: Shapes, rng: random.Random, drop: float, rename: float, corrupt: float
) -> tuple[Shapes, dict[str, str]]:
    """A damaged copy, and what became of each name: "kept", "dropped", "renamed" or "corrupt"."""
    fate = {}
    damaged: Shapes = {}
    for key, shape in shapes.items():
        roll = rng.random()
        if roll < drop:
            fate[key] = "dropped"
        elif roll < drop + rename:
            fate[key] = "renamed"
            damaged[f"{key}_renamed"] = shape
        elif roll < drop + rename + corrupt:
            fate[key] = "corrupt"
            damaged[key] = (3, *shape)  # another rank: no shape rule can mend it
        else:
            fate[key] = "kept"
            damaged[key] = shape
    return damaged, fate


def planned(model: Shapes, roles: dict[str, Shapes], **options: Any) -> LoadPlan | None:
    """The plan, or None where too little is left of a file to know it (and the error is right about that)."""
    try:
        return plan_load(model, roles.get("checkpoint"), pi3=roles.get("pi3"), **options)
    except UnknownSchemeError:
        assert any(
            sum(canonical_name(key) in model for key in file) < KNOWN_SHARE * len(file) for file in roles.values()
        )
        return None


shares = st.sampled_from((0.0, 0.02, 0.3, 0.7))


@settings(_SETTINGS, max_examples=40)
@given(
    name=st.sampled_from(("vggt_1b", "page4d_1b")),
    seed=st.integers(0, 2**32),
    drop=shares,
    rename=shares,
    corrupt=shares,
    prefix=st.sampled_from(_PREFIXES),
    alias=st.sampled_from(("no", "instead", "besides")),
)
def test_damaged_whole_model_files(
    name: str, seed: int, drop: float, rename: float, corrupt: float, prefix: str, alias: str
) -> None:
    model = shallow("page4d_1b")
    damaged, fate = damage(shallow(name), random.Random(seed), drop, rename, corrupt)
    file = {"no": damaged, "instead": with_aliases(damaged), "besides": with_aliases(damaged, both=True)}[alias]
    file = {prefix + key: shape for key, shape in file.items()}
    if not file:
        return
    plan = planned(model, {"checkpoint": file})
    if plan is None:
        return
    check_accounting(plan, {"checkpoint": file})
    winners = plan.report().winners
    for key, what in fate.items():
        entry = winners[key]
        if what == "kept":
            aliased = alias == "instead" and ("frame_blocks" in key or "global_blocks" in key)
            assert entry.status == ("aliased" if aliased else "loaded")
        elif what == "corrupt":
            assert entry.status == "shape_mismatch"
        else:
            assert entry.status == "kept_init"
            assert entry.cause == "missing" or "spatial_mask_head" in key
    renamed = sum(what == "renamed" for what in fate.values())
    assert plan.report()["unexpected"] == renamed + _doubled(fate, alias)
    if prefix:
        assert "".join(plan.report().sources[0].prefixes) == prefix


def _doubled(fate: dict[str, str], alias: str) -> int:
    """Renamed tensors of aliased blocks that are in the file twice."""
    blocks = ("aggregator.frame_blocks.", "aggregator.global_blocks.")
    return sum(what == "renamed" and key.startswith(blocks) for key, what in fate.items()) if alias == "besides" else 0


@_SETTINGS
@given(seed=st.integers(0, 2**32), drop=shares, rename=shares, corrupt=shares, encoder=st.booleans())
def test_damaged_pi3_files(seed: int, drop: float, rename: float, corrupt: float, encoder: bool) -> None:
    model = shallow("page4d_1b")
    file, _ = damage(shallow("pi3"), random.Random(seed), drop, rename, corrupt)
    try:
        plan = plan_load(model, file, "pi3", load_encoder=encoder)
    except ValueError:
        assert not file
        return
    check_accounting(plan, {"pi3": file})
    for entry in plan.entries:
        if entry.source_key is not None and entry.source_key.endswith("_renamed"):
            assert entry.status in ("unexpected", "excluded")


@_SETTINGS
@given(
    seed=st.integers(0, 2**32),
    drop=shares,
    prefer=st.sampled_from(("checkpoint", "pi3")),
    encoder=st.booleans(),
    dual=st.booleans(),
    only=st.sampled_from(
        (None, "aggregator", ["aggregator.frame_blocks.1-2", "aggregator.camera_token"], ["aggregator.view_blocks.0-1"])
    ),
)
def test_combined_loads(
    seed: int, drop: float, prefer: str, encoder: bool, dual: bool, only: str | list[str] | None
) -> None:
    rng = random.Random(seed)
    model = shallow("vggt_mv_aggregator_dual_memory") if dual else shallow("page4d_1b")
    checkpoint, _ = damage(shallow("page4d_1b"), rng, drop, 0.05, 0.05)
    pi3, _ = damage(shallow("pi3"), rng, drop, 0.0, 0.05)
    roles = {"checkpoint": checkpoint, "pi3": pi3}
    plan = planned(model, roles, prefer=prefer, load_encoder=encoder, only=only)
    assert plan is not None
    check_accounting(plan, roles)
    report = plan.report()
    for entry in report.entries:
        if entry.status == "overridden":
            winner = report.winners[entry.target_key or ""]
            assert winner.wins
            assert winner.source == prefer
            assert winner.source != entry.source
        if only is not None and entry.wins and entry.status != "kept_init":
            assert entry.target_key is not None
            assert canonical_name(entry.target_key) in plan.selection


@settings(_SETTINGS, max_examples=20)
@given(seed=st.integers(0, 2**32), drop=shares, rename=shares, prefix=st.sampled_from(_PREFIXES))
def test_damaged_dual_stream_files(seed: int, drop: float, rename: float, prefix: str) -> None:
    model = shallow("vggt_mv_aggregator_dual_memory")
    damaged, _ = damage(model, random.Random(seed), drop, rename, 0.0)
    file = {prefix + key: shape for key, shape in damaged.items()}
    plan = planned(model, {"checkpoint": file})
    if plan is not None:
        check_accounting(plan, {"checkpoint": file})


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.model."])
@pytest.mark.parametrize("part", ["whole", "aggregator"])
@pytest.mark.parametrize("into", ["whole", "aggregator"])
def test_every_combination_of_wrapping(prefix: str, part: str, into: str) -> None:
    """File and model, each whole or the aggregator alone, with any prefix: what both have is loaded."""
    whole = manifest("page4d_1b")
    file = {prefix + key: shape for key, shape in (whole if part == "whole" else aggregator_of(whole)).items()}
    model = whole if into == "whole" else aggregator_of(whole)
    plan = plan_load(model, file)
    check_accounting(plan, {"checkpoint": file})
    assert plan.report()["loaded"] == (1805 if (part, into) == ("whole", "whole") else 1218)
