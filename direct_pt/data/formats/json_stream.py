"""Streaming JSON parser: yields the lists of a file's top-level object in chunks.

Python objects take several times the memory of their JSON text; those of a whole COCO file take gigabytes.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from direct_pt.files import open_regular

CHUNK = 4096  # list elements that are yielded together
BLOCK = 2**22  # bytes read at a time
LOOKAHEAD = 3  # characters needed after a value to know that it ends there: "1" may be the start of "1e+5"
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class NotAnObject(Exception):
    """The file is JSON, but its top level is not an object."""


def read_members(path: Path) -> Iterator[tuple[str, int, Any]]:
    """The members of the file's top-level object, in the file's order.

    Yields:
        (key, start, value). A list comes in chunks: `value` has the elements from index `start` on; an empty list is
        one empty chunk. Any other value comes whole, with start 0. Duplicate keys are all yielded.

    Raises:
        OSError, ValueError, RecursionError: as json.loads of the whole file would, but only on reaching the place.
        NotAnObject: the top level is not an object.
    """
    with open_regular(path) as file:
        text = _Text(file)
        if text.peek() != "{":
            text.value()
            text.end()
            raise NotAnObject
        for _ in text.items("}"):
            key = text.key()
            if text.peek() != "[":
                yield key, 0, text.value()
                continue
            start: int = 0
            chunk: list[Any] = []
            for _ in text.items("]"):
                chunk.append(text.value())
                if len(chunk) == CHUNK:
                    yield key, start, chunk
                    start, chunk = start + CHUNK, []
            if chunk or not start:
                yield key, start, chunk
        text.end()


class _Text:
    """A window on a file's text and a position in it; the window moves through the file as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self.scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.position = 0
        self.complete = False  # whether the window reaches the file's end
        # Before the window: characters, line ends, and the characters since the last line end.
        self.passed = self.lines = self.column = 0

    def peek(self) -> str:
        """The next character that is not white space; the position moves to it. "" at the file's end."""
        while True:
            space = WHITE_SPACE.match(self.text, self.position)
            assert space is not None
            self.position = space.end()
            if self.position < len(self.text) or self.complete:
                return self.text[self.position : self.position + 1]
            self._read_more()

    def items(self, closing: str) -> Iterator[None]:
        """Yields at each item of the object or list that begins here, for the caller to read it; ends after it."""
        self.position += 1
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self.position += 1
                self.peek()
                yield
            if self.peek() != closing:
                raise self._error("Expecting ',' delimiter", self.position)
        self.position += 1

    def key(self) -> str:
        """The key of an object's member; the position moves past its colon."""
        if self.peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes", self.position)
        key = self.value()
        if self.peek() != ":":
            raise self._error("Expecting ':' delimiter", self.position)
        self.position += 1
        return key

    def value(self) -> Any:
        """The value that begins here; the position moves past it."""
        while True:
            try:
                value, end = self.scan(self.text, self.position)
            except json.JSONDecodeError as error:  # malformed, or cut off at the window's end
                if self.complete:
                    raise self._error(error.msg, error.pos) from error
            else:
                if self.complete or end + LOOKAHEAD <= len(self.text):
                    self.position = end
                    return value
            self._read_more()

    def end(self) -> None:
        """Raises ValueError if anything but white space follows."""
        if self.peek():
            raise self._error("Extra data", self.position)

    def _read_more(self) -> None:
        """Drop the text before the position, and at least double the rest, so that a long value is tried few times."""
        read, ahead = self.text[: self.position], self.text[self.position :]
        lines = read.count("\n")
        self.column = len(read) - read.rfind("\n") - 1 if lines else self.column + len(read)
        self.lines += lines
        self.passed += len(read)
        block = self.file.read(max(BLOCK, len(ahead)))
        self.complete = not block
        try:
            self.text = ahead + self.decoder.decode(block, final=self.complete)
        except UnicodeDecodeError as error:
            position = self.file.tell() - len(error.object) + error.start
            byte = f"byte {error.object[error.start]:#04x} in position {position}"
            raise ValueError(f"'{error.encoding}' codec can't decode {byte}: {error.reason}") from error
        self.position = 0

    def _error(self, message: str, position: int) -> ValueError:
        """json's error message, with the place in the whole file of a position in the window."""
        lines = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) if lines else self.column + position + 1
        return ValueError(f"{message}: line {self.lines + lines + 1} column {column} (char {self.passed + position})")
