"""Stage 2: fine-tune a pre-trained detector at high resolution.

  accelerate launch --quiet scripts/finetune.py --data DIR --init PRETRAINED_RUN --output-dir RUN

The defaults are the paper's: images fit into 1333x800, 16 a step out of micro-batches of 2, 12 epochs; below 5,000
training images at least 4,000 in all (--recipe).
"""

from direct_pt.program.run import run_program

from accelerate.utils import set_seed

from direct_pt.distributed.launch import join_processes
from direct_pt.models.detector import FREEZES
from direct_pt.reports.samples import write_samples
from direct_pt.training.choices import choose
from direct_pt.training.initial_detector import initial_detector, tiling_of_init
from direct_pt.training.limits import check_run
from direct_pt.training.resume import open_run
from direct_pt.training.settings import FinetuneFlags, parse_flags
from direct_pt.training.start import load_data, make_feed, plan_run, prepare_detector, start_run, train_run
from direct_pt.transforms import TestPreset


def main(argv: list[str] | None = None) -> None:
    """Fine-tune."""
    flags = parse_flags(FinetuneFlags, __doc__ or "", argv)
    processes = join_processes(flags.run.device)
    flags, resumption = open_run(flags, processes)
    options, sides = flags.run, (flags.images.short_side, flags.images.long_side)

    # Data: whole images, large; or tiles, as in stage 1.
    tiling = flags.data.tiling(tiling_of_init(flags.detector))
    train, val = load_data(
        flags.data, processes, check_images=not options.resumes, resumption=resumption, tiling=tiling
    )
    model = None if flags.detector.init_kind == "run" else flags.detector.model
    choices = choose(flags.stage, flags.to_dict(), model, sides, train, resumption.choices if resumption else None)
    preset, test_preset = choices.finetune_preset(*sides), TestPreset(*sides, tiling)

    # Detector: a pre-trained one, of which BatchNorm, stem and first stage stay as they are.
    set_seed(options.seed)
    classes = dict(zip(train.category_ids, train.class_names, strict=True))
    detector, history, origin = initial_detector(flags.detector, classes, sides, options.seed, choices.anchor_scale)
    if flags.detector.init_kind != "none":  # from random weights anything frozen would cost most of the AP
        detector.freeze_for_finetuning(flags.detector.freeze)
    is_frozen = not all(parameter.requires_grad for parameter in detector.parameters())
    origin = f"{origin}; {FREEZES[detector.frozen if is_frozen else 'none']}"
    prepare_detector(detector, options, train, val, one_shape=False)

    # Plan: batch, steps and learning rate, by the recipe for so many images; like aspect ratios share a micro-batch.
    plan, recipe = plan_run(flags, detector, train, preset, processes, resumption)
    check_run(plan, detector, preset)
    feed = make_feed(
        train, flags.data, plan, preset, detector.has_masks, options.seed, options.num_workers, grouped=True
    )
    if options.preview is not None:
        return write_samples(feed, plan.micro_batch_size, train.class_names, options.preview, options.output_dir)

    # Train: on the device, with its precision and processes, from the newest checkpoint if there is one.
    run = start_run(flags, choices, plan, recipe, detector, feed, val, test_preset, resumption, history)
    train_run(run, flags, train, f"fit into {sides[1]}x{sides[0]}", origin, test_preset)


if __name__ == "__main__":
    run_program(main)
