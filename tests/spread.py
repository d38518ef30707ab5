"""test_spread.py starts this in one process or two: `spread.py FLAGS...` is pretrain.py in float64."""

import sys

import small_runs as runs

from direct_pt.errors import run_program
from direct_pt.training.settings import parse_training
from direct_pt.training.start import run_stage

if __name__ == "__main__":
    with runs.float64():
        run_program(lambda: run_stage(parse_training("pretrain", "", sys.argv[1:])))
