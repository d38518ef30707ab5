"""What the processes of a run tell each other beside their collectives: that one ends and why, and where one is stuck.

A thread of each process looks into the store through which they met. So a process that waits for others, for up to an
hour, or reads data for minutes, learns within a second that another one has failed, in its own words.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from direct_pt.errors import InputError, printable

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.5
BEAT_SECONDS = 5.0  # between two reports of where a process is
DEFAULT_STUCK_SECONDS = 120
HEARD_SECONDS = 5.0  # that a process which fails waits for the others to read why
GRACE_SECONDS = 20.0  # that a process has to end by itself, once another one has failed
OWN_FOLDERS = (str(Path(__file__).parents[1]), str(Path(sys.argv[0]).resolve().parent))


@dataclass(frozen=True)
class Failure:
    """Why a process has ended.

    Attributes:
        rank: of the process.
        host: its machine.
        kind: "error", "stopped" or "failed".
        message: its words.
        status: its exit status.
    """

    rank: int
    host: str
    kind: str
    message: str
    status: int

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}: {self.message}"


class Peers:
    """This process's part: the thread, and what it has learnt.

    Attributes:
        failure: of another process, or None.
    """

    def __init__(self, store: "torch.distributed.Store", rank: int, world_size: int) -> None:
        """Begin to watch. `store` must be a client of its own: a thread that waits in one keeps the others out."""
        self.failure: Failure | None = None
        self.rank, self.world_size = rank, world_size
        self.host = socket.gethostname()
        self._store = store
        self._stuck_seconds = stuck_seconds()
        self._closed = threading.Event()
        self._place, self._since, self._last_beat, self._next_report = "", time.monotonic(), 0.0, self._stuck_seconds
        self._seen: dict[int, tuple[str, float]] = {}  # by rank: its last report, and when it came
        self._main_thread = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside the store while Python ends would abort the process

    def tell(self, kind: str, message: str, status: int) -> None:
        """Tell the others that this process ends, unless another one was first; wait until they know, for a while."""
        self._closed.set()
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, and with it the others
            text = json.dumps(asdict(Failure(self.rank, self.host, kind, message, status)))
            self._store.set(f"heard/{self.rank}", "")
            if self._store.compare_set("failed", "", text).decode() != text:
                return
            end = time.monotonic() + HEARD_SECONDS
            others = [f"heard/{rank}" for rank in range(self.world_size)]
            while time.monotonic() < end and not self._store.check(others):
                time.sleep(0.1)

    def heard(self) -> Failure | None:
        """Why another process has ended, if one has; looked up anew."""
        self.close()
        if self.failure is None:
            with contextlib.suppress(RuntimeError, ValueError):
                self._hear()
        return self.failure

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=2)

    def _hear(self) -> bool:
        """Whether another process has failed."""
        if not self._store.check(["failed"]):
            return False
        failure = Failure(**json.loads(self._store.get("failed")))
        self._store.set(f"heard/{self.rank}", "")
        self.failure = None if failure.rank == self.rank else failure
        return True

    def _watch(self) -> None:
        try:
            while not self._closed.wait(POLL_SECONDS):
                if self._hear():
                    if self.failure is not None and not self._closed.wait(GRACE_SECONDS):
                        tqdm.write(f"{self.failure.kind}: {printable(str(self.failure))}", file=sys.stderr)
                        sys.stderr.flush()
                        os._exit(self.failure.status)  # the main thread waits for a process that is gone
                    return
                self._look_for_stuck()
        except (RuntimeError, ValueError):
            return  # the store is gone: the launcher or the first process has ended

    def _look_for_stuck(self) -> None:
        """Report where this process is; where it has been in one place for long, print where the others are."""
        now, place = time.monotonic(), self._main_place()
        if place != self._place:
            self._place, self._since, self._next_report = place, now, self._stuck_seconds
        if now - self._last_beat < min(BEAT_SECONDS, self._stuck_seconds / 4):
            return
        self._last_beat = now
        self._store.set(f"at/{self.rank}", f"{now} {place}")
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        for rank in others:
            report = self._store.get(f"at/{rank}").decode() if self._store.check([f"at/{rank}"]) else ""
            if rank not in self._seen or self._seen[rank][0] != report:
                self._seen[rank] = report, now
        waited = now - self._since
        if waited < self._next_report:
            return
        self._next_report *= 2
        silent = [rank for rank in others if now - self._seen[rank][1] > self._stuck_seconds / 2]
        places = {rank: self._seen[rank][0].partition(" ")[2] or "not yet seen" for rank in others}
        elsewhere = [rank for rank in others if places[rank] != place]
        suspects = silent or elsewhere or others
        # One of those that wait says so: the first of them.
        if any(rank < self.rank and rank not in suspects for rank in others):
            return
        texts = [f"process {rank} " + (f"gives no sign of life, was in {places[rank]}" if rank in silent else
                                       f"is in {places[rank]}") for rank in suspects[:4]]  # fmt: skip
        line = f"process {self.rank} waits in {place} for {waited:.0f} s: {'; '.join(texts)}"
        tqdm.write(printable(line), file=sys.stderr)  # beside the bar

    def _main_place(self) -> str:
        """The innermost line of this project's code that the main thread is in."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(OWN_FOLDERS):
                return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
            frame = frame.f_back
        return "Python"


_peers: Peers | None = None


def watch_peers(store: "torch.distributed.Store", rank: int, world_size: int) -> None:
    """Begin to watch the other processes, once."""
    global _peers
    _peers = _peers or Peers(store, rank, world_size)


def tell_peers(kind: str, message: str, status: int) -> None:
    """Tell the other processes, if there are any, why this one ends."""
    if _peers is not None:
        _peers.tell(kind, message, status)


def failed_peer() -> Failure | None:
    """Why another process has ended, if one has."""
    return None if _peers is None else _peers.heard()


def stuck_seconds() -> float:
    """After how long in one place a process prints where the others are. Raises InputError."""
    given = os.environ.get("DIRECT_PT_STUCK_SECONDS", str(DEFAULT_STUCK_SECONDS))
    if not given.isdecimal() or not 1 <= int(given) <= 86_400:
        raise InputError(f"DIRECT_PT_STUCK_SECONDS={given:.30}: give whole seconds from 1 to 86400, such as 120")
    return float(given)
