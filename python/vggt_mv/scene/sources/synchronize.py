"""Several videos as one scene: which frame of each camera belongs to which time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vggt_mv.errors import SceneError
from vggt_mv.scene.sources.videos import Video

# Of the slowest camera's frame interval: 60 against 30 Hz fits, 25 against 30 does not.
_MAX_OFFSET = 0.25
_MAX_LENGTH_DIFFERENCE = 1.0


def synchronize(videos: Sequence[Video]) -> tuple[list[list[int]], list[str]]:
    """Frames of several cameras that show the same moment.

    The rule: the first frames of all videos are the same moment. The camera with the fewest frames per second gives the
    times; every other camera gives the frame nearest to each, which must lie within a quarter of the slow camera's
    frame interval. The scene ends with the shortest video; lengths may differ by one second.

    Returns:
        (indices, notes): ``indices[n][t]``, the frame of video n at time t, and what was decided, in lines for a
        person.

    Raises:
        SceneError: lengths that differ by more than a second, frame rates that do not fit.
    """
    longest = max(videos, key=lambda video: video.times[-1])
    shortest = min(videos, key=lambda video: video.times[-1])
    end = shortest.times[-1]
    if longest.times[-1] - end > _MAX_LENGTH_DIFFERENCE:
        raise SceneError(
            f"videos of one scene must start together and may differ by {_MAX_LENGTH_DIFFERENCE:g} s in length: "
            f"{str(shortest.path)!r} lasts {end:.2f} s, {str(longest.path)!r} {longest.times[-1]:.2f} s; cut them to "
            "the same span (ffmpeg -ss START -t SECONDS -i IN OUT)"
        )
    slowest = max(videos, key=lambda video: video.interval)
    # A little more than the end: a camera whose last frame comes a moment early still has it in the scene.
    clock = [time for time in slowest.times if time <= end + _MAX_OFFSET * slowest.interval]
    indices = []
    for video in videos:
        nearest = _nearest(clock, video.times)
        offsets = np.abs(np.take(video.times, nearest) - clock)
        worst = int(offsets.argmax())
        if offsets[worst] > _MAX_OFFSET * slowest.interval:
            raise SceneError(
                f"videos of one scene must show the same moments: {str(slowest.path)!r} ({_rate(slowest)} frames/s) "
                f"has a frame at {clock[worst]:.3f} s, and the nearest of {str(video.path)!r} "
                f"({_rate(video)} frames/s) is {offsets[worst]:.3f} s away; "
                f"re-encode it at that rate (ffmpeg -i IN -r {_rate(slowest)} OUT)"
            )
        indices.append(nearest)
    notes = ["videos synchronised by time stamps, counted from each video's first frame"]
    left_out = [
        f"{video.path.name} ({video.num_frames - 1 - last[-1]})"
        for video, last in zip(videos, indices, strict=True)
        if last[-1] < video.num_frames - 1
    ]
    if left_out:
        notes.append(f"frames after the end of the shortest video left out: {', '.join(left_out)}")
    return indices, notes


def _nearest(wanted: Sequence[float], times: Sequence[float]) -> list[int]:
    """Index of the element of ascending ``times`` that is nearest to each of ``wanted``."""
    right = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
    right = np.minimum(right, len(times) - 1)
    left = np.maximum(right - 1, 0)
    closer_left = np.abs(np.take(times, left) - wanted) <= np.abs(np.take(times, right) - wanted)
    return [int(index) for index in np.where(closer_left, left, right)]


def _rate(video: Video) -> str:
    return f"{1 / video.interval:.4g}" if video.interval else "1"
