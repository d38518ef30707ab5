"""test_peers.py starts this in two processes: one of them differs. `ranks.py SCRIPT CHANGES FLAGS...`

CHANGES are what is different in the second process, as JSON: "flags" that it gets too; "places", folders that look
otherwise to it: {path: what lies there in its place, or null for nothing}; "fails", a step that raises an error there.
"""

from direct_pt.program.run import run_program
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import small_runs as runs

from direct_pt.batch import Batch
from direct_pt.training.loop import Trainer

CLONE_NEWNS = 0x20000  # of unshare(2): mounts that only this process sees


def change(places: dict[str, str | None]) -> None:
    """Mount what this process is to see."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for place, other in places.items():
        mount = ["--bind", other, place] if other else ["-t", "tmpfs", "none", place]
        subprocess.run(["mount", *mount], check=True)


def fail_at(step: int) -> None:
    """An error in a step's beginning, as a fault of this program would be."""
    original = Trainer._step

    def failing(self: Trainer, batches: Iterator[Batch]) -> int:
        if self.progress.step == step:
            raise ArithmeticError("a fault of one process")
        return original(self, batches)

    Trainer._step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    script, text, *flags = sys.argv[1:]
    changes: dict[str, Any] = json.loads(text)
    if os.environ["RANK"] == "1":
        flags += map(str, changes.get("flags", ()))
        if "places" in changes:
            change(changes["places"])
        if "fails" in changes:
            fail_at(changes["fails"])
    run_program(lambda: runs.load_script(script).main(flags))
