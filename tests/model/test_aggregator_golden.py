"""The aggregator against recorded outputs of the public VGGT, PAGE-4D and VGGT_MV code.

Tolerance 1e-5, relative Frobenius error; measured 2.5e-7 to 4.6e-7 with the reference operators.
"""

from __future__ import annotations

import pytest
import torch

from tests.golden.fixtures import Fixture

pytestmark = pytest.mark.usefixtures("linear_layers")


def _run(golden, **options):
    with torch.inference_mode():
        return golden.aggregator(**options)(golden.arrays["images"])


def _camera_head(golden):
    return golden.heads()["camera_head"]


def test_keys_and_shapes_are_the_recorded_ones(golden_aggregator):
    own = {key: list(value.shape) for key, value in golden_aggregator.aggregator().state_dict().items()}
    assert own == golden_aggregator.info["aggregator_keys"]


def test_outputs_are_the_recorded_ones(golden_aggregator, rel):
    outputs, patch_start_idx, *_ = _run(golden_aggregator)
    assert len(outputs) == int(golden_aggregator.arrays["num_outputs"])
    assert patch_start_idx == int(golden_aggregator.arrays["patch_start_idx"])
    errors = {i: rel(outputs[i], golden_aggregator.arrays[f"tokens_{i}"]) for i in golden_aggregator.layers}
    print(errors)
    assert max(errors.values()) < 1e-5


def test_cameras_from_own_outputs_are_the_recorded_ones(golden_aggregator, rel):
    outputs = _run(golden_aggregator)[0]
    tokens = outputs[-1].flatten(1, 2) if outputs[-1].ndim == 5 else outputs[-1]
    with torch.inference_mode():
        encodings = _camera_head(golden_aggregator)([tokens])
    for i, encoding in enumerate(encodings):
        assert rel(encoding, golden_aggregator.arrays[f"pose_enc_{i}"]) < 1e-5


def test_in_page4d_the_mask_is_what_makes_it_agree(rel):
    golden = Fixture("page4d_tiny")
    head = _camera_head(golden)
    errors = {}
    for name, mask_layer in (("with", 7), ("without", None)):
        outputs, _, extras = _run(golden, mask_layer=mask_layer)
        assert (extras is None) == (mask_layer is None)
        with torch.inference_mode():
            encoding = head(outputs)[-1]
        errors[name] = rel(outputs[9], golden.arrays["tokens_9"]), rel(encoding, golden.arrays["pose_enc_3"])
        # Up to the layer after which the mask is predicted there is no difference.
        assert rel(outputs[7], golden.arrays["tokens_7"]) < 1e-5
    print(errors)
    assert max(errors["with"]) < 1e-5
    assert min(errors["without"]) > 5e-4


def test_the_order_and_the_position_of_special_tokens_matter(rel):
    golden = Fixture("vggt_mv_tiny")
    recorded = golden.arrays["tokens_9"]
    assert rel(_run(golden, aa_order=["time", "view"])[0][9], recorded) > 1e-3
    assert rel(_run(golden, special_token_position="first_patch")[0][9], recorded) > 1e-3


def test_relative_error_never_passes_nan(rel):
    x = torch.ones(3)
    assert rel(x, x) == 0
    assert rel(torch.tensor([1.0, float("nan"), 1.0]), x) == float("inf")
    assert rel(x, torch.tensor([1.0, float("nan"), 1.0])) == float("inf")
