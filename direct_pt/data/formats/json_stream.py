"""A large JSON file piece by piece: the lists of its top-level object come some records at a time.

Python objects take several times the room of the text that they are made from; of a whole file they would fill the
memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 4096  # elements of a list that are handed on together
BLOCK = 2**22  # bytes read at a time
# So many characters must follow a value that ends within the text at hand: "1" may be the beginning of "1e+5".
LOOKAHEAD = 3
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class NotAnObject(Exception):
    """The file is JSON, but its top level is no object."""


def read_members(path: Path) -> Iterator[tuple[str, int, Any]]:
    """The members of the file's top-level object, in the file's order.

    Yields:
        (key, start, value). A list comes in pieces: `value` is the elements from number `start` on, and an empty list
        is one empty piece. Any other value comes whole, with start 0. A key that stands there twice comes twice.

    Raises:
        OSError, ValueError, RecursionError: as json.loads of the whole file would, though only when it gets there.
        NotAnObject: the top level is something else.
    """
    with path.open("rb") as file:
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
    """A stretch of a file's text and the position in it. It moves on through the file as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self.scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.position = 0
        self.complete = False  # whether the text reaches to the file's end
        # What lies before the text: characters, line ends, and the characters after the last one.
        self.passed = self.lines = self.column = 0

    def peek(self) -> str:
        """The next character that is no white space, and the position on it; "" at the file's end."""
        while True:
            space = WHITE_SPACE.match(self.text, self.position)
            assert space is not None
            self.position = space.end()
            if self.position < len(self.text) or self.complete:
                return self.text[self.position : self.position + 1]
            self._read_on()

    def items(self, closing: str) -> Iterator[None]:
        """Stops at each item of the object or list that begins here, for the caller to read it; ends behind it."""
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
        """The key of an object's member; the position is behind its colon."""
        if self.peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes", self.position)
        key = self.value()
        if self.peek() != ":":
            raise self._error("Expecting ':' delimiter", self.position)
        self.position += 1
        return key

    def value(self) -> Any:
        """The value that begins here; the position is behind it."""
        while True:
            try:
                value, end = self.scan(self.text, self.position)
            except json.JSONDecodeError as error:  # wrong, or cut off where the text at hand ends
                if self.complete:
                    raise self._error(error.msg, error.pos) from error
            else:
                if self.complete or end + LOOKAHEAD <= len(self.text):
                    self.position = end
                    return value
            self._read_on()

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise self._error("Extra data", self.position)

    def _read_on(self) -> None:
        """Drop what lies behind, and at least double what lies ahead: a long value is tried a few times only."""
        behind, ahead = self.text[: self.position], self.text[self.position :]
        lines = behind.count("\n")
        self.column = len(behind) - behind.rfind("\n") - 1 if lines else self.column + len(behind)
        self.lines += lines
        self.passed += len(behind)
        block = self.file.read(max(BLOCK, len(ahead)))
        self.complete = not block
        try:
            self.text = ahead + self.decoder.decode(block, final=self.complete)
        except UnicodeDecodeError as error:
            place = self.file.tell() - len(error.object) + error.start
            byte = f"byte {error.object[error.start]:#04x} in position {place}"
            raise ValueError(f"'{error.encoding}' codec can't decode {byte}: {error.reason}") from error
        self.position = 0

    def _error(self, message: str, position: int) -> ValueError:
        """With the place in the file of a position in the text, in json's words."""
        lines = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) if lines else self.column + position + 1
        return ValueError(f"{message}: line {self.lines + lines + 1} column {column} (char {self.passed + position})")
