"""Stage 1: pre-train the whole detector from random weights on your own data, at low resolution.

  accelerate launch --quiet scripts/pretrain.py --data DIR --model faster_rcnn_r50_fpn --output-dir RUN

The defaults are the paper's: 448x448 crops, 64 images a step out of micro-batches of 8, 48 epochs; below 5,000
training images 8 a step and at least 32,000 in all (--recipe).
"""

from direct_pt.program.run import run_program

from accelerate.utils import set_seed

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import open_image_cache
from direct_pt.distributed.launch import join_processes
from direct_pt.reports.samples import write_samples
from direct_pt.reports.survey import size_name, whole_image
from direct_pt.training.choices import choose
from direct_pt.training.initial_detector import initial_detector
from direct_pt.training.limits import check_run
from direct_pt.training.resume import open_run
from direct_pt.training.settings import PretrainFlags, parse_flags
from direct_pt.training.start import load_data, make_feed, plan_run, prepare_detector, start_run, train_run
from direct_pt.transforms import TestPreset


def main(argv: list[str] | None = None) -> None:
    """Pre-train."""
    flags = parse_flags(PretrainFlags, __doc__ or "", argv)
    processes = join_processes(flags.run.device)
    flags, resumption = open_run(flags, processes)
    options, size = flags.run, flags.images.image_size

    # Data: the target set itself, in crops of one small size.
    tiling = flags.data.tiling()
    train, val = load_data(
        flags.data, processes, check_images=not options.resumes, resumption=resumption, tiling=tiling
    )
    model = None if flags.detector.init_kind == "run" else flags.detector.model
    choices = choose(flags.stage, flags.to_dict(), model, size, train, resumption.choices if resumption else None)
    preset = choices.pretrain_preset(size)
    sides = min(preset.frame), max(preset.frame)

    # Detector: random weights, unless --init says otherwise, and all of them train: anything frozen would cost most of
    # the AP.
    set_seed(options.seed)
    classes = dict(zip(train.category_ids, train.class_names, strict=True))
    detector, history, origin = initial_detector(flags.detector, classes, sides, options.seed, choices.anchor_scale)
    assert all(parameter.requires_grad for parameter in detector.parameters())
    origin = f"{origin}; nothing frozen"
    prepare_detector(detector, options, train, val, one_shape=True)

    # Plan: batch, steps and learning rate, by the recipe for so many images.
    plan, recipe = plan_run(flags, detector, train, preset, processes, resumption)
    check_run(plan, detector, preset)
    cache = None
    if flags.images.cache != "none" and isinstance(train, AnnotationTable):
        cache = open_image_cache(
            train, flags.images.cache, preset.largest_side, flags.images.cache_dir, options.num_workers
        )
    feed = make_feed(
        train, flags.data, plan, preset, detector.has_masks, options.seed, options.num_workers, cache=cache,
        mix=choices.mix,
    )  # fmt: skip
    if options.preview is not None:
        return write_samples(feed, plan.micro_batch_size, train.class_names, options.preview, options.output_dir)

    # Train: on the device, with its precision and processes, from the newest checkpoint if there is one.
    run = start_run(flags, choices, plan, recipe, detector, feed, val, TestPreset(*sides, tiling), resumption, history)
    train_run(run, flags, train, f"{size_name(preset)} crops", origin, whole_image(size, preset.canvas))


if __name__ == "__main__":
    run_program(main)
