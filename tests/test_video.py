"""Videos and streams: every frame at its time, detections as those of images, and whatever breaks off is said."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import small_runs as runs
from PIL import Image

from direct_pt.checkpoint import from_pretrained
from direct_pt.errors import InputError
from direct_pt.prediction.video import VideoFile, VideoWriter, open_video, shown

TIMES = np.cumsum([0.0, *[0.04, 0.1, 0.02, 0.2] * 5])  # of frames that do not come evenly
SIZE = (97, 129)  # odd sides
NO_CAST = ("--mixed-precision", "no")


@pytest.fixture(scope="module")
def eager(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that finds a lot."""
    return runs.make_eager(pretrained, tmp_path_factory.mktemp("eager") / "model")


@pytest.fixture(scope="module")
def pictures(demo: Path) -> list[np.ndarray]:
    """One for each frame."""
    paths = sorted((demo / "images").iterdir())[: len(TIMES)]
    return [np.asarray(Image.open(path).convert("RGB").resize(SIZE[::-1])) for path in paths]


@pytest.fixture(scope="module")
def video(pictures: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with these frames, and a sound track."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        sound: Any = container.add_stream("aac", rate=44100)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, at in zip(pictures, TIMES, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(at * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return path


def frames_of(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times and pixels of a video file."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [float(frame.time) for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def predict(eager: Path, source: object, folder: Path, *flags: object) -> list[dict[str, Any]]:
    """Run the script in this process; the lines that it wrote."""
    own = ("--checkpoint", eager, source, *NO_CAST, "--score-threshold", 0.1, "--output-dir", folder)
    runs.call_script("predict_video", *own, *flags)
    return lines_of(folder)


def test_every_frame_at_its_time(video: Path, eager: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times, sizes and detections are those of the frames; what is drawn lies on them."""
    lines = predict(eager, video, tmp_path / "out")
    times, pixels = frames_of(video)
    assert len(times) == len(TIMES)
    np.testing.assert_allclose([line["time"] for line in lines], TIMES, atol=1e-3)
    assert [line["frame"] for line in lines] == list(range(len(TIMES)))
    detector = from_pretrained(eager)
    for line, image in list(zip(lines, pixels, strict=True))[::5]:
        expected = detector.predict(image, 0.1)[0]
        found = np.array([row["bbox"] for row in line["detections"]]).reshape(-1, 4)
        found[:, 2:] += found[:, :2]
        np.testing.assert_allclose(found, expected["boxes"], atol=1e-3)
        assert [row["category_name"] for row in line["detections"]] == expected["labels"]
    assert sum(len(line["detections"]) for line in lines) > 100
    drawn_times, drawn = frames_of(tmp_path / "out/video.mp4")
    np.testing.assert_allclose(drawn_times, TIMES, atol=1e-3)
    assert drawn[0].shape == (98, 130, 3)  # H.264 wants even sides
    with_any = 0
    for line, ours, image in zip(lines, drawn, pixels, strict=True):
        difference = np.abs(ours[: SIZE[0], : SIZE[1]].astype(int) - image).mean(axis=2)
        with_any += bool(line["detections"])
        assert (difference > 60).any() == bool(line["detections"])
        assert line["detections"] or np.median(difference) < 10
    assert with_any > 3
    said = capsys.readouterr()
    assert "its sound is not copied" in said.out and f"{len(TIMES)} frames" in said.out
    assert f"/{len(TIMES)}" in said.err  # the bar knows how many there are


def test_fewer_frames_and_tiles(video: Path, eager: Path, tmp_path: Path) -> None:
    """--every, --max-frames, --no-video, --tiles."""
    lines = predict(eager, video, tmp_path / "every", "--every", 3, "--max-frames", 4, "--batch-size", 3)
    assert [line["frame"] for line in lines] == [0, 3, 6, 9]
    np.testing.assert_allclose(frames_of(tmp_path / "every/video.mp4")[0], TIMES[[0, 3, 6, 9]], atol=1e-3)
    tiled = predict(eager, video, tmp_path / "tiles", "--max-frames", 2, "--tiles", 64, "--no-video")
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir()) == ["detections.jsonl"]
    detector = from_pretrained(eager)
    _, pixels = frames_of(video)
    found = np.array([row["bbox"] for row in tiled[0]["detections"]]).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    np.testing.assert_allclose(found, detector.predict(pixels[0], 0.1, 4, tiles=64)[0]["boxes"], atol=1e-3)
    with pytest.raises(InputError, match="which is not written over"):
        predict(eager, video, tmp_path / "tiles")


def test_a_file_that_breaks_off(video: Path, eager: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What there is of it is used, and it is said."""
    whole = tmp_path / "clip.ts"  # its index is not at one end
    with av.open(str(video)) as source, av.open(str(whole), "w", format="mpegts") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)
    content = bytearray(whole.read_bytes())
    half = tmp_path / "half.ts"
    half.write_bytes(bytes(content[: len(content) // 2]))
    assert 0 < len(predict(eager, half, tmp_path / "half", "--no-video")) < len(TIMES)
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    damaged = tmp_path / "damaged.ts"
    damaged.write_bytes(bytes(content))
    capsys.readouterr()
    lines = predict(eager, damaged, tmp_path / "damaged", "--no-video")
    assert 0 < len(lines) <= len(TIMES)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.mp4", "no such file"), ("text.mp4", "is no video that can be read"), ("camera:99", "no such camera"),
        ("/dev/video99", "no such camera"), ("tcp://127.0.0.1:1", "cannot be reached"), ("sound.wav", "no pictures"),
        ("rtsp://user:secret@127.0.0.1:1/a", r"rtsp://user:\*\*\*@127"), ("empty.mp4", "is no video"),
    ],
)  # fmt: skip
def test_sources_that_are_none(source: str, words: str, tmp_path: Path) -> None:
    """One line that names it, and no password."""
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        sound: Any = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
    name = source if ":" in source or source.startswith("/") else str(tmp_path / source)
    with pytest.raises(InputError, match=words) as error:
        open_video(name, 1)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_passwords_are_not_shown() -> None:
    assert shown("rtsp://me:pass@host:554/x") == "rtsp://me:***@host:554/x"
    assert shown("rtsp://host:554/x") == "rtsp://host:554/x"


def test_frames_of_other_sizes_and_times(tmp_path: Path) -> None:
    """A video has one size: others are drawn in it; times that do not rise are moved a little."""
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(25))
    for number, (side, at) in enumerate(((64, 0.0), (96, 0.5), (64, 0.5), (64, 0.4))):
        writer.write(np.full((side, side, 3), 60 * number, np.uint8), at)
    writer.close()
    times, pixels = frames_of(tmp_path / "a.mp4")
    assert [image.shape for image in pixels] == [(64, 64, 3)] * 4 and times == sorted(set(times))
    assert writer.notes == ["1 frames of another size were drawn in that of the first"]
    for number, image in enumerate(pixels):
        assert abs(int(np.median(image)) - 60 * number) < 8


def test_times_that_begin_anew(pictures: list[np.ndarray], tmp_path: Path) -> None:
    """Of recordings one behind the other the second one's times are counted on, and it is said."""
    part = tmp_path / "part.ts"
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for pixels in pictures[:8]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:96, :128].copy(), format="rgb24")))
        container.mux(stream.encode())
    both = tmp_path / "both.ts"
    both.write_bytes(2 * part.read_bytes())
    video = VideoFile(str(both))
    times = [frame.time for frame in video.frames()]
    np.testing.assert_allclose(times, np.arange(16) / 25, atol=1e-3)
    assert any("its times begin anew 1 times, and are counted on" in note for note in video.notes)


