"""Proves the emulator: every planted bug is caught, every correct twin passes, fragments lie where PTX says."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from emulated_device import EmulatedDevice, EmulationError, guarded, guarded_copy
from emulation_build import HERE

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
order_ids = [f"{order}{seed}" for order, seed in ORDERS]


def run(
    device: EmulatedDevice,
    name: str,
    bug: bool,
    *,
    n: int = 128,
    outputs: int | None = None,
    order: tuple[str, int] = ("forward", 0),
    inputs: torch.Tensor | None = None,
    count_accesses: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One run of a planted kernel; returns (input, output), or raises EmulationError."""
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(n, generator=generator) if inputs is None else inputs
    source = guarded_copy(data)
    output = guarded((n if outputs is None else outputs,), torch.float32)
    with device.session(*order, count_accesses=count_accesses):
        status = device.library.planted_run(
            name.encode(),
            int(bug),
            ctypes.c_void_p(device.buffer(source, "input")),
            None,
            None,
            ctypes.c_void_p(device.buffer(output, "output", "output")),
            n,
        )
        assert status != -1, f"no planted kernel {name}"
        assert (status == 0) == (not device.reports())
    return source.clone(), output.clone()


def kinds(error: EmulationError) -> set[str]:
    return {report.split(": ")[1] for report in error.reports}


def tiles(x: torch.Tensor) -> torch.Tensor:
    """What the tile kernels compute: the sum over tiles of 128, rotated by 32."""
    return x.view(-1, 128).roll(-32, 1).sum(0)


RAW, WAR, WAW = "read-after-write race", "write-after-read race", "write-write race"
UNINITIALISED = "uninitialised read"

# name, size, what the correct twin computes, kinds of report of which the bug must show at least one in every order
CASES: list[tuple[str, int, Callable[[torch.Tensor], torch.Tensor], set[str]]] = [
    ("reverse_missing_barrier", 128, lambda x: x.flip(0), {UNINITIALISED, RAW, WAR}),
    ("handover_missing_barrier", 128, lambda x: x[:64], {UNINITIALISED, RAW, WAR}),
    ("tiles_missing_barrier", 384, tiles, {WAR, RAW}),
    ("two_writers", 64, lambda x: x, {WAW}),
    ("warp_exchange", 128, lambda x: x.view(-1, 2).flip(1).reshape(-1), {RAW}),
    ("shared_bounds", 128, lambda x: x, {"out of bounds"}),
    ("misaligned_vector", 128, lambda x: x, {"misaligned access"}),
    ("double_elements", 300, lambda x: 2 * x, {"out of bounds"}),
    ("copy_missing_wait", 128, lambda x: x.flip(0), {"unawaited copy"}),
    ("copy_short_wait", 256, lambda x: x.view(2, 64, 2).sum(0).flip(1).reshape(-1), {"unawaited copy"}),
    ("copy_missing_barrier", 128, lambda x: x.flip(0), {UNINITIALISED, RAW, WAR, "unawaited copy"}),
    ("copy_too_early", 384, tiles, {WAR, RAW}),
    ("copy_never_awaited", 128, lambda x: x, {"unawaited copy"}),
    ("divergent_block_barrier", 128, lambda x: x, {"divergent barrier"}),
    ("barriers_of_two_branches", 128, lambda x: x, {"divergent barrier"}),
    ("divergent_shuffle", 128, lambda x: x + x.view(-1, 2).flip(1).reshape(-1), {"divergent barrier"}),
    ("producer_consumer", 192, lambda x: x.view(3, 64).flip(1).sum(0), {RAW, WAR}),
    ("producer_never_arrives", 64, lambda x: x, {"divergent barrier"}),
    ("blocks_share_a_cell", 5, lambda x: x, {WAW}),
    ("reads_its_output", 128, lambda x: x, {UNINITIALISED}),
    ("writes_its_input", 128, lambda x: x, {"write to an input"}),
    ("wrong_block", 128, lambda x: 2 * x, {"invalid launch"}),
    ("too_much_shared", 128, lambda x: 2 * x, {"invalid launch"}),
]


@pytest.mark.parametrize("order", ORDERS, ids=order_ids)
@pytest.mark.parametrize(("name", "n", "expected", "allowed"), CASES, ids=[case[0] for case in CASES])
def test_bug_is_reported_and_its_twin_passes(
    planted_device: EmulatedDevice,
    name: str,
    n: int,
    expected: Callable[[torch.Tensor], torch.Tensor],
    allowed: set[str],
    order: tuple[str, int],
) -> None:
    source, output = run(planted_device, name, False, n=n, order=order)
    want = expected(source)
    torch.testing.assert_close(output[: want.numel()], want)
    with pytest.raises(EmulationError) as caught:
        run(planted_device, name, True, n=n, order=order)
    assert kinds(caught.value) <= allowed


def test_one_missing_barrier_shows_as_each_kind(planted_device: EmulatedDevice) -> None:
    """The order of fibers decides which race a missing barrier is; each is seen for what it is."""
    with pytest.raises(EmulationError) as forward:
        run(planted_device, "handover_missing_barrier", True, order=("forward", 0))
    assert kinds(forward.value) == {RAW}
    with pytest.raises(EmulationError) as reverse:
        run(planted_device, "handover_missing_barrier", True, order=("reverse", 0))
    assert kinds(reverse.value) == {UNINITIALISED, WAR}


