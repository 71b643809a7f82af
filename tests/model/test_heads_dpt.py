"""DPTHead against a plain transcription of its formula: odd sizes, chunks, gradients, dtypes, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.dpt_head import DPTHead, FeatureFusionBlock, ResidualConvUnit
from vggt_mv.heads.head_act import activate_head
from vggt_mv.heads.utils import create_uv_grid, position_grid_to_embed
from vggt_mv.layers.conv import StridedConv3x3

DIM, START, LAYERS, CHANNELS = 24, 5, [0, 2, 3, 5], [8, 12, 16, 20]


@pytest.fixture(autouse=True)
def _seeded_and_on_one_thread() -> Iterator[None]:
    """Tensors are tiny here: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(**options: Any) -> DPTHead:
    arguments: dict[str, Any] = {
        "output_dim": 3,
        "activation": "inv_log",
        "features": 16,
        "out_channels": CHANNELS,
        "intermediate_layer_idx": LAYERS,
    }
    return DPTHead(DIM, **(arguments | options)).double()


def inputs(
    batch: int, frames: int, rows: int, columns: int, patch: int = 14
) -> tuple[list[Tensor | None], Tensor, int]:
    outputs: list[Tensor | None] = [None] * 6
    for layer in LAYERS:
        outputs[layer] = torch.randn(batch, frames, START + rows * columns, DIM, dtype=torch.float64)
    return outputs, torch.zeros(batch, frames, 3, rows * patch, columns * patch), START