def test_turned_videos(tmp_path: Path, video: Path) -> None:
    """Upright: phones note in the track's header how the frames are to be turned."""
    unit, zero = (1 << 16).to_bytes(4), bytes(4)
    upright = unit + zero * 3 + unit + zero * 3 + (1 << 30).to_bytes(4)
    clockwise = zero + unit + zero + (-(1 << 16)).to_bytes(4, signed=True) + zero * 4 + (1 << 30).to_bytes(4)
    content, turned = video.read_bytes(), tmp_path / "turned.mp4"
    start = content.index(b"tkhd")
    at = content.index(upright, start)
    assert at < start + 100
    turned.write_bytes(content[:at] + clockwise + content[at + len(clockwise) :])
    frames = [list(VideoFile(str(path)).frames()) for path in (video, turned)]
    assert len(frames[0]) == len(frames[1]) == len(TIMES)
    for straight, other in zip(*frames, strict=True):
        np.testing.assert_array_equal(np.rot90(straight.pixels, -1), other.pixels)


# Streams

SERVER = """
import sys, time
import av, numpy as np
port, seconds = sys.argv[1], float(sys.argv[2])
container = av.open(f"tcp://127.0.0.1:{port}?listen=1", "w", format="mpegts", options={"flush_packets": "1"})
stream = container.add_stream("libx264", rate=25)
stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
stream.options = {"preset": "ultrafast", "tune": "zerolatency", "g": "5"}
start, number = time.monotonic(), 0
while time.monotonic() - start < seconds:
    frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), number % 250, np.uint8), format="rgb24")
    frame.pts = number
    container.mux(stream.encode(frame))
    number += 1
    time.sleep(max(0, start + number / 25 - time.monotonic()))
container.close()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts servers of a stream, and ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int, seconds: float) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", SERVER, str(port), str(seconds)]))
        time.sleep(2)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def watch(eager: Path, port: int, folder: Path, *flags: object) -> subprocess.Popen[str]:
    own = ("--checkpoint", eager, f"tcp://127.0.0.1:{port}", *NO_CAST, "--output-dir", folder)
    return runs.start_script("predict_video", *own, *flags)


def wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Until so many frames were written."""
    deadline = time.monotonic() + 120
    while not (folder / "detections.jsonl").exists() or len(lines_of_begun(folder)) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def lines_of_begun(folder: Path) -> list[str]:
    return (folder / "detections.jsonl").read_text().splitlines()


