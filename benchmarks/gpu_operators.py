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


def first_rows(queries: Any, keys: Any, bias: Any = None) -> Any:
    """Attention in float64 of the first 512 queries of `[L, 3, h, D]` over keys of `[K, 3, h, D]`: `[rows, h D]`."""
    from vggt_mv_ext import reference

    q, (k, v) = queries[None, :512, 0].double(), (keys[None, :, part].double() for part in (1, 2))
    return reference.attend(q, k, v, None if bias is None else bias[None].double(), None)[0]


def check_rows(name: str, got: Any, expected: Any) -> float:
    """The relative error of the first rows of `[..., h D]` in bf16; raises where it is not small."""
    error = relative_error(got.reshape(-1, got.shape[-1])[: len(expected)], expected)
    if not error < 1e-2:
        raise RuntimeError(f"{name}: error {error} against fp64")
    return error


def step_dual_stream_attention(
    lengths: Sequence[int] = (1024, 4096, 16384), device: str = "cuda"
) -> list[dict[str, Any]]:
    """Two streams over L tokens with a mask, D = 64, 16 heads, bf16, own qkv and shared, beside one stream."""
    import torch

    import vggt_mv_ext
    from vggt_mv_ext import alternating_attention, dual_stream_attention

    rows: list[dict[str, Any]] = []
    for length in lengths:
        pose, geo = (
            torch.randn(1, 1, 1, length, 3, HEADS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        mask = torch.rand(1, 1, 1, length, device=device)
        weights = [torch.tensor(weight, device=device) for weight in (0.3, 0.2)]

        def own(a: Any = (pose, geo, "frame", mask, *weights)) -> Any:
            return dual_stream_attention(*a)

        def shared(a: Any = (pose, None, "frame", mask, *weights)) -> Any:
            return dual_stream_attention(*a)

        def one(qkv: Any = pose) -> Any:
            return alternating_attention(qkv, "frame")

        with vggt_mv_ext.backend(device):
            errors = []
            for mode, second in ((own, geo), (shared, pose)):
                for got, qkv, weight in zip(mode(), (pose, second), (-weights[0], weights[1]), strict=True):
                    bias = (weight * mask)[0, 0, 0]
                    expected = first_rows(qkv[0, 0, 0], qkv[0, 0, 0], bias)
                    errors.append(check_rows(f"dual_stream_attention, L = {length}", got, expected))
            times = {
                name: measure(function, device=device)
                for name, function in (("one", one), ("own", own), ("shared", shared))
            }
        medians = {name: timing["median_ms"] for name, timing in times.items()}
        flops = 4 * length**2 * WIDTH * HEADS  # of one stream; a stream counts the same where q . k is shared
        rates = {name: (1 if name == "one" else 2) * flops / median / 1e9 for name, median in medians.items()}
        rows.append(
            {"length": length, "errors": errors, **times}
            | {"tflop_per_s": {name: float(f"{rate:.4g}") for name, rate in rates.items()}}
            | {f"{name}_over_one": round(medians[name] / medians["one"], 3) for name in ("own", "shared")}
        )
    return rows


MEMORY, LANDMARKS = 32, 64  # memory tokens of a scene; landmarks of a frame, beside its five special tokens


def gathered_cases(qkv: Any, memory: Any) -> dict[str, tuple[Callable[[], Any], Any, Any, int]]:
    """Of every sparse attention: a call, its queries and keys for the check, and how many keys each query has."""
    import torch

    from vggt_mv.models.sparse_global import dilated_neighbours
    from vggt_mv_ext import block_dilated_attention, landmark_attention, memory_read, memory_write

    _, times, views, tokens = qkv.shape[:4]
    flat = qkv.flatten(1, 3)[0]
    chosen = torch.randperm(tokens - 5)[:LANDMARKS].sort().values + 5
    own = torch.cat([torch.arange(5), chosen]) + tokens * torch.arange(times * views)[:, None]
    landmarks = own.reshape(1, -1).to(qkv.device)
    neighbours = dilated_neighbours(times, views).to(qkv.device)
    near = neighbours[0][neighbours[0] >= 0]
    frame, first = qkv.flatten(1, 2)[0], flat[:tokens]
    everything = torch.cat([memory[0], flat])
    return {
        "memory_write": (lambda: memory_write(qkv, memory), memory[0], everything, len(everything)),
        "memory_read": (lambda: memory_read(qkv, memory), flat, memory[0], MEMORY),
        "landmark": (lambda: landmark_attention(qkv, landmarks), flat, flat[landmarks[0]], landmarks.shape[1]),
        "block_dilated": (
            lambda: block_dilated_attention(qkv, neighbours),
            first,
            frame[near].flatten(0, 1),
            tokens * int((neighbours >= 0).sum()) // len(neighbours),
        ),
    }


def step_gathered_attention(frame_counts: Sequence[int] = (8, 32, 100), device: str = "cuda") -> list[dict[str, Any]]:
    """The sparse attentions over frames of two views, bf16, beside dense attention and a copy of as many bytes.

    A memory's write reads k and v of all tokens, its read q and writes the result: both beside a copy. Landmarks and
    neighbour frames are beside dense attention by the rate of their FLOPs, as if it had as many keys.
    """
    import torch

    import vggt_mv_ext

    rows: list[dict[str, Any]] = []
    for frames in frame_counts:
        shape = (1, frames // 2, 2, TOKENS, 3, HEADS, WIDTH)
        qkv = torch.randn(shape, device=device, dtype=torch.bfloat16)
        memory = torch.randn(1, MEMORY, 3, HEADS, WIDTH, device=device, dtype=torch.bfloat16)
        tokens, moved = frames * TOKENS, 2 * qkv.nbytes // 3
        row: dict[str, Any] = {"frames": frames, "tflop_per_s": {}, "gb_per_s": {}, "errors": {}}
        with vggt_mv_ext.backend(device):
            cases = gathered_cases(qkv, memory)
            for name, (function, queries, keys, _) in cases.items():
                row["errors"][name] = check_rows(f"{name}, {frames} frames", function(), first_rows(queries, keys))
            row["copy"] = measure(copying(moved, device), device=device)
            dense: Callable[[], Any] = lambda qkv=qkv: vggt_mv_ext.alternating_attention(qkv, "global")  # noqa: E731
            row["dense"] = measure(dense, device=device)
            for name, (function, *_) in cases.items():
                row[name] = measure(function, device=device)
        pairs = {name: keys * (MEMORY if name == "memory_write" else tokens) for name, (*_, keys) in cases.items()}
        for name, count in ({"dense": tokens**2} | pairs).items():
            rate = 4 * count * WIDTH * HEADS / row[name]["median_ms"] / 1e9
            row["tflop_per_s"][name] = float(f"{rate:.4g}")
        for name in ("copy", "memory_write", "memory_read"):
            row["gb_per_s"][name] = round(moved / row[name]["median_ms"] / 1e6, 1)
        rates = row["tflop_per_s"]
        row |= {
            f"{name}_of_dense_rate": round(rates[name] / rates["dense"], 3) for name in ("landmark", "block_dilated")
        }
        row |= {
            f"{name}_of_copy": round(row["copy"]["median_ms"] / row[name]["median_ms"], 3)
            for name in ("memory_write", "memory_read")
        }
        rows.append(row)
    return rows
