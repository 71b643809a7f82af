"""open_scene: from paths to a Scene, every bad input found on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vggt_mv.errors import SceneError
from vggt_mv.scene.sources.folders import (
    camera_images,
    counted,
    distinct_names,
    folder_images,
    grid_images,
    guess_layout,
    list_folder,
    natural_key,
    time_folders,
)
from vggt_mv.scene.sources.images import IMAGE_SUFFIXES, check_image, read_image
from vggt_mv.scene.sources.scene import (
    FrameCallback,
    Layout,
    Scene,
    SceneKind,
    check_count,
    check_layout,
    refuse_layout,
)
from vggt_mv.scene.sources.synchronize import synchronize
from vggt_mv.scene.sources.videos import VIDEO_SUFFIXES, Video, probe_video, read_frames

AnyPath = str | PathLike[str]
Source = AnyPath | Sequence[AnyPath]
_Item = TypeVar("_Item")


def open_scene(
    source: Source,
    *,
    layout: Layout = "auto",
    max_frames: int | None = None,
    allow_single: bool = False,
    on_frame: FrameCallback | None = None,
) -> Scene:
    """Open images or videos as T times x N views.

    ``source`` is one of

    * a folder of ``time_*/view*`` images: a grid. Views are matched by name; times are in natural order (time_2 before
      time_10).
    * a folder of images, or a list of images: N views of one time, or T times of one camera, as ``layout`` says.
    * several folders of images, one per camera: images of one name are one time; without common names, order counts.
    * several videos, one per camera: their first frames are one moment; from there on they are matched by time stamps.
    * one video: T times of one camera; with ``layout="views"`` N views, for a walk through a static scene.

    Everything that will be used is looked at now: names, sizes, and whether files are whole (see
    ``sources.images.check_image`` and ``sources.videos``). It is decoded when the scene is read.

    Args:
        source: a path, or a sequence of paths of one sort. ``~`` is expanded.
        layout: for one folder of images or one video: "views", "times", or "auto": times for videos and for file names
            that count frames (frame_0001, time12, t3), views otherwise. The scene's ``notes`` say which and why.
        max_frames: use at most this many times (for layout "views": views), evenly spread, the first and the last among
            them: number ``round(i (count - 1) / (max_frames - 1))`` for each i. Files left out are not opened.
        allow_single: let a scene of one image pass.
        on_frame: called with (files checked, files in all).

    Raises:
        SceneError: anything missing, empty, unreadable, truncated, ambiguous or inconsistent, in one line with the
            remedy.

    Example:
        >>> scene = open_scene("recording/", max_frames=8)   # doctest: +SKIP
        >>> scene.describe()                                 # doctest: +SKIP
        'grid: 8 times x 4 views, 1920x1080'
    """
    check_layout(layout)
    if max_frames is not None and (not isinstance(max_frames, int) or isinstance(max_frames, bool) or max_frames < 1):
        raise SceneError(f"max_frames must be a whole number of at least 1, got {max_frames!r}")
    paths, shown = _existing_paths(source)
    options = _Options(shown, layout, max_frames, allow_single, on_frame)
    if all(path.is_dir() for path in paths):
        if len(paths) > 1:
            return _open_folders(paths, options)
        times = time_folders(paths[0])
        return _open_grid(paths[0], times, options) if times else _open_folder(paths[0], options)
    suffixes = {path: "/" if path.is_dir() else path.suffix.lower() for path in paths}
    if all(suffix in VIDEO_SUFFIXES for suffix in suffixes.values()):
        return _open_video(paths[0], options) if len(paths) == 1 else _open_videos(paths, options)
    if all(suffix in IMAGE_SUFFIXES for suffix in suffixes.values()):
        return _open_images(
            paths, [path.name for path in paths] if len(paths) == 1 else distinct_names(paths), [], options
        )
    for path, suffix in suffixes.items():
        if suffix not in ("/", *IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            raise SceneError(
                f"{str(path)!r} has suffix {path.suffix!r}; supported are folders, images "
                f"({', '.join(IMAGE_SUFFIXES)}) and videos ({', '.join(VIDEO_SUFFIXES)}); convert it to one of them"
            )
    sorts = {_sort(suffix): path for path, suffix in suffixes.items()}
    (one, first), (other, second), *_ = sorts.items()
    raise SceneError(
        f"sources must be of one sort: {str(first)!r} is {one}, {str(second)!r} {other}; name folders only, videos "
        "only or images only"
    )


class _Options:
    """The arguments of open_scene that every kind of source needs."""

    def __init__(
        self, source: str, layout: Layout, max_frames: int | None, allow_single: bool, on_frame: FrameCallback | None
    ) -> None:
        self.source, self.layout, self.allow_single, self.on_frame = source, layout, allow_single, on_frame
        self.max_frames = max_frames

    def subsample(self, items: Sequence[_Item], what: str, notes: list[str]) -> list[_Item]:
        """At most ``max_frames`` of the items, evenly spread; a note where some are left out."""
        if self.max_frames is None or len(items) <= self.max_frames:
            return list(items)
        notes.append(f"{self.max_frames} of {len(items)} {what} used, evenly spread (max_frames)")
        chosen = np.linspace(0, len(items) - 1, self.max_frames).round().astype(int)
        return [items[int(index)] for index in chosen]


def _open_grid(folder: Path, times: list[Path], options: _Options) -> Scene:
    refuse_layout(options.layout, f"folder {options.source!r} with time_* folders")
    images, _, _ = list_folder(folder)
    notes = [f"{counted(len(images), 'image')} beside the time_* folders ignored"] if images else []
    grid, view_names = grid_images(folder, times)
    rows = options.subsample(grid, "times", notes)
    names = [[f"{path.parent.name}/{path.name}" for path in views] for views in rows]
    return _scene_of_images("grid", "times x views", rows, names, view_names, notes, options)


def _open_folders(folders: list[Path], options: _Options) -> Scene:
    refuse_layout(options.layout, f"a set of {len(folders)} camera folders")
    for folder in folders:
        if time_folders(folder):
            raise SceneError(
                f"folder {str(folder)!r} has time_* folders, which hold all cameras of a time: name it alone, "
                "or name one plain folder of images per camera"
            )
    grid, notes = camera_images(folders)
    view_names = distinct_names(folders)
    rows = options.subsample(grid, "times", notes)
    names = [[f"{view}/{path.name}" for view, path in zip(view_names, views, strict=True)] for views in rows]
    return _scene_of_images("folders", "times x views", rows, names, view_names, notes, options)


def _open_folder(folder: Path, options: _Options) -> Scene:
    images, notes = folder_images(folder)
    return _open_images(images, [image.name for image in images], notes, options)


def _open_images(images: list[Path], names: list[str], notes: list[str], options: _Options) -> Scene:
    if options.layout == "auto":
        layout, reason = guess_layout(images)
        notes = [
            *notes,
            f"layout {layout!r}: {reason}; layout={_other(layout)!r} (--as {_other(layout)}) says otherwise",
        ]
    else:
        layout = options.layout
    chosen = options.subsample(list(zip(images, names, strict=True)), layout, notes)
    paths, names = [path for path, _ in chosen], [name for _, name in chosen]
    if layout == "views":
        stems = [path.stem for path in paths]
        view_names = stems if len(set(stems)) == len(stems) else names
        return _scene_of_images("folder", layout, [paths], [names], view_names, notes, options)
    view_names = [paths[0].parent.resolve().name or "camera"]
    return _scene_of_images(
        "folder", layout, [[path] for path in paths], [[name] for name in names], view_names, notes, options
    )


def _open_video(path: Path, options: _Options) -> Scene:
    video = _probe([path], options)[0]
    layout = "times" if options.layout == "auto" else options.layout
    notes = (
        []
        if options.layout != "auto"
        else ["layout 'times': a video; layout='views' (--as views) for a walk through a static scene"]
    )
    chosen = options.subsample(range(video.num_frames), "frames", notes)
    check_count(len(chosen), f"video {options.source!r}", options.allow_single)
    labels = [f"{path.name}#{index}" for index in chosen]
    as_views = layout == "views"
    return Scene(
        kind="video",
        layout=layout,
        single_sequence=True,
        names=[labels] if as_views else [[label] for label in labels],
        view_names=[f"frame {index}" for index in chosen] if as_views else [path.stem],
        image_sizes=[video.size] * (len(chosen) if as_views else 1),
        times=None if as_views else [video.times[index] for index in chosen],
        source=options.source,
        notes=notes,
        _decode=lambda start: read_frames(video, chosen[start:]),
    )


def _open_videos(paths: list[Path], options: _Options) -> Scene:
    refuse_layout(options.layout, f"a set of {len(paths)} videos")
    videos = _probe(paths, options)
    indices, notes = synchronize(videos)
    moments = options.subsample(list(zip(*indices, strict=True)), "times", notes)
    view_names = [str(Path(name).with_suffix("")) for name in distinct_names(paths)]
    if len(set(view_names)) < len(view_names):
        view_names = distinct_names(paths)
    slowest = max(range(len(videos)), key=lambda n: videos[n].interval)

    def decode(start: int) -> Iterator[Image.Image]:
        cameras = [read_frames(video, [moment[n] for moment in moments[start:]]) for n, video in enumerate(videos)]
        return chain.from_iterable(zip(*cameras, strict=True))

    check_count(len(moments) * len(videos), "videos", options.allow_single)
    return Scene(
        kind="videos",
        layout="times x views",
        single_sequence=False,
        names=[[f"{path.name}#{index}" for path, index in zip(paths, moment, strict=True)] for moment in moments],
        view_names=view_names,
        image_sizes=[video.size for video in videos],
        times=[videos[slowest].times[moment[slowest]] for moment in moments],
        source=options.source,
        notes=notes,
        _decode=decode,
    )


def _probe(paths: Sequence[Path], options: _Options) -> list[Video]:
    videos = []
    for done, path in enumerate(paths, start=1):
        videos.append(probe_video(path))
        if options.on_frame is not None:
            options.on_frame(done, len(paths))
    return videos


def _scene_of_images(
    kind: SceneKind,
    layout: str,
    rows: list[list[Path]],
    names: list[list[str]],
    view_names: list[str],
    notes: list[str],
    options: _Options,
) -> Scene:
    """Check all files of a grid ``rows[t][n]`` and make the scene."""
    check_count(sum(map(len, rows)), f"{options.source!r}", options.allow_single)
    image_sizes: list[tuple[int, int]] = []
    total = len(rows) * len(view_names)
    for t, views in enumerate(rows):
        for n, path in enumerate(views):
            size = check_image(path)
            if t == 0:
                image_sizes.append(size)
            elif size != image_sizes[n]:
                first = image_sizes[n]
                remedy = (
                    "if these are different cameras, use layout='views', mode='pad' (--as views --preprocess pad)"
                    if kind == "folder"
                    else "scale them to one"
                )
                raise SceneError(
                    f"images of view {view_names[n]!r} must have one size at all times: {names[0][n]!r} is "
                    f"{first[1]}x{first[0]}, {names[t][n]!r} is {size[1]}x{size[0]}; {remedy}"
                )
            if options.on_frame is not None:
                options.on_frame(t * len(view_names) + n + 1, total)
    return Scene(
        kind=kind,
        layout=layout,
        single_sequence=kind == "folder",
        names=names,
        view_names=view_names,
        image_sizes=image_sizes,
        source=options.source,
        notes=notes,
        _decode=_image_decoder(rows),
    )


def _image_decoder(rows: list[list[Path]]) -> Callable[[int], Iterator[Image.Image]]:
    return lambda start: map(read_image, chain.from_iterable(rows[start:]))


def _existing_paths(source: Source) -> tuple[list[Path], str]:
    """The paths of a source, all of which exist, none twice; and the source as the user wrote it."""
    if not isinstance(source, (str, PathLike)) and (
        not isinstance(source, Sequence) or not all(isinstance(item, (str, PathLike)) for item in source)
    ):
        raise SceneError(
            f"source must be a path or a sequence of paths, got {type(source).__name__}; for images in memory use "
            "Scene.from_tensor"
        )
    items = [source] if isinstance(source, (str, PathLike)) else list(source)
    if not items:
        raise SceneError("source is an empty list; name a folder, images or videos")
    paths = []
    for item in items:
        path = Path(item).expanduser()
        if not str(item) or not path.exists():
            raise SceneError(f"{str(item)!r} does not exist; {_nearest_existing(path)}")
        paths.append(path)
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise SceneError(f"{str(path)!r} is named twice; every camera or image is named once")
        seen[path.resolve()] = path
    return paths, " ".join(str(item) for item in items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _nearest_existing(path: Path) -> str:
    """How far a path that does not exist can be followed, for whoever mistyped it."""
    if path.is_symlink():
        return "it is a link to something that is gone; mend or remove it"
    parent = next((parent for parent in path.parents if parent.is_dir()), None)
    if parent is None:
        return "check its spelling"
    try:
        inside = sorted((entry.name for entry in parent.iterdir() if not entry.name.startswith(".")), key=natural_key)
    except OSError:
        inside = []
    some = f"holds {', '.join(inside[:4])}{' ...' if len(inside) > 4 else ''}" if inside else "is empty"
    return f"check its spelling ({str(parent)!r} {some})"


def _sort(suffix: str) -> str:
    return "a folder" if suffix == "/" else "a video" if suffix in VIDEO_SUFFIXES else "an image"


def _other(layout: str) -> str:
    return "times" if layout == "views" else "views"