def test_a_stream_that_is_cut_and_comes_back(serve: Any, eager: Path, tmp_path: Path) -> None:
    """It is said and survived; Ctrl-C ends it at once, also while the stream is away, and both files are whole."""
    port, out = free_port(), tmp_path / "out"
    first = serve(port, 300)
    process = watch(eager, port, out, "--reconnect", 600, "--every", 2)
    wait_for_lines(process, out, 5)
    first.kill()
    before = len(lines_of_begun(out))
    time.sleep(1)
    second = serve(port, 300)
    wait_for_lines(process, out, before + 8)
    second.kill()
    time.sleep(3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 40
    assert process.returncode == 130, errors
    assert "broke off behind frame" in said and "is back" in said and "broke off and came back 1 times" in said
    assert "stopped: SIGINT: what was found until now is whole" in errors
    lines = lines_of(out)
    numbers, times = [line["frame"] for line in lines], [line["time"] for line in lines]
    assert all(later - number >= 2 for number, later in pairwise(numbers)) and times == sorted(set(times))
    written, _ = frames_of(out / "video.mp4")
    assert len(written) == len(lines)
    np.testing.assert_allclose(np.array(written) - written[0], np.array(times) - times[0], atol=1e-3)


def test_a_stream_that_ends(serve: Any, eager: Path, tmp_path: Path) -> None:
    """After the patience it is said, and what was found is there."""
    port, out = free_port(), tmp_path / "out"
    server = serve(port, 300)
    process = watch(eager, port, out, "--reconnect", 2)
    wait_for_lines(process, out, 2)
    server.kill()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "did not come back in 2 s" in said
    assert len(lines_of(out)) >= 2 and len(frames_of(out / "video.mp4")[0]) == len(lines_of(out))


def test_a_killed_program_leaves_a_video(eager: Path, pictures: list[np.ndarray], tmp_path: Path) -> None:
    """Its video can be played as far as it came."""
    path, out = tmp_path / "long.mp4", tmp_path / "out"
    writer = VideoWriter(path, Fraction(25))
    for number in range(1500):
        writer.write(pictures[number % len(pictures)], number / 25)
    writer.close()
    assert VideoFile(str(path)).total in (None, 1500)
    flags = ("--checkpoint", eager, path, *NO_CAST, "--output-dir", out)
    process = runs.start_script("predict_video", *flags)
    wait_for_lines(process, out, 200)
    process.kill()
    process.communicate()
    assert len(list(VideoFile(str(out / "video.mp4")).frames())) > 50
