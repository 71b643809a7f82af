"""Every operator in a few lines of plain PyTorch: its definition, and the backend that runs everywhere.

Same names and arguments as the public operators, but nothing is validated here. All are differentiable in any
floating-point dtype (attention a second time with PyTorch's unfused kernel alone); the tests check them in float64 with
`gradcheck` and measure the kernels against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def residual_scale_norm(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`residual = x + gamma * y` in x's dtype, and `LayerNorm(residual) * weight + bias` in y's dtype."""
    residual = torch.addcmul(x, gamma, y).to(x.dtype)
    wide = torch.promote_types(x.dtype, weight.dtype)
    normed = F.layer_norm(residual.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return residual, normed.to(y.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every row (last dimension) of `residual`, shape `residual.shape[:-1]`."""
    residual = residual.to(accumulation_dtype(residual.dtype))
    mean = residual.mean(-1)
    variance = (residual - mean.unsqueeze(-1)).square().mean(-1)
    return mean, (variance + eps).rsqrt()


def residual_scale_norm_backward(
    grad_residual: Tensor | None,
    grad_normed: Tensor | None,
    residual: Tensor,
    y: Tensor,
    gamma: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual_scale_norm` with respect to x, y, gamma, weight and bias, from what its forward saved.

    With `n = (residual - mean) * rstd` and `g = grad_normed * weight`, for a row of C features:
    `grad_x = grad_residual + rstd * (g - sum(g) / C - n * sum(g * n) / C)` and `grad_y = gamma * grad_x`.
    """
    wide = mean.dtype
    grad = torch.zeros_like(residual, dtype=wide) if grad_residual is None else grad_residual.to(wide)
    rows = tuple(range(residual.dim() - 1))
    if grad_normed is None:
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    else:
        normalised = (residual.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        g = grad_normed.to(wide) * weight.to(wide)
        inner = g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True)
        grad = grad + rstd.unsqueeze(-1) * inner
        grad_weight, grad_bias = (grad_normed.to(wide) * normalised).sum(rows), grad_normed.to(wide).sum(rows)
    grad_gamma = (grad * y.to(wide)).sum(rows)
    grad_y = (gamma.to(wide) * grad).to(y.dtype)
    return (
        grad.to(residual.dtype),
        grad_y,
        grad_gamma.to(gamma.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def grid_positions(grid_hw: tuple[int, int], num_special: int, special_position: int, device: torch.device) -> Tensor:
    """Row and column of every token of a frame, `[P, 2]` int64: special tokens first, then patches from (1, 1)."""
    height, width = grid_hw
    rows = torch.arange(1, height + 1, device=device).repeat_interleave(width)
    columns = torch.arange(1, width + 1, device=device).repeat(height)
    return F.pad(torch.stack((rows, columns), dim=1), (0, 0, num_special, 0), value=special_position)


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary embedding of `x [..., P, h, w]` by `position [P]`: pair (j, j + w/2) turns by position * base**(-2j/w)."""
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    angle = position[:, None].to(exact) * base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    cos, sin = (table.to(x.dtype)[:, None, :] for table in (angle.cos(), angle.sin()))
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def qk_norm_rope(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor] | None,
    k_norm: tuple[Tensor, Tensor] | None,
    grid_hw: tuple[int, int],
    num_special: int,
    base: float = 100.0,
    eps: float = 1e-5,
    *,
    special_position: int = 0,
) -> Tensor:
    """LayerNorm of q and k over D, then 2-D RoPE: D/2 features turn with the row, D/2 with the column."""
    positions = grid_positions(grid_hw, num_special, special_position, qkv.device)
    wide = accumulation_dtype(qkv.dtype)

    def norm_rope(x: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x.to(wide)
        if norm is not None:
            x = F.layer_norm(x, x.shape[-1:], norm[0].to(wide), norm[1].to(wide), eps)
        vertical, horizontal = x.chunk(2, dim=-1)
        turned = (rotate(vertical, positions[:, 0], base), rotate(horizontal, positions[:, 1], base))
        return torch.cat(turned, dim=-1).to(qkv.dtype)

    q, k, v = qkv.unbind(dim=4)
    return torch.stack((norm_rope(q, q_norm), norm_rope(k, k_norm), v), dim=4)


def split_in_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as the sum of two tensors of a narrower dtype: its rounding, and the rounding of what that left over."""
    high = x.to(dtype)
    rest = torch.where(high.isinf(), 0, x - high.to(x.dtype))
    return high, rest.to(dtype)


def append_bias_features(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, row_gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes `q'.k' = q.k + row_gate_i * key_bias_j / scale` by extra features, so that fused attention takes the bias.

    So no `[L, L]` tensor is ever written. Inputs `q [..., h, D]` with `row_gate [...]`, `k, v [..., h, D]` with
    `key_bias [...]`; the outputs have the next multiple of 8 that holds the extra features instead of D, which fused
    kernels ask for. In float32 and float64 one feature carries the bias. In float16 and bfloat16 each factor is the sum
    of two parts, and three features carry the products that matter, so that the bias keeps 16 bits where one rounded
    feature would keep 8.
    """
    wide = accumulation_dtype(q.dtype)
    gate, bias = row_gate.to(wide), key_bias.to(wide) / scale
    if q.dtype == wide:
        q_features, k_features = [gate], [bias]
    else:
        (gate, gate_rest), (bias, bias_rest) = split_in_two(gate, q.dtype), split_in_two(bias, q.dtype)
        finite_bias = torch.where(bias.isinf(), 0, bias)  # gate_rest is often 0, and 0 * inf is not a number
        q_features, k_features = [gate, gate, gate_rest], [bias, bias_rest, finite_bias]

    def extend(x: Tensor, features: list[Tensor]) -> Tensor:
        columns = [feature[..., None, None].expand(*x.shape[:-1], 1) for feature in features]
        filling = -(x.shape[-1] + len(features)) % 8
        return torch.cat((x, *columns, x.new_zeros(1).expand(*x.shape[:-1], filling)), dim=-1)

    zero = torch.zeros_like(key_bias, dtype=v.dtype)
    return extend(q, q_features), extend(k, k_features), extend(v, [zero] * len(k_features))


# Dimensions B, T, N of the token grid that number the sequences of an axis; the others run along the sequence.
SEQUENCE_DIMS = {"frame": (0, 1, 2), "view": (0, 1), "time": (0, 2), "global": (0,)}


def in_forward_mode() -> bool:
    """Whether tangents may go through a call (`torch.func.jvp`, `forward_ad`): an operator would drop them silently."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's, for tangents in the one of its forms that has a rule for them."""
    if in_forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def alternating_attention(
    qkv: Tensor,
    axis: str,
    *,
    key_bias: Tensor | None = None,
    row_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`softmax_j(scale * q_i.k_j + row_gate_i * key_bias_j) v_j` inside every sequence of `axis`, all heads."""
    *sizes, _, heads, width = qkv.shape
    scale = width**-0.5 if scale is None else scale
    q, k, v = qkv.unbind(dim=4)
    if key_bias is not None:
        gate = torch.ones_like(key_bias) if row_gate is None else row_gate.expand_as(key_bias)
        q, k, v = append_bias_features(q, k, v, key_bias, gate, scale)

    outer = SEQUENCE_DIMS[axis]
    order = [*outer, *(d for d in range(4) if d not in outer)]

    def to_sequences(x: Tensor) -> Tensor:  # [B, T, N, P, h, d] -> [sequences, h, length, d]
        return x.permute(*order, 4, 5).flatten(len(outer), 3).flatten(0, len(outer) - 1).transpose(1, 2)

    out = softmax_attention(to_sequences(q), to_sequences(k), to_sequences(v), scale)
    out = out[..., :width].transpose(1, 2).reshape(*[sizes[d] for d in order], heads * width)
    return out.permute(*[order.index(d) for d in range(4)], 4).contiguous()


def dual_stream_attention(
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`alternating_attention` of two streams, with the key biases `-lambda_pose * mask` and `+lambda_geo * mask`."""
    bias_pose, bias_geo = None, None
    if mask is not None and lambda_pose is not None and lambda_geo is not None:
        bias_pose, bias_geo = -lambda_pose * mask, lambda_geo * mask
    qkv_geo = qkv_pose if qkv_geo is None else qkv_geo
    pose = alternating_attention(qkv_pose, axis, key_bias=bias_pose, scale=scale)
    return pose, alternating_attention(qkv_geo, axis, key_bias=bias_geo, scale=scale)


def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float | None) -> Tensor:
    """`softmax_j(scale * q_i.k_j + key_bias_j) v_j`: q `[B, Q, h, D]`, k, v `[B, K, h, D]`, key_bias `[B, K]`."""
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if key_bias is not None:
        q, k, v = append_bias_features(q, k, v, key_bias, key_bias.new_ones(q.shape[:2]), scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return softmax_attention(q, k, v, scale)[..., :width].transpose(1, 2).flatten(2)


def memory_write(
    qkv: Tensor, memory_qkv: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The memory's queries attend over its own keys, without bias, and over those of all tokens."""
    _, k, v = qkv.flatten(1, 3).unbind(dim=2)
    memory_q, memory_k, memory_v = memory_qkv.unbind(dim=2)
    if key_bias is not None:
        key_bias = F.pad(key_bias.flatten(1), (memory_k.shape[1], 0))
    return attend(memory_q, torch.cat((memory_k, k), dim=1), torch.cat((memory_v, v), dim=1), key_bias, scale)


def memory_read(qkv: Tensor, memory_qkv: Tensor, *, scale: float | None = None) -> Tensor:
    """The queries of all tokens attend over the memory's keys."""
    q = qkv[:, :, :, :, 0].flatten(1, 3)
    return attend(q, memory_qkv[:, :, 1], memory_qkv[:, :, 2], None, scale).unflatten(1, qkv.shape[1:4])


def landmark_attention(
    qkv: Tensor, landmarks: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The queries of all tokens attend over the keys of the tokens in `landmarks`."""
    q, k, v = qkv.flatten(1, 3).unbind(dim=2)
    rows = landmarks[:, :, None, None].expand(-1, -1, *k.shape[2:])
    bias = None if key_bias is None else key_bias.flatten(1).gather(1, landmarks)
    return attend(q, k.gather(1, rows), v.gather(1, rows), bias, scale).unflatten(1, qkv.shape[1:4])


def block_dilated_attention(
    qkv: Tensor, neighbours: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Frame after frame: its queries attend over the keys of all tokens of its neighbour frames."""
    q, k, v = (part.flatten(1, 2).unbind(dim=1) for part in qkv.unbind(dim=4))
    bias = None if key_bias is None else key_bias.flatten(1, 2).unbind(dim=1)
    frames = []
    for queries, row in zip(q, neighbours.tolist(), strict=True):
        near = [frame for frame in row if frame >= 0]
        keys, values = (torch.cat([part[frame] for frame in near], dim=1) for part in (k, v))
        near_bias = None if bias is None else torch.cat([bias[frame] for frame in near], dim=1)
        frames.append(attend(queries, keys, values, near_bias, scale))
    return torch.stack(frames, dim=1).unflatten(1, qkv.shape[1:3])


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`activation(x @ weight.T + bias)` in x's dtype; activation "none" is the identity, "gelu" exact GELU."""
    y = F.linear(x, matrix_of(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))
    return F.gelu(y) if activation == "gelu" else y


def matrix_of(weight: Tensor) -> Tensor:
    """A linear layer's weight as it is, a convolution's `[N, C, a, b]` as `[N, a b C]`, for patches channels last."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    size: Sequence[int] | None = None,
    row_offsets: Tensor | None = None,
    column_offsets: Tensor | None = None,
) -> Tensor:
    """`activation(conv2d(map, weight, bias, padding=1) + residual)`; activation "none" is the identity.

    The map is x, resized where there is a size, plus `row_offsets [H, C]` and `column_offsets [W, C]`.
    """
    if size is not None and tuple(size) != x.shape[-2:]:
        x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
    if row_offsets is not None:
        x = x + row_offsets.mT.unsqueeze(2)
    if column_offsets is not None:
        x = x + column_offsets.mT.unsqueeze(1)
    y = F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y