def test_a_race_is_reported_where_the_result_is_right(planted_device: EmulatedDevice) -> None:
    """Forward order hides the missing barrier from any comparison of numbers, not from the shadow state."""
    generator = torch.Generator().manual_seed(7)
    source = guarded_copy(torch.randn(128, generator=generator))
    output = guarded((64,), torch.float32)
    with pytest.raises(EmulationError), planted_device.session("forward"):
        planted_device.library.planted_run(
            b"handover_missing_barrier", 1, *map(ctypes.c_void_p, (source.data_ptr(), 0, 0, output.data_ptr())), 128
        )
    assert torch.equal(output, source[:64])


def test_report_names_kernel_block_threads_and_both_lines(planted_device: EmulatedDevice) -> None:
    lines = (HERE / "planted.cu").read_text().splitlines()
    kernel = next(i for i, line in enumerate(lines) if "void handover_missing_barrier" in line)
    store = next(i for i, line in enumerate(lines) if i > kernel and "tile.store" in line) + 1
    load = next(i for i, line in enumerate(lines) if i > kernel and "tile.load" in line) + 1
    with pytest.raises(EmulationError) as caught:
        run(planted_device, "handover_missing_barrier", True)
    (report,) = caught.value.reports
    assert report == (
        f"planted.cu:{load}: read-after-write race: thread 64 (warp 2, lane 0) reads shared bytes [0, 4), "
        f"unordered with the write of thread 0 (warp 0, lane 0) at planted.cu:{store} "
        "[kernel handover_missing_barrier<true>, block (0, 0, 0)]"
    )


def test_out_of_bounds_names_the_buffer(planted_device: EmulatedDevice) -> None:
    with pytest.raises(EmulationError, match=r"thread 44 .* 4 bytes past the end of 'input'"):
        run(planted_device, "double_elements", True, n=300)


def test_unmasked_tail_gives_a_wrong_number(planted_device: EmulatedDevice) -> None:
    negative = -1 - torch.rand(300, generator=torch.Generator().manual_seed(1))
    source, output = run(planted_device, "maximum_unmasked_tail", False, n=300, outputs=1, inputs=negative)
    assert output[0] == source.max()
    _, output = run(planted_device, "maximum_unmasked_tail", True, n=300, outputs=1, inputs=negative)
    assert output[0] == 0


def test_wrong_grid_leaves_poison(planted_device: EmulatedDevice) -> None:
    source, output = run(planted_device, "wrong_grid", False, n=300)
    assert torch.equal(output, 2 * source)
    source, output = run(planted_device, "wrong_grid", True, n=300)
    assert torch.equal(output[:256], 2 * source[:256])
    assert output[256:].isnan().all()


def run_matrices(device: EmulatedDevice, name: str, bug: bool, outputs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    a = guarded_copy(torch.randn(16, 16, generator=generator).half())
    b = guarded_copy(torch.randn(16, 8, generator=generator).half())
    output = guarded((outputs,), torch.float32)
    with device.session("random", 4):
        arguments = device.buffer(a, "a"), device.buffer(b, "b"), device.buffer(output, "output", "output")
        device.library.planted_run(name.encode(), int(bug), None, *map(ctypes.c_void_p, arguments), 0)
    return a, b, output


def test_wrong_fragment_gives_a_wrong_product(planted_device: EmulatedDevice) -> None:
    a, b, output = run_matrices(planted_device, "matrix_product", False, 128)
    want = a.float() @ b.float()
    torch.testing.assert_close(output.view(16, 8), want, rtol=1e-6, atol=1e-6)
    _, _, output = run_matrices(planted_device, "matrix_product", True, 128)
    assert (output.view(16, 8) - want).norm() > 0.5 * want.norm()


def test_matrix_fragments_lie_as_the_instruction_set_says(planted_device: EmulatedDevice) -> None:
    a, _, output = run_matrices(planted_device, "dump_fragments", False, 512)
    plain, transposed = output.view(2, 32, 4, 2)
    for lane in range(32):
        for tile in range(4):
            part = a[8 * (tile % 2) :, 8 * (tile // 2) :][:8, :8].float()
            for i in range(2):
                assert plain[lane, tile, i] == part[lane // 4, 2 * (lane % 4) + i]
                assert transposed[lane, tile, i] == part[2 * (lane % 4) + i, lane // 4]


def test_warp_functions(planted_device: EmulatedDevice) -> None:
    x, output = run(planted_device, "dump_warp_functions", False, n=32, outputs=256, order=("random", 5))
    rows = output.view(8, 32)
    lanes = torch.arange(32)
    assert torch.equal(rows[0], x[5].expand(32))
    assert torch.equal(rows[1], x[lanes ^ 8])
    assert torch.equal(rows[2], torch.cat([x[3:], x[29:]]))
    torch.testing.assert_close(rows[3], x.sum().expand(32))
    assert torch.equal(rows[4], x.max().expand(32))
    assert rows[5, 0] == sum(1 << i for i in range(16) if x[i] > 0)
    assert rows[6].sum() == 0
    assert rows[7].sum() == 32


def test_bank_conflicts_are_counted(planted_device: EmulatedDevice) -> None:
    costs = {}
    for bug in (False, True):
        with_counts = run(planted_device, "transpose_bank_conflict", bug, n=1024, count_accesses=True)
        assert torch.equal(with_counts[1].view(32, 32), with_counts[0].view(32, 32).t())
        sites = {site.space: site for site in planted_device.access_sites()}
        assert sites["shared load"].requests == 32
        assert sites["shared store"].units == sites["shared store"].ideal_units == 32
        assert sites["global load"].units == sites["global load"].ideal_units == 32 * 4
        costs[bug] = sites["shared load"].units
    assert costs == {False: 32, True: 32 * 32}
