"""Frames of video files, streams and cameras, and videos of them with detections drawn.

Files are read frame by frame. Streams and cameras go on whether or not anybody reads: a thread keeps their newest
frame, counts those that nobody took, and connects again where they break off.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from direct_pt.errors import InputError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
CAMERA = re.compile(r"camera:(\d{1,3})|(/dev/video\d+)")
OPEN_SECONDS, READ_SECONDS = 10.0, 10.0  # that a stream may keep us waiting
RETRY_SECONDS = 1.0  # between two tries to connect again
WAIT_SECONDS = 0.5  # between two looks whether to stop, while no frame comes
TICKS = 90_000  # of the written video's clock in a second: MPEG's usual one
USUAL_RATE = Fraction(25)
MISSING = "needs the package av: pip install av"


def never() -> bool:
    """That nobody stops it."""
    return False


class Frame(NamedTuple):
    """One image of a video.

    Attributes:
        number: from 0, also of those that nobody looks at.
        time: seconds since the first one.
        pixels: [h, w, 3] uint8 RGB, upright.
    """

    number: int
    time: float
    pixels: np.ndarray


class Video(Protocol):
    """Where frames come from.

    Attributes:
        name: for messages.
        total: how many there are, as the file says; None if it does not.
        rate: frames in a second.
        notes: what the user should know, so far.
    """

    name: str
    total: int | None
    rate: Fraction
    notes: list[str]

    def frames(self, stopped: Callable[[], bool] = never) -> Generator[Frame, None, None]:
        """Each frame, in order; one that waits for the next ends when it is `stopped`."""


def open_video(source: str, patience: float) -> Video:
    """A video by its path, address (rtsp://, http://, ...) or camera (camera:0, /dev/video0).

    `patience` is for how many seconds a stream that breaks off is called again.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if camera := CAMERA.fullmatch(source):
        return LiveVideo(source, Camera(source, int(camera[1]) if camera[1] else camera[2]), patience)
    if not ADDRESS.match(source):
        if not Path(source).is_file():
            raise InputError(f"{source}: no such file; give a video, an address such as rtsp://..., or camera:0")
        return VideoFile(source)
    opened = Container(source)
    if opened.duration:  # a file that is elsewhere
        opened.close()
        return VideoFile(source)
    return LiveVideo(shown(source), opened, patience)


def shown(source: str) -> str:
    """An address without the password in it."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", source)


class Container:
    """A file or stream of PyAV's. Raises InputError where it is no video."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.name = shown(source)
        self.opened = self._open()
        self.stream = self.opened.streams.video[0]
        duration = self.opened.duration
        self.duration = None if duration is None or duration <= 0 else duration / 1_000_000
        self.rate = Fraction(self.stream.average_rate or self.stream.guessed_rate or USUAL_RATE)
        self.damaged = 0

    def _open(self) -> Any:
        try:
            import av
        except ModuleNotFoundError as error:
            raise InputError(f"{self.name}: {MISSING}") from error
        is_stream = bool(ADDRESS.match(self.source))
        options = {"rtsp_transport": "tcp"} if self.source.lower().startswith("rtsp") else {}
        try:
            opened = av.open(self.source, options=options, timeout=(OPEN_SECONDS, READ_SECONDS) if is_stream else None)
        except (av.FFmpegError, OSError, ValueError) as error:
            what = "cannot be reached, or is no video" if is_stream else "is no video that can be read"
            raise InputError(f"{self.name}: {what} ({shown(' '.join(str(error).split())):.200})") from error
        if not opened.streams.video:
            raise InputError(f"{self.name}: has no pictures")
        opened.streams.video[0].thread_type = "AUTO"
        return opened

    @property
    def has_sound(self) -> bool:
        """Whether there is a sound track."""
        return bool(self.opened.streams.audio)

    def read(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Time and pixels of each frame; what is damaged is counted. Raises av.FFmpegError where it breaks off."""
        import av

        for packet in self.opened.demux(self.stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                self.damaged += 1
                continue
            for frame in decoded:
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                pixels = frame.to_ndarray(format="rgb24")
                yield frame.time, np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

    def again(self) -> "Container":
        """The same, called once more. Raises InputError."""
        self.close()
        return Container(self.source)

    def close(self) -> None:
        self.opened.close()


class Camera:
    """A camera of this machine, by OpenCV: the usual builds of PyAV have no devices. Raises InputError."""

    damaged = 0

    def __init__(self, name: str, device: int | str) -> None:
        self.name = name
        self.device = device
        before = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(0)  # it has lines of its own on a camera that is not there
        try:
            self.opened = cv2.VideoCapture(device)
        finally:
            cv2.utils.logging.setLogLevel(before)
        if not self.opened.isOpened():
            raise InputError(f"{name}: there is no such camera, or it is in use; give another one, such as camera:0")
        rate = self.opened.get(cv2.CAP_PROP_FPS)
        self.rate = Fraction(rate).limit_denominator(1001) if rate > 0 else USUAL_RATE

    def read(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Pixels of each frame; a camera tells no times."""
        while True:
            is_there, pixels = self.opened.read()
            if not is_there:
                return
            yield None, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def again(self) -> "Camera":
        """The same, opened once more. Raises InputError."""
        self.close()
        return Camera(self.name, self.device)

    def close(self) -> None:
        self.opened.release()


class VideoFile:
    """A video with an end; see `Video`."""

    def __init__(self, source: str) -> None:
        self.container, self.name = Container(source), shown(source)
        self.rate, self.notes = self.container.rate, []
        known = self.container.stream.frames
        by_time = round((self.container.duration or 0) * self.rate)
        self.total: int | None = known or by_time or None
        if self.container.has_sound:
            self.notes.append("its sound is not copied")

    def frames(self, stopped: Callable[[], bool] = never) -> Generator[Frame, None, None]:
        """Each frame, in order. One that cannot be decoded is counted, and ends nothing."""
        import av

        first, number, last, shift, restarts = None, 0, 0.0, 0.0, 0
        try:
            for at, pixels in self.container.read():
                following = last + float(1 / self.rate)
                at = following if at is None else at + shift
                if first is not None and at < last:  # as in a recording of several parts
                    shift, at, restarts = shift + following - at, following, restarts + 1
                first = at if first is None else first
                last = at
                yield Frame(number, at - first, pixels)
                number += 1
        except av.FFmpegError as error:
            self.notes.append(f"it breaks off behind frame {number} ({error})")
        finally:
            self.container.close()
        if restarts:
            self.notes.append(f"its times begin anew {restarts} times, and are counted on")
        if self.container.damaged:
            self.notes.append(f"{self.container.damaged} damaged parts of it could not be decoded")


@dataclass
class LiveVideo:
    """A stream or a camera; see `Video`.

    Attributes:
        name: for messages.
        source: that frames are read from.
        patience: seconds to go on trying to connect again.
        dropped: frames that nobody took.
        interruptions: how often it broke off and came back.
    """

    name: str
    source: Container | Camera
    patience: float
    total: int | None = None
    notes: list[str] = field(default_factory=list)
    dropped: int = 0
    interruptions: int = 0

    def __post_init__(self) -> None:
        self.rate = self.source.rate
        self.newest: queue.Queue[Frame | None] = queue.Queue(1)
        self.ended = threading.Event()

    def frames(self, stopped: Callable[[], bool] = never) -> Generator[Frame, None, None]:
        """The newest frame each time, until the source breaks off for good, or it is `stopped` while none comes."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        try:
            while not stopped():
                try:
                    frame = self.newest.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    continue
                if frame is None:
                    return
                yield frame
        finally:
            self.ended.set()
            reader.join(OPEN_SECONDS + READ_SECONDS)
            self.source.close()
            if self.dropped:
                self.notes.append(f"{self.dropped} frames came faster than they could be looked at, and were left out")
            if self.interruptions:
                self.notes.append(f"it broke off and came back {self.interruptions} times")

    def _read(self) -> None:
        """Of the thread: put each frame in the place of the one before."""
        number, start = 0, time.monotonic()
        try:
            while not self.ended.is_set():
                try:
                    for _, pixels in self.source.read():
                        self._put(Frame(number, time.monotonic() - start, pixels))
                        number += 1
                        if self.ended.is_set():
                            return
                except Exception as error:  # of the network, in a thread of its own
                    reason = f" ({shown(' '.join(str(error).split())):.100})"
                else:
                    reason = ""
                if not self._connect(f"{self.name}: broke off behind frame {number}{reason}"):
                    return
        finally:
            self._put(None)

    def _put(self, frame: Frame | None) -> None:
        while True:
            try:
                self.newest.put_nowait(frame)
                return
            except queue.Full:
                try:
                    waiting = self.newest.get_nowait()
                    self.dropped += waiting is not None
                except queue.Empty:
                    pass

    def _connect(self, what: str) -> bool:
        """Call again until it answers, or patience ends."""
        deadline = time.monotonic() + self.patience
        self.say(f"{what}; connecting again, for {self.patience:g} s")
        while time.monotonic() < deadline and not self.ended.wait(RETRY_SECONDS):
            try:
                self.source = self.source.again()
            except InputError:
                continue
            self.interruptions += 1
            self.say(f"{self.name}: is back")
            return True
        if not self.ended.is_set():
            self.notes.append(f"{what.removeprefix(self.name + ': ')}, and did not come back in {self.patience:g} s")
        return False

    def say(self, text: str) -> None:
        """Tell the user, while it goes on."""
        from tqdm import tqdm

        tqdm.write(text)


class VideoWriter:
    """An MP4 file of frames at their times, H.264; it can be played however the program ends.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self.path = path
        # In fragments: the index of a whole MP4 file is written at its end, which a killed program does not reach.
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self.container = av.open(str(path), "w", options=options)
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = self.container.add_stream(codec, rate=rate.limit_denominator(60_000))
        self.stream = stream
        self.stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            # Without frames that refer to later ones, else times would not begin at 0; a kill loses at most 50 frames.
            self.stream.options = {"preset": "veryfast", "crf": "23", "bf": "0", "g": "50"}
        self.stream.codec_context.time_base = Fraction(1, TICKS)
        self.size: tuple[int, int] | None = None
        self.last = -1
        self.resized = 0

    def write(self, pixels: np.ndarray, at: float) -> None:
        """Add a frame [h, w, 3] at a time in seconds, later than that of the one before."""
        import av

        if self.size is None:
            self.size = pixels.shape[0], pixels.shape[1]
            self.stream.height, self.stream.width = (side + side % 2 for side in self.size)  # H.264 halves the colours
        if pixels.shape[:2] != self.size:
            pixels = cv2.resize(pixels, self.size[::-1])
            self.resized += 1
        height, width = self.size
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        self.last = max(self.last + 1, round(at * TICKS))
        frame.pts, frame.time_base = self.last, Fraction(1, TICKS)
        self.container.mux(self.stream.encode(frame))

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return [f"{self.resized} frames of another size were drawn in that of the first"] if self.resized else []

    def close(self) -> None:
        """Write what is left."""
        if self.size is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
