"""Folders of images: what lies in them, in which order, and what is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vggt_mv.errors import SceneError
from vggt_mv.scene.sources.images import IMAGE_SUFFIXES
from vggt_mv.scene.sources.videos import VIDEO_SUFFIXES

_SHOWN_NAMES = 4
# frame_0001, frame-12, t003, time7. A number alone says nothing: photographs are numbered too.
_TIME_NAME = re.compile(r"(frame|time|t)[ _.-]?\d+", re.IGNORECASE)


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key that counts: view2 before view10. Names that count alike ("1", "01") fall back to their letters."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part], name


def list_folder(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(images, folders, other files) of a folder, hidden ones left out, each in natural order.

    Raises:
        SceneError: the folder cannot be read.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        entries.sort(key=lambda entry: natural_key(entry.name))
        folders = [entry for entry in entries if entry.is_dir()]
        files = [entry for entry in entries if not entry.is_dir()]
    except OSError as error:
        raise SceneError(f"folder {str(folder)!r} cannot be read ({error.strerror}); check its permissions") from error
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, folders, [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]


def folder_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The images of one folder in natural order, and notes.

    Raises:
        SceneError: the folder is empty or has no images; it says what there is instead, and what to do with that.
    """
    images, folders, others = list_folder(folder)
    if images:
        ignored = f"{folder.name}: {counted(len(others), 'file')} of other kinds ignored ({shown_names(others)})"
        return images, [ignored] if others else []
    if not folders and not others:
        raise SceneError(
            f"folder {str(folder)!r} is empty; name a folder of images, of time_*/view* images, or a video"
        )
    found = shown_names([*folders, *others])
    videos = [file for file in others if file.suffix.lower() in VIDEO_SUFFIXES]
    if videos:
        remedy = f"name the videos themselves, one per camera: {' '.join(str(video) for video in videos[:2])} ..."
    elif inside := [inner for inner in folders if time_folders(inner) or list_folder(inner)[0]]:
        if len(inside) == 1:
            remedy = f"name the folder that has them: {inside[0]}"
        else:
            remedy = "name its folders themselves, one per camera, or call them time_* if each is a moment"
    else:
        remedy = f"supported are {', '.join(IMAGE_SUFFIXES)}"
    raise SceneError(f"folder {str(folder)!r} has no images, it has {found}; {remedy}")


def time_folders(folder: Path) -> list[Path]:
    """The ``time_*`` folders in a folder, in natural order; empty where this is not a grid."""
    return [inner for inner in list_folder(folder)[1] if inner.name.lower().startswith("time_")]


def grid_images(folder: Path, times: Sequence[Path]) -> tuple[list[list[Path]], list[str]]:
    """``images[t][n]`` of ``time_*/view*`` and the view names; views are matched by name, whatever their suffix.

    Raises:
        SceneError: a time without images, views missing at some times, two files of one view.
    """
    per_time: list[dict[str, Path]] = []
    for time in times:
        images = list_folder(time)[0]
        if not images:
            raise SceneError(
                f"folder {str(time)!r} has no images, it has {shown_names(list(time.iterdir()))}; add its views or "
                "remove it"
            )
        # Where there are view* images, others (a mask, a preview) are not views.
        views = [image for image in images if image.stem.lower().startswith("view")] or images
        per_time.append(_by_stem(views, time))
    view_names = sorted({stem for views in per_time for stem in views}, key=natural_key)
    _refuse_missing(times, per_time, view_names, folder)
    return [[views[name] for name in view_names] for views in per_time], view_names


def camera_images(folders: Sequence[Path]) -> tuple[list[list[Path]], list[str]]:
    """``images[t][n]`` of several folders, one per camera, and notes.

    Images belong to one time if they have one name in all folders; where the folders share no names, but hold equally
    many images, their order counts.

    Raises:
        SceneError: an empty folder, different numbers of images, images missing in some folders.
    """
    per_camera, notes = [], []
    for folder in folders:
        images, ignored = folder_images(folder)
        per_camera.append(images)
        notes += ignored
    stems = [{image.stem for image in images} for images in per_camera]
    shared = set.intersection(*stems)
    if all(names == stems[0] for names in stems):
        by_name = [_by_stem(images, folder) for images, folder in zip(per_camera, folders, strict=True)]
        order = sorted(stems[0], key=natural_key)
        return [[camera[name] for camera in by_name] for name in order], [*notes, "folders synchronised by file names"]
    counts = [len(images) for images in per_camera]
    if not shared and len(set(counts)) == 1:
        notes.append("folders synchronised by order: their file names differ")
        return [list(images) for images in zip(*per_camera, strict=True)], notes
    every = sorted(set.union(*stems), key=natural_key)
    for folder, names in zip(folders, stems, strict=True):
        missing = [name for name in every if name not in names]
        if missing and shared:
            raise SceneError(
                f"camera folder {str(folder)!r} lacks image {missing[0]!r}, which other cameras have "
                f"({len(missing)} missing in it); add it, or remove it from the others"
            )
    low, high = counts.index(min(counts)), counts.index(max(counts))
    raise SceneError(
        f"camera folders must hold equally many images: {str(folders[low])!r} has {counts[low]}, "
        f"{str(folders[high])!r} has {counts[high]}; add or remove images, or give images of one time the same name"
    )


def guess_layout(images: Sequence[Path]) -> tuple[str, str]:
    """("views" or "times", why) for a folder of images whose layout nobody stated."""
    if all(_TIME_NAME.fullmatch(image.stem) for image in images):
        return "times", f"file names such as {images[0].name!r} count frames of one camera"
    return "views", "images of one folder are taken as views of one moment"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: cam0/rgb and cam1/rgb rather than rgb and rgb."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def shown_names(paths: Sequence[Path]) -> str:
    """The first few names, folders with a slash, and how many more there are."""
    names = [path.name + "/" * path.is_dir() for path in sorted(paths, key=lambda path: natural_key(path.name))]
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return (", ".join(names[:_SHOWN_NAMES]) + more) if names else "nothing"


def counted(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _by_stem(images: Sequence[Path], folder: Path) -> dict[str, Path]:
    counts = Counter(image.stem for image in images)
    stem, count = counts.most_common(1)[0]
    if count > 1:
        twins = [image.name for image in images if image.stem == stem]
        raise SceneError(f"folder {str(folder)!r} has two images of one view: {twins[0]} and {twins[1]}; remove one")
    return {image.stem: image for image in images}


def _refuse_missing(
    times: Sequence[Path], per_time: Sequence[dict[str, Path]], view_names: Sequence[str], folder: Path
) -> None:
    missing = [
        (time, name) for time, views in zip(times, per_time, strict=True) for name in view_names if name not in views
    ]
    if not missing:
        return
    time, name = missing[0]
    present = per_time[list(times).index(time)]
    if not any(set(view_names) == set(views) for views in per_time):
        first_with = next(other for other, views in zip(times, per_time, strict=True) if name in views)
        raise SceneError(
            f"the time_* folders of {str(folder)!r} must hold the same views: {time.name} has {', '.join(present)}, "
            f"but {first_with.name} has {name!r}; give each camera one name at all times"
        )
    raise SceneError(
        f"view {name!r} is missing at time {time.name!r} of {str(folder)!r} ({len(missing)} of "
        f"{len(times) * len(view_names)} images missing); add it, or remove that view or that time everywhere"
    )
