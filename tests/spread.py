"""test_spread.py starts this in one process or two: `spread.py FLAGS...` is pretrain.py in float64."""

from direct_pt.program.run import run_program
import sys

import small_runs as runs

if __name__ == "__main__":
    with runs.float64():
        run_program(lambda: runs.load_script("pretrain").main(sys.argv[1:]))
