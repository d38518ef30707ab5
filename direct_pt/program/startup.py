"""The first seconds of a program, in which its libraries are loaded: Ctrl-C ends it at once and silently.

Python's own way is a traceback out of some library. run.py imports this first, and scripts import that first. A
program of the user's own that loads a script, or the rest of the package, keeps its signal handlers.
Nothing is looked for to be freed meanwhile, which would take a fifth of the time.
"""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

IMPORTERS = ("importlib._bootstrap", "importlib._bootstrap_external", "direct_pt.program.run", __name__)


def _importer() -> str:
    """The name of the module that imports run.py."""
    frame = sys._getframe()
    while (name := frame.f_globals["__name__"]) in IMPORTERS and frame.f_back is not None:
        frame = frame.f_back
    return str(name)


_is_program = _importer() == "__main__"
# Where SIGINT is ignored, as for programs in the background of a shell's script, it stays so.
_decides = _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _decides:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if _is_program:
    gc.disable()


@contextmanager
def libraries_loaded() -> Iterator[None]:
    """Inside it Ctrl-C is an exception again; what the libraries do after it ends silently."""
    if _is_program:
        gc.freeze()  # what has been loaded stays; so forked processes share its memory, too
        gc.enable()
    if not _decides:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
