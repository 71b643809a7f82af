"""`view_blocks` and `time_blocks`: other names of `global_blocks` and `frame_blocks`, never a second copy."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from vggt_mv.models.vggt import VGGT_MV

ALIASES = {"global_blocks": "view_blocks", "frame_blocks": "time_blocks"}


def _renamed(state_dict, both=False):
    """The state dict with the alias names, or with both."""
    out = {}
    for key, value in state_dict.items():
        alias = re.sub(r"(?<![a-z_])(global_blocks|frame_blocks)\.", lambda m: ALIASES[m[1]] + ".", key)
        out[alias] = value
        if both:
            out[key] = value
    return out


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("both", [False, True], ids=["alias_names", "both_names"])
@pytest.mark.parametrize("whole", [False, True], ids=["aggregator", "whole_model"])
def test_alias_names_load_strictly(tiny_aggregator, tiny_model, both, whole):
    source, target = (tiny_model(VGGT_MV, s) if whole else tiny_aggregator(s) for s in (0, 1))
    state = _renamed(source.state_dict(), both)
    assert any("view_blocks" in key for key in state)
    keys = list(state)
    result = target.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert _same_weights(source, target)
    assert list(state) == keys, "the caller's dict must stay as it was"


def test_only_one_of_the_lists_may_be_aliased(tiny_aggregator):
    source, target = tiny_aggregator(0), tiny_aggregator(1)
    state = {k.replace("global_blocks", "view_blocks"): v for k, v in source.state_dict().items()}
    target.load_state_dict(state)
    assert _same_weights(source, target)


def test_two_names_that_disagree_are_an_error_that_names_the_key(tiny_model):
    model = tiny_model(VGGT_MV)
    state = _renamed(model.state_dict(), both=True)
    key = "aggregator.view_blocks.2.mlp.fc1.weight"
    state[key] = state[key] + 1
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=re.escape(key) + r" and aggregator\.global_blocks\.2\.mlp\.fc1\.weight"):
            model.load_state_dict(state, strict=strict)


def test_missing_and_unexpected_keys_have_canonical_names(tiny_aggregator):
    model = tiny_aggregator()
    state = _renamed(model.state_dict())
    del state["view_blocks.0.norm1.bias"]
    state["time_blocks.0.norm9.bias"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Missing.*"global_blocks\.0\.norm1\.bias"'):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["global_blocks.0.norm1.bias"]
    assert result.unexpected_keys == ["frame_blocks.0.norm9.bias"]


def test_saving_writes_canonical_names_only(tiny_model):
    model = tiny_model(VGGT_MV).aggregator  # the tracker has time_blocks of its own
    for names in (model.state_dict(), dict(model.named_parameters()), dict(model.named_modules())):
        assert not any("view_blocks" in name or "time_blocks" in name for name in names)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float64), lambda m: m],
    ids=["deepcopy", "pickle", "to", "itself"],
)
def test_an_alias_is_the_same_module(tiny_aggregator, duplicate):
    model = duplicate(tiny_aggregator())
    assert model.view_blocks is model.global_blocks
    assert model.time_blocks is model.frame_blocks
    assert model.get_parameter("view_blocks.1.norm1.weight") is model.global_blocks[1].norm1.weight
    with torch.no_grad():
        model.time_blocks[0].norm1.weight.fill_(7)
    assert model.state_dict()["frame_blocks.0.norm1.weight"].eq(7).all()


def test_setting_an_alias_sets_the_blocks(tiny_aggregator):
    model, other = tiny_aggregator(0), tiny_aggregator(1)
    keys = list(model.state_dict())
    model.view_blocks = other.global_blocks
    assert model.global_blocks is other.global_blocks
    assert list(model.state_dict()) == keys


def test_shapes_alone_are_compared_on_the_meta_device(tiny_aggregator):
    model = tiny_aggregator().to("meta")
    state = _renamed(model.state_dict(), both=True)
    assert not model.load_state_dict(state, assign=True).missing_keys
