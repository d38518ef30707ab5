"""Standard output and standard error that never end a program: whoever read them may go away, and the work goes on."""

import contextlib
import io
import os
import select
import sys


class _Descriptor(io.RawIOBase):
    """An open file descriptor, written to as far as it can be; what it does not take is dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write some of it, and wait where the reader is slow. Returns how many bytes are done with."""
        while True:
            try:
                return os.write(self.descriptor, content)
            except BlockingIOError:  # a terminal or pipe that another program has set so
                select.select([], [self.descriptor], [])
            except OSError:  # nobody reads the pipe any more, the terminal is closed, the disk is full
                return len(content)


def keep_streams_open() -> None:
    """Let what is printed to a closed pipe or terminal, or on a full disk, be lost without an error.

    Characters that the encoding lacks are printed as escapes. Descriptors that are closed lead to nowhere, so that no
    file that is opened later gets their number, and with it what is printed. Streams that a caller has replaced stay.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - stays open
        elif stream is own and type(stream) is io.TextIOWrapper:
            lasting = io.TextIOWrapper(
                io.BufferedWriter(_Descriptor(stream.fileno())),  # type: ignore[type-var]
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=True,  # a log file has each line when it is printed, and keeps it after a kill
                write_through=stream.write_through,
            )
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, lasting)
