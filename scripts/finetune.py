"""Stage 2: fine-tune a pre-trained detector at high resolution.

  accelerate launch scripts/finetune.py --data DIR --init PRETRAINED_RUN --output-dir RUN

The defaults are the paper's: images fit into 1333x800, 16 a step out of micro-batches of 2, 12 epochs; below 5,000
training images at least 4,000 in all (--recipe).
"""

from direct_pt.errors import run_program
from direct_pt.training.settings import parse_training
from direct_pt.training.start import run_stage

if __name__ == "__main__":
    run_program(lambda: run_stage(parse_training("finetune", __doc__ or "")))