def plain_unit(unit: nn.Module, x: Tensor, skip: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    return skip(x) + unit.conv2(torch.relu(unit.conv1(torch.relu(x))))


def plain_dpt(
    head: DPTHead,
    outputs: list[Tensor | None],
    images: Tensor,
    start: int,
    skip: Callable[[Tensor], Tensor] = torch.relu,
) -> tuple[Tensor, ...]:
    """The formula, one step after the other, all frames at once, contiguous NCHW."""

    def embed(x: Tensor) -> Tensor:
        if not head.pos_embed:
            return x
        grid = create_uv_grid(x.shape[-1], x.shape[-2], images.shape[-1] / images.shape[-2], dtype=torch.float64)
        return x + 0.1 * position_grid_to_embed(grid, x.shape[1]).to(x.dtype).permute(2, 0, 1)

    def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    rows, columns = images.shape[-2] // head.patch_size, images.shape[-1] // head.patch_size
    s, maps = head.scratch, []
    for i, layer in enumerate(head.intermediate_layer_idx):
        tokens = outputs[layer].flatten(0, 1)[:, start:]
        x = head.norm(tokens).transpose(1, 2).reshape(-1, DIM, rows, columns)
        x = head.resize_layers[i](embed(head.projects[i](x)))
        maps.append(getattr(s, f"layer{i + 1}_rn")(x))
    x = None
    for i in (4, 3, 2, 1):
        block = getattr(s, f"refinenet{i}")
        x = maps[3] if x is None else x + plain_unit(block.resConfUnit1, maps[i - 1], skip)
        x = plain_unit(block.resConfUnit2, x, skip)
        size = tuple(maps[i - 2].shape[-2:]) if i > 1 else (2 * x.shape[-2], 2 * x.shape[-1])
        x = block.out_conv(resize(x, size))
    x = s.output_conv1(x)
    x = embed(resize(x, (images.shape[-2] // head.down_ratio, images.shape[-1] // head.down_ratio)))
    frames = images.shape[:2]
    if head.feature_only:
        return (x.unflatten(0, frames),)
    x = s.output_conv2[2](torch.relu(s.output_conv2[0](x)))
    return tuple(y.unflatten(0, frames) for y in activate_head(x, head.activation, head.conf_activation))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


GRIDS = [(1, 1), (1, 2), (5, 7), (4, 6), (3, 1)]
OPTIONS = [
    {},
    {"down_ratio": 2},
    {"pos_embed": False},
    {"feature_only": True, "down_ratio": 2, "pos_embed": False},
    {"feature_only": True, "down_ratio": 3},
    {"activation": "exp", "output_dim": 2, "patch_size": 16},
]


# Double precision: what differs is the order of the same sums (measured 3e-14).
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_equals_the_formula(grid: tuple[int, int], options: dict[str, Any]) -> None:
    head = build(**options)
    arguments = inputs(2, 2, *grid, patch=head.patch_size)
    with torch.no_grad():
        actual, expected = as_tuple(head(*arguments)), plain_dpt(head, *arguments)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_float32_equals_the_formula() -> None:
    """Where the kernel of the 3 x 3 convolutions runs, and resizes the largest maps itself."""
    head = build(features=64, out_channels=[64] * 4, output_dim=2).float()
    outputs, images, start = inputs(1, 2, 10, 12)
    given = [None if tokens is None else tokens.float() for tokens in outputs]
    with torch.no_grad():
        actual = as_tuple(head(given, images.float(), start))
        expected = plain_dpt(head.double(), outputs, images, start)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).norm() / e.norm()) < 2e-6


@pytest.mark.parametrize("size", [(2, 16, 21, 18), (1, 5, 1, 1), (3, 4, 2, 9), (1, 32, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_strided_convolution_is_one(size: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
    layer = StridedConv3x3(size[1], 12).to(dtype)
    x = torch.randn(size, dtype=dtype)
    with torch.set_grad_enabled(grad):
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            y = layer(given)
            expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride=2, padding=1)
            assert y.dtype == dtype and y.requires_grad == grad
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_shapes() -> None:
    depth, confidence = build(output_dim=2)(*inputs(2, 3, 2, 3))
    assert depth.shape == (2, 3, 28, 42, 1)
    assert confidence.shape == (2, 3, 28, 42)
    features = build(feature_only=True, down_ratio=2)(*inputs(1, 3, 2, 3))
    assert features.shape == (1, 3, 16, 14, 21)


def test_the_skip_adds_the_rectified_input() -> None:
    """A skip without ReLU is another network, by far: the comparison above would notice."""
    head, arguments = build(), inputs(1, 1, 3, 4)
    with torch.no_grad():
        actual = head(*arguments)[0]
        other = plain_dpt(head, *arguments, skip=lambda x: x)[0]
    assert float((actual - other).abs().max() / actual.abs().max()) > 1e-2


def test_gradients_equal_those_of_the_formula() -> None:
    """The in-place steps leave every backward pass intact: all gradients, of parameters and of tokens."""
    head, (outputs, images, start) = build(), inputs(1, 3, 2, 3)
    leaves = [tokens.requires_grad_() for tokens in outputs if tokens is not None]
    wanted = [*head.parameters(), *leaves]

    def gradients(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            sum((y * torch.linspace(0.5, 1, y.numel()).view_as(y)).sum() for y in result), wanted
        )

    actual = gradients(as_tuple(head(outputs, images, start, frames_chunk_size=2)))
    expected = gradients(plain_dpt(head, outputs, images, start))
    for a, e in zip(actual, expected, strict=True):
        assert float(e.abs().max()) > 0
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * float(e.abs().max()))


@pytest.mark.parametrize(("batch", "frames"), [(1, 10), (2, 5)])
@pytest.mark.parametrize("feature_only", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_chunks_do_not_change_the_result(batch: int, frames: int, feature_only: bool, grad: bool) -> None:
    head, arguments = build(feature_only=feature_only), inputs(batch, frames, 2, 3)
    sizes: list[int] = []
    head.scratch.output_conv1.register_forward_hook(lambda _, __, y: sizes.append(y.shape[0]))
    with torch.set_grad_enabled(grad):
        expected = as_tuple(head(*arguments, frames_chunk_size=None))
        for chunk, split in ((8, [8, 2]), (1, [1] * 10), (3, [3, 3, 3, 1]), (10, [10]), (64, [10])):
            sizes.clear()
            actual = as_tuple(head(*arguments, frames_chunk_size=chunk))
            assert sizes == split
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
        sizes.clear()
        head(*arguments)
        assert sizes == [8, 2]  # the default


def test_frames_are_independent() -> None:
    head, (outputs, images, start) = build(), inputs(1, 3, 2, 2)
    with torch.no_grad():
        whole = head(outputs, images, start)[0]
        one = head([t if t is None else t[:, 1:2] for t in outputs], images[:, 1:2], start)[0]
    torch.testing.assert_close(whole[:, 1:2], one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_are_not_changed(grad: bool) -> None:
    head, arguments = build().float(), inputs(1, 2, 2, 2)
    outputs = [None if t is None else t.float() for t in arguments[0]]
    copies = [None if t is None else t.clone() for t in outputs]
    with torch.set_grad_enabled(grad):
        head(outputs, *arguments[1:])
    for tokens, copy in zip(outputs, copies, strict=True):
        if tokens is not None:
            assert tokens._version == 0
            assert torch.equal(tokens, copy)


def test_blocks_do_not_change_their_inputs() -> None:
    x, skip = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        ResidualConvUnit(4)(x)
        FeatureFusionBlock(4)(x, skip)
        FeatureFusionBlock(4, has_skip=False)(x)
    assert x._version == 0
    assert skip._version == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_any_dtype(dtype: torch.dtype) -> None:
    head, (outputs, images, start) = build().float(), inputs(1, 2, 2, 3)
    given = [None if t is None else t.to(dtype) for t in outputs]
    with torch.no_grad():
        actual = head(given, images, start)
        expected = head([None if t is None else t.float() for t in given], images, start)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)


def test_follows_the_dtype_of_its_parameters() -> None:
    head, arguments = build(activation="exp"), inputs(1, 1, 2, 3)
    with torch.no_grad():
        expected = head(*arguments)
        actual = head.bfloat16()(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), e, rtol=0.1, atol=0.1)


def test_knows_no_device() -> None:
    with torch.device("meta"):
        head, arguments = build(), inputs(1, 9, 2, 3)
        depth, _ = head(*arguments)
    assert depth.device.type == "meta"
    assert depth.shape == (1, 9, 28, 42, 2)


def test_inference_mode_and_fake_tensors_leave_nothing_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    head, (outputs, images, start) = build(), inputs(1, 2, 3, 5)
    with torch.no_grad():
        expected = head(outputs, images, start)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in outputs]
        assert head(fakes, images, start)[0].shape == expected.shape
    with torch.inference_mode():
        assert torch.equal(head(outputs, images, start)[0], expected)
    result = head(outputs, images, start)[0]
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in head.parameters() if p.grad is not None)


def test_compiles_without_graph_breaks() -> None:
    head, arguments = build(), inputs(1, 2, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments)[0], head(*arguments)[0])
    torch._dynamo.reset()


def replaced(outputs: list[Tensor | None], layer: int, value: Tensor | None) -> list[Tensor | None]:
    return [value if i == layer else tokens for i, tokens in enumerate(outputs)]


# Each: what to do to (outputs, images, start, chunk), and the message.
BAD_INPUT: list[tuple[Callable[..., tuple[Any, ...]], str]] = [
    (lambda o, i, s: (o, i[0], s), r"images must be \[B, S, 3, H, W\].*got \[2, 3, 28, 42\]"),
    (lambda o, i, s: (o, i[..., :-1], s), r"width that is a positive multiple of patch_size = 14, got 41"),
    (lambda o, i, s: (o, i[..., :0, :], s), r"height that is a positive multiple of patch_size = 14, got 0"),
    (
        lambda o, i, s: (o, i[..., :28], s),
        r"aggregated_tokens_list\[0\] must be \[1, 2, 5 \+ 2 x 2, C\].*got \[1, 2, 11",
    ),
    (lambda o, i, s: (o, i[:, :1], s), r"must be \[1, 1, 5 \+ 2 x 3, C\] for images \[1, 1, 3, 28, 42\]"),
    (lambda o, i, s: (o, i, 4), r"must be \[1, 2, 4 \+ 2 x 3, C\]"),
    (lambda o, i, s: (o[:5], i, s), r"aggregated_tokens_list must have an entry 5.*it has 5"),
    (
        lambda o, i, s: (replaced(o, 3, None), i, s),
        r"aggregated_tokens_list\[3\] must be a tensor, got None.*keep_outputs",
    ),
    (
        lambda o, i, s: (replaced(o, 2, o[2][None]), i, s),
        r"aggregated_tokens_list\[2\] must be \[B, S, P, C\].*\[1, 1, 2, 11",
    ),
    (lambda o, i, s: (replaced(o, 2, o[2][..., :8]), i, s), r"must have 24 features \(dim_in\), got 8"),
    (lambda o, i, s: (o, i, s, 0), r"frames_chunk_size must be at least 1 or None, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_bad_input(change: Callable[..., tuple[Any, ...]], message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        build()(*change(*inputs(1, 2, 2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": [8, 8]}, r"four entries each, got \[8, 8\]"),
        ({"intermediate_layer_idx": [0]}, r"four entries each.*and \[0\]"),
        ({"down_ratio": 0}, "down_ratio must be at least 1, got 0"),
        ({"output_dim": 1}, "output_dim must be at least 2.*got 1"),
        ({"features": 12}, r"features / 2\) to be multiples of 4.*and 6"),
        ({"out_channels": [8, 10, 8, 8]}, r"multiples of 4, got \[8, 10, 8, 8\]"),
        ({"activation": "tanh"}, "activation must be one of .*got 'tanh'"),
        ({"conf_activation": "tanh"}, "conf_activation must be one of .*got 'tanh'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        build(**options)


def test_too_small_for_down_ratio() -> None:
    with pytest.raises(VggtMvError, match="at least down_ratio = 15 pixels"):
        build(down_ratio=15)(*inputs(1, 1, 1, 2))


def test_fusion_needs_its_skip() -> None:
    with pytest.raises(VggtMvError, match="skip must be a map, got None"):
        FeatureFusionBlock(4)(torch.zeros(1, 4, 2, 2))
