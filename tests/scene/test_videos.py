"""Videos as scenes: frames, times, synchronisation, rotation, and files that are not whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggt_mv.scene import SceneError, open_scene, preprocess
from vggt_mv.scene.sources.synchronize import synchronize
from vggt_mv.scene.sources.videos import Video

pytest.importorskip("av", reason="PyAV is not installed (pip install av)")

Film = Callable[..., Path]

# mpeg4 keeps flat grey within a few levels; neighbouring frames of these tests are 12 apart.
_LEVEL_TOLERANCE = 4
# An mp4 with its index before its frames, as made for streaming.
FIRST = {"movflags": "+faststart"}


def ramp(count: int, start: int = 20) -> list[int]:
    return [start + 12 * i for i in range(count)]


def level(image: Any) -> int:
    """The grey of a frame of a test film."""
    return int(np.asarray(image)[-10:, -10:].mean().round())


def levels(scene: Any) -> list[list[int]]:
    return [[level(image) for image in views] for views in scene.frames()]


def near(got: list[list[int]], wanted: list[list[int]]) -> bool:
    return np.shape(got) == np.shape(wanted) and bool(np.abs(np.subtract(got, wanted)).max() <= _LEVEL_TOLERANCE)


def test_one_video_is_times_of_one_camera(film: Film) -> None:
    scene = open_scene(film("clip.mp4", ramp(9), rate=10))
    assert (scene.kind, scene.num_times, scene.num_views, scene.single_sequence) == ("video", 9, 1, True)
    assert scene.layout == "times"
    assert scene.image_size == (48, 64)
    assert scene.view_names == ["clip"]
    assert scene.names[3] == ["clip.mp4#3"]
    assert scene.times == pytest.approx([i / 10 for i in range(9)])
    assert near(levels(scene), [[value] for value in ramp(9)])


@pytest.mark.parametrize("name", ["clip.avi", "clip.mkv", "clip.mov", "clip.mpg", "clip.ts", "CLIP.MP4"])
def test_containers(film: Film, name: str) -> None:
    scene = open_scene(film(name, ramp(6), rate=25))
    assert scene.num_times == 6
    assert scene.times == pytest.approx([i / 25 for i in range(6)], abs=2e-3)
    assert near(levels(scene), [[value] for value in ramp(6)])


def test_max_frames_of_a_video_takes_first_and_last(film: Film) -> None:
    scene = open_scene(film("clip.mp4", ramp(13), rate=30), max_frames=4)
    assert [names[0] for names in scene.names] == [f"clip.mp4#{i}" for i in (0, 4, 8, 12)]
    assert scene.times == pytest.approx([0, 4 / 30, 8 / 30, 12 / 30])
    assert near(levels(scene), [[ramp(13)[i]] for i in (0, 4, 8, 12)])
    assert "4 of 13 frames used, evenly spread (max_frames)" in scene.notes


@pytest.mark.parametrize("cameras", [1, 2])
def test_videos_can_be_read_from_a_later_time(film: Film, cameras: int) -> None:
    paths = [film(f"cam{n}.mp4", ramp(7), rate=10) for n in range(cameras)]
    scene = open_scene(paths if cameras > 1 else paths[0])
    every = [[np.asarray(image) for image in views] for views in scene.frames()]
    np.testing.assert_array_equal([[np.asarray(image) for image in views] for views in scene.frames(4)], every[4:])
    part = scene.part(2, 5)
    assert part.times == pytest.approx([0.2, 0.3, 0.4])
    np.testing.assert_array_equal([[np.asarray(image) for image in views] for views in part.frames(1)], every[3:5])


def test_video_as_views_of_a_static_scene(film: Film) -> None:
    scene = open_scene(film("walk.mp4", ramp(3)), layout="views")
    assert (scene.num_times, scene.num_views, scene.times) == (1, 3, None)
    assert scene.view_names == ["frame 0", "frame 1", "frame 2"]
    assert near(levels(scene), [ramp(3)])


def test_video_can_be_preprocessed(film: Film) -> None:
    result = preprocess(open_scene(film("clip.mp4", ramp(3))), image_size=56)
    assert result.images.shape == (1, 3, 1, 3, 42, 56)
    assert result.images[0, :, 0, :, -5:, -5:].mean((1, 2, 3)).mul(255).tolist() == pytest.approx(ramp(3), abs=4)


def test_several_videos_are_synchronised(film: Film) -> None:
    paths = [film("left.mp4", ramp(6)), film("right.mp4", ramp(6, start=60))]
    scene = open_scene(paths)
    assert (scene.kind, scene.num_times, scene.num_views, scene.single_sequence) == ("videos", 6, 2, False)
    assert scene.view_names == ["left", "right"]
    assert scene.names[2] == ["left.mp4#2", "right.mp4#2"]
    assert near(levels(scene), [list(pair) for pair in zip(ramp(6), ramp(6, start=60), strict=True)])
    assert open_scene(paths, max_frames=2).names[1] == ["left.mp4#5", "right.mp4#5"]


def test_videos_of_one_name_in_several_folders(film: Film) -> None:
    scene = open_scene([film("cam0/video.mp4", ramp(3)), film("cam1/video.mp4", ramp(3))])
    assert scene.view_names == ["cam0/video", "cam1/video"]


def test_twice_the_frame_rate_gives_every_other_frame(film: Film) -> None:
    slow, fast = film("slow.mp4", ramp(4), rate=15), film("fast.mp4", ramp(8), rate=30)
    scene = open_scene([fast, slow])
    assert scene.times == pytest.approx([i / 15 for i in range(4)])
    assert near(levels(scene), [[ramp(8)[2 * i], ramp(4)[i]] for i in range(4)])
    assert "frames after the end of the shortest video left out: fast.mp4 (1)" in scene.notes


def test_the_scene_ends_with_the_shortest_video(film: Film) -> None:
    scene = open_scene([film("a.mp4", ramp(8)), film("b.mp4", ramp(5))])
    assert scene.num_times == 5
    assert "frames after the end of the shortest video left out: a.mp4 (3)" in scene.notes


def test_lengths_over_a_second_apart(film: Film) -> None:
    with pytest.raises(SceneError) as caught:
        open_scene([film("a.mp4", [50] * 45), film("b.mp4", [50] * 10)])
    assert re.search(
        r"may differ by 1 s in length: '.*b\.mp4' lasts 0\.30 s, '.*a\.mp4' 1\.47 s; cut them to the same span \(",
        str(caught.value),
    )


def test_frame_rates_that_do_not_fit(film: Film) -> None:
    with pytest.raises(SceneError) as caught:
        open_scene([film("a.mp4", [50] * 12, rate=30), film("b.mp4", [50] * 10, rate=25)])
    assert re.search(
        r"'.*b\.mp4' \(25 frames/s\) has a frame at 0\.\d+ s, and the nearest of '.*a\.mp4' \(30 frames/s\) is "
        r"0\.01\d s away; re-encode it at that rate \(ffmpeg -i IN -r 25 OUT\)",
        str(caught.value),
    )


def test_uneven_time_stamps_match_by_time_not_by_number() -> None:
    """A phone drops a frame: from there on its frame numbers lag, its time stamps do not."""
    even = Video(Path("even.mp4"), (4, 4), list(range(10)), [i / 10 for i in range(10)])
    dropped = Video(Path("dropped.mp4"), (4, 4), list(range(9)), [0, 0.1, 0.2, 0.4, 0.5, 0.61, 0.7, 0.79, 0.9])
    indices, _ = synchronize([even, dropped])
    assert indices == [[0, 1, 2, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_rotation_of_a_phone_video_is_applied(film: Film) -> None:
    """The track's matrix of an mp4 is rewritten to a quarter turn clockwise, x' = -y, y' = x."""
    path = film("phone.mp4", ramp(3))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16
    one = 0x00010000
    identity = [one, 0, 0, 0, one, 0, 0, 0, 0x40000000]
    turned = [0, one, 0, -one & 0xFFFFFFFF, 0, 0, 0, 0, 0x40000000]
    assert data[matrix : matrix + 36] == b"".join(value.to_bytes(4, "big") for value in identity)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(data)
    scene = open_scene(path)
    assert scene.image_size == (64, 48)
    first = np.asarray(next(scene.images())).astype(int)
    red = first[..., 0] - first[..., 1] > 80
    # The red quarter was at the upper left; after a turn clockwise it is at the upper right.
    assert red[:32, 24:].mean() > 0.9
    assert red[:, :20].mean() < 0.05


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(source: Any, pattern: str) -> None:
    with pytest.raises(SceneError) as caught:
        open_scene(source)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(pattern, text), text


