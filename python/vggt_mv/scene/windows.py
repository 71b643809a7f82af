"""Long recordings in windows of a few times, each seen by the model on its own, put together to one reconstruction.

Windows overlap. The model sees each in a world of its own, which begins at the window's first camera and has a scale of
its own; the points of the times that a window shares with the one before say how the two worlds lie to each other
(``similarity_transform``), and a chain of such transforms leads back to the world of the first window. What several
windows predict of a frame is blended by confidence (``PendingFrames``). A memory bank goes on from window to window.

Memory holds one window, whatever the length of the recording: frames are decoded as they come, and a frame that no
later window sees is handed on at once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.blending import Arrays, PendingFrames
from vggt_mv.scene.fingerprint import fingerprint_of
from vggt_mv.scene.masks import find_masks, read_masks
from vggt_mv.scene.reconstruction import DEFAULT_CONF_PERCENTILE, Reconstruction, check_percentile
from vggt_mv.scene.running import evaluation
from vggt_mv.scene.session import Session, Source, begin, to_uint8
from vggt_mv.scene.similarity import Similarity, SimilarityFit, similarity_transform
from vggt_mv.weights import provenance_of

if TYPE_CHECKING:
    from vggt_mv.scene.export.stored import StoredReconstruction

__all__ = [
    "WindowState",
    "check_windows",
    "describe_windows",
    "plan_windows",
    "reconstruct_in_windows",
    "reconstruct_to_folder",
    "refuse_tracks",
    "run_windows",
    "transformed",
]

# Pixels that two windows are aligned by: more make nothing better.
_SAMPLES = 20_000


def plan_windows(num_times: int, window: int, stride: int | None = None) -> list[range]:
    """The times of every window: ``window`` of them, ``stride`` after the window before, the last up to the end.

    The last window begins earlier than its stride says where it would reach beyond the end. A recording of at most
    ``window`` times is one window.

    Args:
        num_times: T, at least 2.
        window: at least 2.
        stride: from 1 up to ``window - 1``; by default half of ``window``.

    Raises:
        VggtMvError: one of them out of its range.

    Example:
        >>> plan_windows(11, 4, 3)
        [range(0, 4), range(3, 7), range(6, 10), range(7, 11)]
        >>> plan_windows(3, 4)
        [range(0, 3)]
    """
    if not _whole(window) or window < 2:
        raise VggtMvError(f"window (--window) must be a whole number of times of at least 2, got {window!r}")
    if stride is None:
        stride = window // 2
    if not _whole(stride) or not 1 <= stride < window:
        raise VggtMvError(
            f"stride (--stride) must be a whole number from 1 up to {window - 1}, below window = {window}: windows are "
            f"aligned by the times that they share; got {stride!r}"
        )
    if num_times < 2:
        raise VggtMvError(
            f"window (--window) is for recordings of several times, and this scene has {num_times}; leave it out, or "
            "use layout='times' (--as times) if its images are frames of one camera"
        )
    last = max(0, num_times - window)
    starts = [*range(0, last, stride), last]
    return [range(start, min(start + window, num_times)) for start in starts]


def refuse_tracks(query_points: Any) -> None:
    """Raise VggtMvError where points to track were given: windows after the first do not see where they start."""
    if query_points is not None:
        raise VggtMvError("query_points start at time 0, which the first window alone sees; leave out window, or them")


def check_windows(session: Session) -> None:
    """Look at all that windows need of a model and of masks.

    Raises:
        VggtMvError: a model that predicts no points to align windows by, masks that are missing or of another length.
    """
    model, scene, mask = session.model, session.scene, session.dynamic_mask
    heads = {name: getattr(model, f"{name}_head", None) is not None for name in ("camera", "depth", "point")}
    if not heads["point"] and not (heads["camera"] and heads["depth"]):
        raise VggtMvError(
            "window (--window) needs a model that predicts depth and cameras, or world points: windows are aligned by "
            "their points; this model has neither"
        )
    if isinstance(mask, Tensor | np.ndarray):
        if len(mask) != scene.num_times:
            raise VggtMvError(f"dynamic_mask must have {scene.num_times} times, as the images, got {len(mask)}")
    elif mask is not None:
        find_masks(mask, scene)


@dataclass
class WindowState:
    """What one window leaves to the next: with it, a run can go on later as if it had never stopped.

    Attributes:
        done: whole windows so far.
        pending: frames that the next window sees, too.
        anchor: points of those frames in the last window's own world: "index" (into their pixels), "points",
            "confidence".
        to_first: from the last window's world to the first one's.
        memory: of the memory bank, if the model has one and it is carried.
        records: one entry a window, for the report.
    """

    done: int = 0
    pending: PendingFrames = field(default_factory=lambda: PendingFrames(0))
    anchor: Arrays = field(default_factory=dict)
    to_first: Similarity = field(default_factory=Similarity.identity)
    memory: Tensor | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def to_arrays(self) -> Arrays:
        """All of it as arrays by name; ``from_arrays`` gives the same state back, to the last bit."""
        facts = {"done": self.done, "to_first": self.to_first.to_dict(), "records": self.records}
        arrays = {f"pending/{name}": array for name, array in self.pending.state().items()}
        arrays |= {f"anchor/{name}": array for name, array in self.anchor.items()}
        if self.memory is not None:
            # NumPy has no bfloat16; the model casts to what it computes in.
            arrays["memory"] = self.memory.float().cpu().numpy()
        return {"facts": np.array(json.dumps(facts)), **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> WindowState:
        """What ``to_arrays`` gave, as a state again."""
        facts = json.loads(str(arrays["facts"]))
        parts: dict[str, Arrays] = {"pending": {}, "anchor": {}}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if kind in parts:
                parts[kind][rest] = array
        return cls(
            done=facts["done"],
            pending=PendingFrames.from_state(parts["pending"]),
            anchor=parts["anchor"],
            to_first=Similarity.from_dict(facts["to_first"]),
            memory=torch.from_numpy(arrays["memory"]) if "memory" in arrays else None,
            records=facts["records"],
        )


def run_windows(
    session: Session,
    plan: list[range],
    state: WindowState,
    write: Callable[[int, Arrays], None],
    *,
    carry_memory: bool = True,
    commit: Callable[[], None] | None = None,
) -> None:
    """Run the windows of a plan that ``state`` has not seen yet, and bring ``state`` up to date.

    Args:
        session: what runs.
        plan: of ``plan_windows``.
        state: of the windows before; changed in place.
        write: called with (time, arrays [times, N, ...] by name) for frames that are complete, in their order.
        carry_memory: start the memory bank of a window from where the window before left it.
        commit: called after each window, when all before was written and ``state`` is up to date.
    """
    run, scene = session.run, session.scene
    if state.done == len(plan):
        return
    frames = _SlidingFrames(session, plan[state.done].start)
    with evaluation(session.model, run.device):  # once, not for every window: moving a model takes long
        for index in range(state.done, len(plan)):
            times = plan[index]
            images, mask = frames.read(times), _read_masks(session, times)
            predicted: Arrays = dict(
                run.predict(
                    session.model,
                    images,
                    None,
                    session.attention["used"],
                    scene.single_sequence,
                    mask,
                    state.memory if carry_memory else None,
                )
            )
            predicted["images"] = to_uint8(images[0])
            state.records.append(_place(session, state, times, predicted))
            state.pending.add(times.start, transformed(predicted, state.to_first))
            following = plan[index + 1].start if index + 1 < len(plan) else times.stop
            state.anchor = _anchor(session, predicted, times, following) if following < times.stop else {}
            state.memory = run.memory_state if carry_memory else None
            start = state.pending.start
            write(start, state.pending.pop(following))
            state.done = index + 1
            if commit is not None:
                commit()
            run.on_stage("windows", state.done, len(plan))


def reconstruct_in_windows(
    session: Session, window: int, stride: int | None = None, *, carry_memory: bool = True
) -> Reconstruction:
    """The scene of a session, reconstructed in windows, in memory.

    Raises:
        VggtMvError: window or stride out of range, a model that cannot do it, or windows that cannot be aligned.
    """
    plan = plan_windows(session.scene.num_times, window, stride)
    check_windows(session)
    result: Arrays = {}

    def write(start: int, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name not in result:
                result[name] = np.empty((session.scene.num_times, *array.shape[1:]), dtype=array.dtype)
            result[name][start : start + len(array)] = array

    state = WindowState()
    run_windows(session, plan, state, write, carry_memory=carry_memory)
    reconstruction = session.reconstruction(result)
    reconstruction.report = {**session.report(result), "windows": describe_windows(session, plan, state, carry_memory)}
    return reconstruction


def reconstruct_to_folder(
    source: Source,
    model: nn.Module,
    folder: str | Path,
    *,
    window: int,
    stride: int | None = None,
    carry_memory: bool = True,
    overwrite: bool = False,
    conf_percentile: float = DEFAULT_CONF_PERCENTILE,
    model_config: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> StoredReconstruction:
    """Reconstruct a long recording in windows, written to disk as it goes: memory does not depend on the length.

    Until it is complete, all lies in ``.NAME.partial`` beside the folder. A run that was stopped, by Ctrl-C, by a crash
    or by SIGKILL, goes on after its last whole window when the same call is made again, and ends with the same numbers
    as if it had never stopped.

    Args:
        source, model: as for ``reconstruct``.
        folder: must not exist or be empty, unless ``overwrite``. What it gets is in docs/outputs.md.
        window, stride: see ``plan_windows``.
        carry_memory: let a memory bank go on from window to window.
        overwrite: replace an earlier output, and discard an unfinished run with other input, options or weights.
        conf_percentile: percent of the points to drop from points.ply.
        model_config: what report.json calls the model's configuration.
        **options: of ``reconstruct``, but ``query_points``.

    Raises:
        VggtMvError: as ``reconstruct`` and ``reconstruct_in_windows``; a folder that cannot be written; an unfinished
            run for that folder whose input, options or weights were others.

    Example:
        >>> from vggt_mv.models.configs import build_model                                         # doctest: +SKIP
        >>> model = build_model("vggt_mv_demo")                                                    # doctest: +SKIP
        >>> result = reconstruct_to_folder("walk.mp4", model, "out", window=16, stride=8)           # doctest: +SKIP
        >>> result.arrays()["depth"][1000]                                                         # doctest: +SKIP
    """
    from vggt_mv.scene.export.folder import check_target
    from vggt_mv.scene.export.frames import FrameStore
    from vggt_mv.scene.export.resumable import resumable_folder
    from vggt_mv.scene.export.stored import PREDICTIONS, StoredReconstruction, frame_arrays, write_stored_outputs

    check_percentile(conf_percentile)
    check_target(Path(folder).resolve(), str(folder), overwrite)
    refuse_tracks(options.get("query_points"))
    session = begin(source, model, **options)
    plan = plan_windows(session.scene.num_times, window, stride)
    check_windows(session)
    fingerprint = fingerprint_of(session, plan, carry_memory)
    with resumable_folder(folder, fingerprint, overwrite=overwrite) as partial, _disk_errors(folder):
        store = FrameStore(partial.output / PREDICTIONS, session.scene.num_times)
        found = partial.load()
        state = WindowState() if found is None else WindowState.from_arrays(found)
        resumed = state.done
        run_windows(
            session,
            plan,
            state,
            lambda start, arrays: store.write(start, frame_arrays(session.reconstruction(arrays, start))),
            carry_memory=carry_memory,
            commit=lambda: partial.commit(state.to_arrays()),
        )
        partial.clear_output(PREDICTIONS)  # of what a run that was stopped after the last window had written
        report = session.report(store.names())
        report["windows"] = {**describe_windows(session, plan, state, carry_memory), "resumed_after": resumed or None}
        if model_config is not None:
            report["model"]["config"] = dict(model_config) if isinstance(model_config, Mapping) else model_config
        report = write_stored_outputs(
            session,
            store,
            partial.output,
            report,
            conf_percentile=conf_percentile,
            progress=session.run.progress,
        )
    return StoredReconstruction(
        folder=Path(folder),
        num_times=session.scene.num_times,
        num_views=session.scene.num_views,
        network_size=session.network_size,
        weights=provenance_of(model),
        report=report,
    )


def describe_windows(session: Session, plan: list[range], state: WindowState, carry_memory: bool) -> dict[str, Any]:
    """The part of the report that concerns windows."""
    aggregator = getattr(session.model, "aggregator", None)
    if getattr(aggregator, "memory_tokens", None) is None:
        memory = "none: the model has no memory bank"
    else:
        memory = "carried from window to window" if carry_memory else "each window starts anew"
    return {
        "count": len(plan),
        "window": len(plan[0]),
        "stride": plan[1].start - plan[0].start if len(plan) > 1 else None,
        "memory": memory,
        "windows": state.records,
    }


def transformed(arrays: Arrays, similarity: Similarity) -> Arrays:
    """Predictions of a window in another world: cameras, depth and world points; dtypes stay."""
    if similarity.scale == 1 and not similarity.translation.any() and (similarity.rotation == np.eye(3)).all():
        return arrays  # to the last bit
    moved = dict(arrays)
    if "extrinsics" in arrays:
        moved["extrinsics"] = similarity.apply_to_cameras(arrays["extrinsics"]).astype(arrays["extrinsics"].dtype)
    if "depth" in arrays:
        moved["depth"] = (arrays["depth"] * similarity.scale).astype(arrays["depth"].dtype)
    if "world_points" in arrays:
        moved["world_points"] = similarity.apply(arrays["world_points"]).astype(arrays["world_points"].dtype)
    return moved


class _SlidingFrames:
    """Frames as the network takes them, each decoded once, those of one window in memory."""

    def __init__(self, session: Session, start: int) -> None:
        self._session = session
        self._coming = session.scene.frames(start)
        self._frames: list[Tensor] = []
        self._start = start

    def read(self, times: range) -> Tensor:
        """[1, T, N, 3, H, W] of a window that does not begin before the last one."""
        del self._frames[: times.start - self._start]
        self._start = times.start
        new = len(times) - len(self._frames)
        for done in range(1, new + 1):
            views = next(self._coming)
            pixels = [transform.apply(image) for transform, image in zip(self._session.transforms, views, strict=True)]
            self._frames.append(torch.stack(pixels))
            self._session.run.on_stage("images", done, new)
        return torch.stack(self._frames)[None]


def _read_masks(session: Session, times: range) -> NDArray[np.float32] | None:
    mask = session.dynamic_mask
    if mask is None:
        return None
    if isinstance(mask, Tensor | np.ndarray):
        mask = mask[times.start : times.stop]
    return read_masks(mask, session.scene.part(times.start, times.stop), session.transforms)


def _anchor(session: Session, arrays: Arrays, times: range, following: int) -> Arrays:
    """Points of the times from ``following`` on, which the next window sees, too."""
    points, confidence, keep = _points(session, arrays, following - times.start, len(times), times.start)
    usable = np.flatnonzero(keep)
    if len(usable) > _SAMPLES:
        usable = usable[np.unique(np.random.default_rng(0).integers(len(usable), size=_SAMPLES))]
    return {"index": usable, "points": points[usable], "confidence": confidence[usable]}


def _place(session: Session, state: WindowState, times: range, arrays: Arrays) -> dict[str, Any]:
    """Find the way from a window's world to the first one's, for ``state``, and an account of it."""
    record: dict[str, Any] = {"start": times.start, "stop": times.stop}
    if state.done:
        fit = _align(session, state, times, arrays)
        state.to_first = state.to_first.after(fit.similarity)
        record["to_previous"] = fit.similarity.to_dict()
        record["alignment"] = {
            "points": fit.points,
            "median_residual": fit.median_residual,
            "rms_residual": fit.rms_residual,
            "inlier_share": fit.inlier_share,
            "extent": fit.extent,
        }
    record["to_first"] = state.to_first.to_dict()
    return record


def _align(session: Session, state: WindowState, times: range, arrays: Arrays) -> SimilarityFit:
    shared = state.pending.stop - times.start
    points, confidence, keep = _points(session, arrays, 0, shared, times.start)
    index = state.anchor["index"]
    both = keep[index]
    chosen = index[both]
    weights = np.sqrt(state.anchor["confidence"][both].clip(0) * confidence[chosen].clip(0))
    try:
        return similarity_transform(points[chosen], state.anchor["points"][both], weights)
    except VggtMvError as error:
        raise VggtMvError(
            f"the window of times {times.start} to {times.stop - 1} cannot be aligned to the one before by the "
            f"{shared} times that they share ({error}); let windows overlap more: a smaller stride (--stride)"
        ) from error


def _points(
    session: Session, arrays: Arrays, first: int, last: int, start: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Points [K, 3], confidence [K] and usable pixels [K] of some times of a window, all its pixels in a row."""
    part = {name: array[first:last] for name, array in arrays.items()}
    points, confidence, keep = session.reconstruction(part, start + first).usable_points()
    weights = np.ones(keep.shape) if confidence is None else confidence
    return points.reshape(-1, 3).astype(np.float64), weights.reshape(-1).astype(np.float64), keep.reshape(-1)


@contextlib.contextmanager
def _disk_errors(folder: str | Path) -> Iterator[None]:
    """What the disk refuses, as one line."""
    try:
        yield
    except OSError as error:
        raise VggtMvError(
            f"output folder {str(folder)!r} cannot be written ({error.strerror or error}); make room, and the same "
            "command goes on after the last whole window"
        ) from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
