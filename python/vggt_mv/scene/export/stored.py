"""The files of a reconstruction that is too long for memory: written from arrays on disk, one time after the other."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggt_mv.scene.export.cameras import camera_entries, cameras_dict
from vggt_mv.scene.export.depth import depth_to_rgb, overview_rows, preview_names, save_picture, write_overview
from vggt_mv.scene.export.frames import FrameStore
from vggt_mv.scene.export.mask import mask_overlay
from vggt_mv.scene.export.npz import ARRAYS, describe_arrays, npz_arrays
from vggt_mv.scene.export.percentiles import streamed_percentiles
from vggt_mv.scene.export.ply import made_by, ply_header, ply_vertices
from vggt_mv.scene.export.report import array_table, count_non_finite, report_dict
from vggt_mv.scene.reconstruction import RANDOM_WEIGHTS_NOTE, ProgressCallback, Reconstruction
from vggt_mv.scene.session import Session
from vggt_mv.weights import WeightsProvenance, provenance_of

__all__ = ["PREDICTIONS", "StoredReconstruction", "frame_arrays", "load_predictions", "write_stored_outputs"]

PREDICTIONS = "predictions"

_PER_FRAME = {spec.name for spec in ARRAYS if spec.axes.startswith("T N ")}
_OF_RECONSTRUCTION = {field.name for field in fields(Reconstruction)}


@dataclass(frozen=True)
class StoredReconstruction:
    """A reconstruction that lies in a folder, as ``Reconstruction.save`` leaves one, but for its arrays.

    Attributes:
        folder: with cameras.json, points.ply, pictures, report.json, and the arrays in ``predictions/``.
        num_times, num_views: T and N.
        network_size: (H, W) of the images that the network saw.
        weights: where the model's weights came from.
        report: the content of report.json.
    """

    folder: Path
    num_times: int
    num_views: int
    network_size: tuple[int, int]
    weights: WeightsProvenance
    report: dict[str, Any]

    @property
    def random_weights(self) -> bool:
        """True where the weights are an untrained model's: the numbers mean nothing."""
        return self.weights.family == "random"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All predictions by name, mapped into memory: what is looked at is read."""
        return load_predictions(self.folder)


def load_predictions(folder: str | Path) -> dict[str, NDArray[Any]]:
    """All arrays of an output folder by name, whether it was written at once or in windows.

    Those of ``predictions/`` are mapped into memory, read only; those of ``predictions.npz`` are read.
    """
    inside = Path(folder) / PREDICTIONS
    if inside.is_dir():
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(inside.glob("*.npy"))}
    with np.load(inside.with_suffix(".npz")) as file:
        return dict(file)


def frame_arrays(reconstruction: Reconstruction) -> dict[str, NDArray[Any]]:
    """The arrays [T, N, ...] of a part of a reconstruction that are stored."""
    return {name: array for name, array in npz_arrays(reconstruction).items() if name in _PER_FRAME}


def write_stored_outputs(
    session: Session,
    store: FrameStore,
    folder: Path,
    report: dict[str, Any],
    *,
    conf_percentile: float,
    progress: ProgressCallback | None,
) -> dict[str, Any]:
    """Write all that ``write_outputs`` writes, from arrays in ``folder/predictions``.

    Args:
        session: what ran.
        store: holds ``frame_arrays`` of all times.
        folder: empty but for the store.
        report: as ``Reconstruction.report``.
        conf_percentile: see ``Reconstruction.point_cloud``.
        progress: called with ("write", steps done, steps in all).

    Returns:
        The content of report.json.
    """
    return _Writer(session, store, folder, progress).write(report, conf_percentile)


class _Writer:
    """The outputs of one folder. Every pass over the recording reads one time at once."""

    def __init__(self, session: Session, store: FrameStore, folder: Path, progress: ProgressCallback | None) -> None:
        self.session, self.store, self.folder, self.progress = session, store, folder, progress
        self.scene = session.scene
        self.names = sorted(set(store.names()) & _PER_FRAME)
        self.pictures = preview_names(self.scene.names)
        self.done = 0

    def write(self, report: dict[str, Any], conf_percentile: float) -> dict[str, Any]:
        started = time.perf_counter()
        has = set(self.names)
        cameras, depth = {"extrinsics", "intrinsics"} <= has, "depth" in has
        mask = bool(has & {"dynamic_mask", "given_mask"})
        no_cameras = None if cameras else "the model has no camera head"
        no_depth = None if depth else "the model has no depth head"
        not_written = {"cameras.json": no_cameras, "depth": no_depth}
        not_written["dynamic_mask"] = None if mask else "no mask of what moves was predicted or given"
        self.total = self.scene.num_times * (3 + cameras + depth + mask)
        points: dict[str, object] = {}
        near, far = self._depth_range() if depth else (1.0, 1.0)
        if cameras:
            self._write_cameras()
        self._write_points(conf_percentile, points)
        if depth:
            self._write_depth(near, far)
        if mask:
            self._write_masks()
        self._write_overview((near, far))
        arrays, non_finite = self._finish_predictions()
        head = self._part(0)
        head.report = report
        files = sorted(
            {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
            | {"report.json"}
        )
        content = report_dict(
            head,
            files,
            points=points,
            not_written={name: why for name, why in not_written.items() if why},
            write_seconds=time.perf_counter() - started,
            arrays=arrays,
            non_finite=non_finite,
        )
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (self.folder / "report.json").write_text(text, encoding="utf-8")
        return content

    def _part(self, t: int, names: set[str] | None = None) -> Reconstruction:
        """One time; with the arrays named, and images, which every reconstruction has."""
        wanted = set(self.names) if names is None else names | {"images"}
        return self.session.reconstruction(self.store.read(t, t + 1, wanted & _OF_RECONSTRUCTION), t)

    def _parts(self, names: set[str] | None = None, *, count: bool = True) -> Iterator[tuple[int, Reconstruction]]:
        for t in range(self.scene.num_times):
            yield t, self._part(t, names)
            if count:
                self.done += 1
                if self.progress is not None:
                    self.progress("write", self.done, self.total)

    def _depth_range(self) -> tuple[float, float]:
        """As ``depth_range`` of all frames at once."""

        def usable() -> Iterator[NDArray[Any]]:
            for _, part in self._parts({"depth"}, count=False):
                assert part.depth is not None
                yield part.depth[np.isfinite(part.depth) & (part.depth > 0) & part.valid_pixels()]

        found = streamed_percentiles(usable, [2, 98])
        return (1.0, 1.0) if found is None else (found[0], found[1])

    def _write_cameras(self) -> None:
        head = cameras_dict(self._part(0))
        head["times"] = [
            {"index": t, "seconds": None if self.scene.times is None else self.scene.times[t]}
            for t in range(self.scene.num_times)
        ]
        del head["cameras"]
        with (self.folder / "cameras.json").open("w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ',\n "cameras": [')
            separator = "\n"
            for t, part in self._parts({"extrinsics", "intrinsics"}):
                for entry in camera_entries(part, t):
                    file.write(separator + textwrap.indent(json.dumps(entry, indent=1, allow_nan=False), "  "))
                    separator = ",\n"
            file.write("\n ]\n}\n")

    def _write_points(self, conf_percentile: float, facts: dict[str, object]) -> None:
        needed = set(self.names) - {"dynamic_mask", "given_mask"}

        def confidences() -> Iterator[NDArray[Any]]:
            for _, part in self._parts(needed, count=False):
                _, confidence, keep = part.usable_points()
                if confidence is not None:
                    yield confidence[keep]

        found = streamed_percentiles(confidences, [conf_percentile])
        threshold = None if found is None else found[0]
        count = sum(len(part.points_above(threshold)) for _, part in self._parts(needed))
        weights = provenance_of(self.session.model)
        comments = made_by(weights.description, weights.family == "random")
        with (self.folder / "points.ply").open("wb") as file:
            for t, part in self._parts(needed):
                vertices = ply_vertices(part.points_above(threshold), first_time=t, num_times=self.scene.num_times)
                if t == 0:
                    file.write(ply_header(vertices.dtype, count, comments))
                vertices.tofile(file)
        facts.update(count=count, conf_percentile=conf_percentile, conf_threshold=threshold)

    def _write_depth(self, near: float, far: float) -> None:
        def picture(part: Reconstruction, n: int) -> NDArray[np.uint8]:
            assert part.depth is not None
            return depth_to_rgb(part.depth[0, n], near, far, part.valid_pixels()[0, n])

        self._write_pictures("depth", {"depth"}, picture)

    def _write_masks(self) -> None:
        def picture(part: Reconstruction, n: int) -> NDArray[np.uint8]:
            predicted, given = part.dynamic_mask, part.given_mask
            return mask_overlay(
                part.images[0, n],
                None if predicted is None else predicted[0, n],
                None if given is None else given[0, n],
            )

        self._write_pictures("dynamic_mask", {"dynamic_mask", "given_mask"}, picture)

    def _write_pictures(
        self, name: str, needed: set[str], draw: Callable[[Reconstruction, int], NDArray[np.uint8]]
    ) -> None:
        (self.folder / name).mkdir()
        for t, part in self._parts(needed):
            for n in range(self.scene.num_views):
                save_picture(Image.fromarray(draw(part, n)), self.folder / name / self.pictures[t][n], part)

    def _write_overview(self, near_far: tuple[float, float]) -> None:
        rows = overview_rows(self.scene.num_times, self.scene.num_views)
        chosen = sorted({t for row in rows for t, _ in row})
        parts = [self._part(t, {"images", "depth"}) for t in chosen]
        depths = [part.depth for part in parts if part.depth is not None]
        together = Reconstruction(
            images=np.concatenate([part.images for part in parts]),
            names=[part.names[0] for part in parts],
            view_names=self.scene.view_names,
            transforms=self.session.transforms,
            weights=parts[0].weights,
            depth=np.concatenate(depths) if depths else None,
        )
        cells = [[(chosen.index(t), n) for t, n in row] for row in rows]
        write_overview(together, self.folder / "overview.png", rows=cells, near_far=near_far)

    def _finish_predictions(self) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
        """Write what is not of a time; tell the table of arrays and how many values are not finite."""
        non_finite = dict.fromkeys(self.names, 0)
        for t in range(self.scene.num_times):
            for name, array in self.store.read(t, t + 1, self.names).items():
                non_finite[name] += count_non_finite(array)
            self.done += 1
            if self.progress is not None:
                self.progress("write", self.done, self.total)
        head = npz_arrays(self._part(0))
        small = {name: array for name, array in head.items() if name not in _PER_FRAME and name != "__doc__"}
        small["names"] = np.array(self.scene.names, dtype=np.str_)
        if self.scene.times is not None:
            small["times"] = np.array(self.scene.times, dtype=np.float64)
        for name, array in small.items():
            np.save(self.folder / PREDICTIONS / f"{name}.npy", array)
        shapes = {**{name: self.store.shapes()[name] for name in self.names}, **{n: a.shape for n, a in small.items()}}
        text = describe_arrays(set(shapes))
        if self._part(0).random_weights:
            text = f"{RANDOM_WEIGHTS_NOTE}.\n{text}"
        (self.folder / PREDICTIONS / "README.txt").write_text(text + "\n", encoding="utf-8")
        order = [spec.name for spec in ARRAYS if spec.name in shapes]
        return array_table({name: shapes[name] for name in order}), non_finite
