"""The operators beside their peers on a GPU: correctness first, then time, for `gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu_measure import measure, relative_error

FLEX_LENGTHS = (1024, 4096, 32768)  # flex_attention compiles for every length anew, some seconds each
TOKENS, CHANNELS, HEADS, WIDTH = 1374, 1024, 16, 64  # a frame of 518 x 518 in the 1.2 B model


def over_ours(medians: dict[str, float]) -> dict[str, float]:
    """How many times as long as ours each peer takes."""
    return {f"{name}_over_ours": round(value / medians["ours"], 2) for name, value in medians.items() if name != "ours"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, for these shapes alone: earlier cases must not make it general, or give up."""
    import torch

    torch._dynamo.reset()
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def copying(moved_bytes: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes `moved_bytes` in all: the least time that a kernel of as many can take."""
    import torch

    source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def step_residual_scale_norm(frame_counts: Sequence[int] = (1, 10, 100), device: str = "cuda") -> list[dict[str, Any]]:
    """`residual_scale_norm`, forward, beside a copy of as many bytes, eager and torch.compile."""
    import torch

    import vggt_mv_ext

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    rows: list[dict[str, Any]] = []
    for frames in frame_counts:
        for x_dtype, y_dtype in (
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float32),
        ):
            x, y = (torch.randn(frames * TOKENS, CHANNELS, device=device).to(dtype) for dtype in (x_dtype, y_dtype))
            gamma, weight, bias = (torch.randn(CHANNELS, device=device).to(x_dtype) for _ in range(3))

            def ours(a: Any = (x, y, gamma, weight, bias)) -> Any:
                with vggt_mv_ext.backend(device):
                    return vggt_mv_ext.residual_scale_norm(*a, 1e-5)

            def eager(a: Any = (x, y, gamma, weight, bias)) -> Any:
                return vggt_mv_ext.reference.residual_scale_norm(*a, 1e-5)

            expected = eager(tuple(a.double() for a in (x, y, gamma, weight, bias)))
            errors = [relative_error(value, reference) for value, reference in zip(ours(), expected, strict=True)]
            if not (errors[0] < tolerance[x_dtype] and errors[1] < tolerance[y_dtype]):
                raise RuntimeError(
                    f"residual_scale_norm {tuple(x.shape)} {x_dtype}/{y_dtype}: errors {errors} against fp64"
                )
            moved = 2 * (x.nbytes + y.nbytes)
            times = {
                "ours": measure(ours, device=device),
                "copy": measure(copying(moved, device), device=device),
                "eager": measure(eager, device=device),
                "torch_compile": measure(compiled(eager), device=device),
            }
            medians = {name: timing["median_ms"] for name, timing in times.items()}
            case = {"frames": frames, "dtypes": f"{x_dtype}/{y_dtype}".replace("torch.", ""), "errors": errors}
            bandwidth = {"gb_per_s": round(moved / medians["ours"] / 1e6, 1)}
            rows.append({**case, **times, **bandwidth, **over_ours(medians)})
    return rows


def step_qk_norm_rope(frame_counts: Sequence[int] = (1, 10, 100), device: str = "cuda") -> list[dict[str, Any]]:
    """`qk_norm_rope`, forward, new and in place, beside a copy of as many bytes, eager and torch.compile."""
    import torch

    import vggt_mv_ext

    grid_hw, special = (37, 37), TOKENS - 37 * 37
    rows: list[dict[str, Any]] = []
    for frames in frame_counts:
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
            qkv = torch.randn(1, 1, frames, TOKENS, 3, HEADS, WIDTH, device=device).to(dtype)
            scratch = qkv.clone()
            norms = [tuple(torch.randn(WIDTH, device=device) for _ in range(2)) for _ in range(2)]

            def ours(qkv: Any = qkv, norms: Any = norms) -> Any:
                with vggt_mv_ext.backend(device):
                    return vggt_mv_ext.qk_norm_rope(qkv, *norms, grid_hw, special)

            def inplace(scratch: Any = scratch, norms: Any = norms) -> Any:
                with vggt_mv_ext.backend(device):
                    return vggt_mv_ext.qk_norm_rope(scratch, *norms, grid_hw, special, inplace=True)

            def eager(qkv: Any = qkv, norms: Any = norms) -> Any:
                return vggt_mv_ext.reference.qk_norm_rope(qkv, *norms, grid_hw, special)

            expected = eager(qkv[:, :, :1].double(), [tuple(t.double() for t in norm) for norm in norms])
            error = relative_error(ours()[:, :, :1], expected)
            if not error < tolerance:
                raise RuntimeError(f"qk_norm_rope {tuple(qkv.shape)} {dtype}: error {error} against fp64")
            times = {
                "ours": measure(ours, device=device),
                "copy": measure(copying(2 * qkv.nbytes, device), device=device),
                "ours_inplace": measure(inplace, device=device),
                "copy_inplace": measure(copying(2 * qkv.nbytes * 2 // 3, device), device=device),
                "eager": measure(eager, device=device),
                "torch_compile": measure(compiled(eager), device=device),
            }
            medians = {name: timing["median_ms"] for name, timing in times.items()}
            rows.append(
                {"frames": frames, "dtypes": str(dtype).removeprefix("torch."), "error": error, **times}
                | {"gb_per_s": round(2 * qkv.nbytes / medians["ours"] / 1e6, 1)}
                | over_ours(medians)
            )
    return rows


def attention_peers(q: Any, k: Any, v: Any, gate: Any, bias: Any) -> dict[str, Callable[[], Any]]:
    """Attention of `[1, h, L, D]` tensors by torch's own kernels; with a bias, as each of them can take one."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: Any, *tensors: Any) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, scale=WIDTH**-0.5)

        return run

    names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    if bias is None:
        peers = {name: sdpa(backend, q, k, v) for name, backend in names.items()}
    else:  # the rank-1 bias as eight more features, of which one is used: D = 64 becomes 72
        filling = torch.zeros(*q.shape[:-1], 7, device=q.device, dtype=q.dtype)
        wide_q = torch.cat([q, gate.to(q.dtype)[None, None, :, None].expand(*q.shape[:-1], 1), filling], -1)
        scaled = (bias * WIDTH**0.5).to(q.dtype)
        wide_k = torch.cat([k, scaled[None, None, :, None].expand(*k.shape[:-1], 1), filling], -1)
        wide_v = torch.cat([v, filling, filling[..., :1]], -1)
        peers = {f"{name}_padded": sdpa(backend, wide_q, wide_k, wide_v) for name, backend in names.items()}
    if q.device.type == "cuda" and q.shape[2] in FLEX_LENGTHS:
        from torch.nn.attention.flex_attention import flex_attention

        def score(s: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
            return s if bias is None else s + gate[row] * bias[column]

        flex = compiled(flex_attention)
        peers["flex"] = lambda: flex(q, k, v, score_mod=score, scale=WIDTH**-0.5)
    return peers


def step_alternating_attention(
    lengths: Sequence[int] = (1024, 4096, 8192, 16384, 32768), device: str = "cuda"
) -> list[dict[str, Any]]:
    """Attention over L tokens, D = 64, 16 heads, bf16, with and without bias, beside torch's kernels: TFLOP/s."""
    import torch

    import vggt_mv_ext

    rows: list[dict[str, Any]] = []
    for length in lengths:
        for with_bias in (False, True):
            qkv = torch.randn(1, 1, 1, length, 3, HEADS, WIDTH, device=device, dtype=torch.bfloat16)
            q, k, v = qkv[0, 0, 0].permute(1, 2, 0, 3)[:, None].contiguous().unbind(0)
            bias = -torch.rand(length, device=device) if with_bias else None
            gate = (torch.arange(length, device=device) % TOKENS < 5).float() if with_bias else None
            grid = {"key_bias": bias.view(1, 1, 1, -1), "row_gate": gate} if bias is not None else {}

            def ours(qkv: Any = qkv, grid: Any = grid) -> Any:
                with vggt_mv_ext.backend(device):
                    return vggt_mv_ext.alternating_attention(qkv, "frame", **grid)

            short = min(length, 2048)  # correctness on the first rows, in float64
            logits = q[..., :short, :].double() @ k.double().transpose(-1, -2) * WIDTH**-0.5
            if bias is not None:
                logits += gate[:short, None].double() * bias.double()
            expected = (logits.softmax(-1) @ v.double())[0].transpose(0, 1).reshape(short, -1)
            error = relative_error(ours()[0, 0, 0, :short], expected)
            del logits
            if not error < 1e-2:
                raise RuntimeError(f"alternating_attention, L = {length}, bias {with_bias}: error {error} against fp64")
            times: dict[str, Any] = {"ours": measure(ours, device=device)}
            for name, peer in attention_peers(q, k, v, gate, bias).items():
                try:
                    times[name] = measure(peer, device=device)
                except RuntimeError as reason:  # a backend that does not take this case
                    times[name] = {"error": str(reason).splitlines()[0]}
            medians = {name: timing["median_ms"] for name, timing in times.items() if "median_ms" in timing}
            flops = 4 * length**2 * WIDTH * HEADS
            rows.append(
                {"length": length, "bias": with_bias, "error": error, **times}
                | {"tflop_per_s": {name: float(f"{flops / median / 1e9:.4g}") for name, median in medians.items()}}
                | over_ours(medians)
            )
            if with_bias:
                rows[-1]["over_no_bias"] = round(medians["ours"] / rows[-2]["ours"]["median_ms"], 3)
    return rows