def test_empty_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    refused(tmp_path / "a.mp4", r"video '.*a\.mp4' is empty \(0 bytes\); copy it again or remove it")


def test_text_file_called_mp4(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello, I am text" * 99)
    refused(tmp_path / "a.mp4", r"video '.*a\.mp4' cannot be read, it is truncated, damaged or no video \(Invalid data")


def test_video_without_frames(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    refused(path, r"video '.*a\.mkv' (has no frames: it is truncated, or nothing was recorded|cannot be read)")


def test_sound_only(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(path, r"video '.*a\.mkv' has no video stream; name a file with pictures in it")


@pytest.mark.parametrize(
    ("name", "options", "frames", "share", "message"),
    [
        pytest.param("a.mp4", {}, 1200, 0.95, r"cannot be read, it is truncated, damaged or no", id="mp4-index-last"),
        pytest.param("a.mp4", FIRST, 30, 0.6, r"damaged: packet \d+ of its video stream is not", id="mp4-index-first"),
        pytest.param("a.mp4", FIRST, 1200, 0.98, r"damaged: packet \d+ of its video stream is", id="mp4-a-little-cut"),
        pytest.param("a.avi", {}, 1200, 0.6, r"damaged: packet \d+ of its video stream is not whole", id="avi"),
        pytest.param("a.mkv", {}, 1200, 0.3, r"truncated: its header promises \d+ bytes and \d+ are there", id="mkv"),
        pytest.param("a.mkv", {}, 12, 0.99, r"truncated: its header promises \d+ bytes and \d+ are", id="mkv-short"),
    ],
)
def test_truncated_video_is_found_when_the_scene_is_opened(
    film: Film, name: str, options: dict[str, str], frames: int, share: float, message: str
) -> None:
    path = film(name, [20 + i * 7 % 200 for i in range(frames)], rate=10, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, rf"video '.*a\.\w+' .*{message}")


def test_a_segment_of_unknown_size_is_judged_by_its_duration(film: Film) -> None:
    path = film("a.mkv", [50] * 1200, rate=10)
    data = bytearray(path.read_bytes())
    size = data.index(b"\x18\x53\x80\x67") + 4
    data[size : size + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(data[: len(data) // 3])
    refused(path, r"a\.mkv' is truncated: its header promises 120\.0 s and it ends after \d")


def test_a_missing_last_frame_is_missed(film: Film) -> None:
    """Cut exactly between two packets: only the header's count tells."""
    path = film("a.avi", ramp(12))
    data = path.read_bytes()
    last_frame = data.rindex(b"00dc", 0, data.index(b"idx1"))
    path.write_bytes(data[:last_frame])
    refused(
        path, r"a\.avi' is truncated: its header promises 12 frames and 11 are there; copy it again or re-encode it"
    )


def test_frames_that_vanish_after_opening(film: Film) -> None:
    path = film("a.avi", ramp(12))
    scene = open_scene(path)
    film("a.avi", ramp(5))
    with pytest.raises(SceneError, match=r"a\.avi' is truncated or damaged: frame 5 of 12 does not decode"):
        list(scene.frames())


def test_one_frame_only(film: Film) -> None:
    refused(film("a.mp4", [50]), r"one image only, .*allow_single=True \(--allow-single\)")


def test_layout_of_several_videos(film: Film) -> None:
    with pytest.raises(SceneError, match="a set of 2 videos is not; leave it out"):
        open_scene([film("a.mp4", [50] * 2), film("b.mp4", [50] * 2)], layout="times")


def test_without_pyav_the_remedy_is_named(film: Film, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film("a.mp4", [50] * 2)
    monkeypatch.setitem(sys.modules, "av", None)
    refused(path, r"^videos need PyAV, which is not installed: pip install av$")
