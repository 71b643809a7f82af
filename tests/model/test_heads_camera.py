"""CameraHead against a plain transcription of its formula, and its promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.camera_head import CameraHead

DIM = 32


@pytest.fixture(autouse=True)
def _seeded_and_on_one_thread() -> Iterator[None]:
    """Tensors are tiny here: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(**options: Any) -> CameraHead:
    head = CameraHead(DIM, **({"trunk_depth": 2, "num_heads": 4, "init_values": 0.3} | options)).double()
    with torch.no_grad():
        head.empty_pose_tokens.normal_()
    return head


def outputs(batch: int = 2, frames: int = 3) -> list[Tensor | None]:
    return [None, None, torch.randn(batch, frames, 7, DIM, dtype=torch.float64)]


def plain_camera(head: CameraHead, tokens: Tensor, iterations: int) -> list[Tensor]:
    """The formula for the un-activated encodings."""
    x = head.token_norm(tokens[:, :, 0])
    total, results = torch.zeros(*x.shape[:2], 9, dtype=x.dtype), []
    for i in range(iterations):
        e = head.embed_pose(head.empty_pose_tokens if i == 0 else total.detach())
        modulation = F.silu(e) @ head.poseLN_modulation[1].weight.T + head.poseLN_modulation[1].bias
        shift, scale, gate = modulation[..., :DIM], modulation[..., DIM : 2 * DIM], modulation[..., 2 * DIM :]
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = gate * (normed * (1 + scale) + shift) + x
        for block in head.trunk:
            y = block(y)
        total = total + head.pose_branch(head.trunk_norm(y))
        results.append(total)
    return results


def test_equals_the_formula() -> None:
    head, given = build(), outputs()
    with torch.no_grad():
        actual, expected = head(given), plain_camera(head, given[-1], 4)
    assert len(actual) == 4
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == (2, 3, 9)
        torch.testing.assert_close(a[..., :7], e[..., :7])
        torch.testing.assert_close(a[..., 7:], e[..., 7:].relu())
    assert bool((torch.stack(expected)[..., 7:] < 0).any())  # the ReLU had something to do


def test_activations_and_iterations() -> None:
    head = build(trans_act="inv_log", quat_act="exp", fl_act="linear")
    given = outputs()
    with torch.no_grad():
        (raw,) = plain_camera(head, given[-1], 1)
        (actual,) = head(given, num_iterations=1)
    torch.testing.assert_close(actual[..., :3], raw[..., :3].sign() * raw[..., :3].abs().expm1())
    torch.testing.assert_close(actual[..., 3:7], raw[..., 3:7].exp())
    torch.testing.assert_close(actual[..., 7:], raw[..., 7:])
    assert len(head(given, num_iterations=6)) == 6


def test_gradients_flow_and_equal_those_of_the_formula() -> None:
    head, given = build(fl_act="linear"), outputs()
    tokens = given[-1].requires_grad_()
    wanted = [*head.parameters(), tokens]
    actual = torch.autograd.grad(sum(y.square().sum() for y in head(given)), wanted)
    expected = torch.autograd.grad(sum(y.square().sum() for y in plain_camera(head, tokens, 4)), wanted)
    for a, e in zip(actual, expected, strict=True):
        assert float(e.abs().max()) > 0
        torch.testing.assert_close(a, e)


def test_reads_only_token_zero_of_the_last_output() -> None:
    head, given = build(), outputs()
    other = given[-1].clone()
    other[:, :, 1:] = torch.nan
    with torch.no_grad():
        assert torch.equal(head(given)[-1], head([None, other])[-1])
    assert given[-1]._version == 0


def test_frames_are_exchangeable() -> None:
    head, given = build(), outputs()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(head([given[-1][:, order]])[-1], head(given)[-1][:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_any_dtype(dtype: torch.dtype) -> None:
    head, given = build().float(), outputs()[-1].to(dtype)
    with torch.no_grad():
        actual, expected = head([given])[-1], head([given.float()])[-1]
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_knows_no_device() -> None:
    with torch.device("meta"):
        assert build()([torch.zeros(1, 3, 7, DIM)])[-1].device.type == "meta"


def test_bad_input() -> None:
    head, (*_, tokens) = build(), outputs()
    with pytest.raises(VggtMvError, match="num_iterations must be at least 1, got 0"):
        head([tokens], num_iterations=0)
    with pytest.raises(VggtMvError, match=r"CameraHead: aggregated_tokens_list must have an entry -1.*it has 0"):
        head([])
    with pytest.raises(VggtMvError, match=r"aggregated_tokens_list\[-1\] must be a tensor, got None.*keep_outputs"):
        head([tokens, None])
    with pytest.raises(
        VggtMvError, match=r"aggregated_tokens_list\[-1\] must be \[B, S, P, C\].*got \[1, 2, 3, 7, 32\]"
    ):
        head([tokens[None]])
    with pytest.raises(VggtMvError, match=r"must have 32 features \(dim_in\), got 31"):
        head([tokens[..., 1:]])
    with pytest.raises(VggtMvError, match=r"camera token per frame, got \[2, 3, 0, 32\]"):
        head([tokens[:, :, :0]])


def test_bad_options() -> None:
    with pytest.raises(VggtMvError, match=r"pose_encoding_type must be one of \['absT_quaR_FoV'\], got 'euler'"):
        build(pose_encoding_type="euler")
    with pytest.raises(VggtMvError, match=r"quat_act must be one of .* got 'unit'"):
        build(quat_act="unit")
