"""Stage 1: pre-train the whole detector from random weights on your own data, at low resolution.

  accelerate launch scripts/pretrain.py --data DIR --model faster_rcnn_r50_fpn --output-dir RUN

The defaults are the paper's: 448x448 crops, 64 images a step out of micro-batches of 8, 48 epochs; below 5,000
training images 8 a step and at least 32,000 in all (--recipe).
"""

from direct_pt.errors import run_program
from direct_pt.training.settings import parse_training
from direct_pt.training.start import run_stage

if __name__ == "__main__":
    run_program(lambda: run_stage(parse_training("pretrain", __doc__ or "")))
