"""Stop signals: remembered when they come, acted upon between steps."""

import os
import signal
import time
from types import FrameType

# Slurm sends USR1 ahead of its limit; HUP comes when the terminal is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_IS_UP = signal.SIGALRM  # comes of itself
END_SIGNALS = (*STOP_SIGNALS, TIME_IS_UP)
ECHO_SECONDS = 5  # a signal that comes again within these is the launcher's, which passes on what all processes got


def ignore_stop_signals() -> None:
    """Ignore them from now on, where they were caught.

    The interpreter takes handlers away as it ends: a signal that means "save and stop" would then kill a program whose
    work is done, and its exit status would say so.
    """
    for number in END_SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignals):
            signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """The first stop signal is remembered; another one, later, ends the program at once.

    Attributes:
        number: of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._time = 0.0

    def catch(self, max_hours: float | None = None) -> None:
        """Install the handlers; nohup's wish to ignore SIGHUP is kept. After `max_hours`, the time is up."""
        if max_hours is not None:
            signal.signal(TIME_IS_UP, self._handle)
            signal.setitimer(signal.ITIMER_REAL, max_hours * 3600)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == TIME_IS_UP:
            return
        if self.number and time.monotonic() - self._time > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self._time = number, time.monotonic()
