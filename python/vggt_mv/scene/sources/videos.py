"""Videos, through PyAV (``pip install av``): indexed and checked without decoding, decoded in order.

``probe_video`` reads every packet of the file, which is as fast as the disk, and decodes the first frame only. That
finds files that are cut off: packets that the header promises are missing, a packet is damaged, a Matroska segment is
longer than its file, or all streams end before the container says. Formats that promise nothing (MPEG transport
streams, fragmented MP4) may be cut between two packets without notice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from vggt_mv.errors import SceneError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")

# A container's duration is rounded, and the last frame's own duration may be missing: only more than this is a cut.
_CUT_SECONDS = 1.0

_EBML_HEADER, _MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


@dataclass(frozen=True)
class Video:
    """A video that was looked at from end to end.

    Attributes:
        size: (height, width) of the upright frames.
        ticks: presentation time stamps of all frames, ascending, in units of the stream.
        times: the same in seconds from the first frame.
    """

    path: Path
    size: tuple[int, int]
    ticks: list[int]
    times: list[float]

    @property
    def num_frames(self) -> int:
        return len(self.ticks)

    @property
    def interval(self) -> float:
        """Mean seconds from frame to frame; 0 for a single frame."""
        return self.times[-1] / (self.num_frames - 1) if self.num_frames > 1 else 0.0


def probe_video(path: Path) -> Video:
    """Index a video file and find out whether it is whole.

    Raises:
        SceneError: PyAV is missing; the file is empty, no video, without frames, truncated or damaged.
    """
    av = _import_av()
    if path.stat().st_size == 0:
        raise SceneError(f"video {str(path)!r} is empty (0 bytes); copy it again or remove it")
    _check_segment(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SceneError(f"video {str(path)!r} has no video stream; name a file with pictures in it")
            stream = container.streams.video[0]
            ticks, time_base = _packet_ticks(path, container, stream), float(stream.time_base or 0)
        first = next(_decode(av, path), None)
    except av.error.FFmpegError as error:
        raise _damaged(path, error) from error
    if first is None:
        raise SceneError(
            f"video {str(path)!r} is damaged: its first frame does not decode; copy it again or re-encode it"
        )
    return Video(path, (first.height, first.width), ticks, [(tick - ticks[0]) * time_base for tick in ticks])


def read_frames(video: Video, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Decode frames ``indices`` (ascending, repetition allowed) to upright RGB, one in memory at a time.

    Raises:
        SceneError: a frame does not decode.
    """
    av = _import_av()
    pending = iter(indices)
    target = next(pending, None)
    if target is None:
        return
    try:
        for position, frame in enumerate(_raw_frames(av, video.path)):
            image: Image.Image | None = None
            # Time stamps, not positions: decoders leave out frames that refer to something before the beginning.
            while target is not None and (
                video.ticks[target] <= frame.pts if frame.pts is not None else target <= position
            ):
                image = image or _upright(frame)
                yield image
                target = next(pending, None)
            if target is None:
                return
    except av.error.FFmpegError as error:
        raise _damaged(video.path, error, f" at frame {target}") from error
    raise SceneError(
        f"video {str(video.path)!r} is truncated or damaged: frame {target} of {video.num_frames} does not decode; "
        "copy it again or re-encode it"
    )


def _check_segment(path: Path) -> None:
    """A SceneError where a Matroska or WebM file is shorter than its segment: the demuxer takes that for its end."""
    with path.open("rb") as file:
        if file.read(4) != _EBML_HEADER or (header := _ebml_size(file)) is None:
            return
        file.seek(header, 1)
        if file.read(4) != _MATROSKA_SEGMENT or (segment := _ebml_size(file)) is None:
            return
        promised = file.tell() + segment
    if (there := path.stat().st_size) < promised:
        raise SceneError(
            f"video {str(path)!r} is truncated: its header promises {promised} bytes and {there} are there; copy it "
            "again or re-encode it"
        )


def _ebml_size(file: BinaryIO) -> int | None:
    """The size that stands next in an EBML file; None where it is unknown, as in live recordings, or cut off."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()  # the leading zeros say how many bytes follow
    rest = file.read(length - 1)
    value = int.from_bytes(first + rest, "big") & ((1 << 7 * length) - 1)
    return None if len(rest) < length - 1 or value == (1 << 7 * length) - 1 else value


def _packet_ticks(path: Path, container: Any, stream: Any) -> list[int]:
    """Time stamps of all packets of a stream, sorted, or a SceneError where some are missing."""
    ticks: list[int] = []
    promised, packets, end = stream.frames, 0, 0.0
    start = (container.start_time or 0) / 1e6
    for packet in container.demux():
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.time_base:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base) - start)
        if packet.stream_index != stream.index or (stamp is None and not packet.size):
            continue
        packets += 1
        if packet.is_corrupt:
            raise SceneError(
                f"video {str(path)!r} is truncated or damaged: packet {packets} of its video stream is not whole; copy "
                "it again or re-encode it"
            )
        if not packet.is_discard:
            ticks.append(stamp if stamp is not None else packets - 1)
    if packets < promised:
        raise SceneError(
            f"video {str(path)!r} is truncated: its header promises {promised} frames and {packets} are there; copy it "
            "again or re-encode it"
        )
    if not ticks:
        raise SceneError(
            f"video {str(path)!r} has no frames: it is truncated, or nothing was recorded; copy it again or re-encode "
            "it"
        )
    duration = (container.duration or 0) / 1e6
    if end < duration - _CUT_SECONDS:
        raise SceneError(
            f"video {str(path)!r} is truncated: its header promises {duration:.1f} s and it ends after {end:.1f} s; "
            "copy it again or re-encode it"
        )
    return sorted(ticks)


def _raw_frames(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _decode(av: Any, path: Path) -> Iterator[Image.Image]:
    return (_upright(frame) for frame in itertools.islice(_raw_frames(av, path), 1))


def _upright(frame: Any) -> Image.Image:
    """RGB, turned as the file says (phones record portraits lying on their side)."""
    image: Image.Image = frame.to_image()
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    # FFmpeg and Pillow both count counterclockwise.
    turn = turns.get(round(getattr(frame, "rotation", 0) / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)


def _damaged(path: Path, error: Exception, where: str = "") -> SceneError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return SceneError(
        f"video {str(path)!r} cannot be read{where}, it is truncated, damaged or no video ({reason}); copy it again or "
        "re-encode it"
    )


def _import_av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise SceneError("videos need PyAV, which is not installed: pip install av") from error
    return av
