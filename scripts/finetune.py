"""Stage 2: fine-tune a pre-trained detector at high resolution.

  accelerate launch --quiet scripts/finetune.py --data DIR --init PRETRAINED_RUN --output-dir RUN

The defaults are the paper's: images fit into 1333x800, 16 a step out of micro-batches of 2, 12 epochs; below 5,000
training images at least 4,000 in all (--recipe).
"""

from direct_pt.program.run import run_program
from dataclasses import replace

from accelerate.utils import set_seed

from direct_pt.checkpoint import History, describe_model, from_pretrained, model_folder, read_history
from direct_pt.distributed.launch import join_processes
from direct_pt.errors import InputError, class_differences, first_names
from direct_pt.models.backbone_weights import load_backbone
from direct_pt.models.detector import FREEZES, Detector, DetectorConfig, build_detector
from direct_pt.reports.samples import write_samples
from direct_pt.training.choices import choose
from direct_pt.training.limits import check_channels, check_run
from direct_pt.training.resume import open_run
from direct_pt.training.settings import FinetuneDetectorOptions, FinetuneFlags, parse_flags
from direct_pt.training.start import load_data, make_feed, plan_run, prepare_detector, start_run, train_run
from direct_pt.transforms import TestPreset


def main(argv: list[str] | None = None) -> None:
    """Fine-tune."""
    flags = parse_flags(FinetuneFlags, __doc__ or "", argv)
    processes = join_processes()
    flags, resumption = open_run(flags, processes)
    options, sides = flags.run, (flags.images.short_side, flags.images.long_side)

    # Data: whole images, large.
    train, val = load_data(flags.data, processes, check_images=not options.resumes, resumption=resumption)
    model = None if flags.detector.init_kind == "run" else flags.detector.model
    choices = choose(flags.stage, flags.to_dict(), model, sides, train, resumption.choices if resumption else None)
    preset, test_preset = choices.finetune_preset(*sides), TestPreset(*sides)

    # Detector: a pre-trained one, of which BatchNorm, stem and first stage stay as they are.
    set_seed(options.seed)
    classes = dict(zip(train.category_ids, train.class_names, strict=True))
    detector, history, origin = initial_detector(
        flags.detector, classes, train.source, sides, options.seed, choices.anchor_scale
    )
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


def initial_detector(
    options: FinetuneDetectorOptions,
    classes: dict[int, str],
    source: str,
    sides: tuple[int, int],
    seed: int,
    anchor_scale: float | None,
) -> tuple[Detector, History, str]:
    """The detector that --init names.

    Args:
        options: what it starts from, and is built from.
        classes: {category id: name} of the data, in their order.
        source: of the data, for messages.
        sides: (short, long) of test images, in pixels.
        seed: for the message.
        anchor_scale: of a detector with random heads.

    Returns:
        The detector, in training mode; the stages of training behind it; where its weights come from, in words.

    Raises:
        InputError: it cannot be read, or contradicts the data or the flags.
    """
    if options.init_kind == "run":
        folder = model_folder(options.init, options.weights)
        detector = from_pretrained(folder, lambda config: matching_config(config, options, classes, source, sides))
        tensors, history = len(detector.state_dict()), read_history(folder)
        origin = f"{tensors} of {tensors} tensors loaded from {describe_model(folder)}"
    else:
        config = DetectorConfig.from_paper(options.model or "", tuple(classes.values()), tuple(classes))
        config = replace(options.applied_to(config, *sides), anchor_scale=anchor_scale)
        detector = build_detector(config.name, config=check_channels(config))
        tensors, history = len(detector.state_dict()), []
        origin = f"random: 0 of {tensors} tensors loaded (seed {seed})"
        if options.init_kind != "none":
            loaded = load_backbone(detector.backbone, detector.config.backbone, options.init)
            origin = f"{loaded}; the other {tensors - loaded.tensors} of {tensors} random (seed {seed})"
    detector.train()
    if options.init_kind != "none":  # from random weights anything frozen would cost most of the AP
        detector.freeze_for_finetuning(options.freeze)
    is_frozen = not all(parameter.requires_grad for parameter in detector.parameters())
    return detector, history, f"{origin}; {FREEZES[detector.frozen if is_frozen else 'none']}"


def matching_config(
    config: DetectorConfig,
    options: FinetuneDetectorOptions,
    classes: dict[int, str],
    source: str,
    sides: tuple[int, int],
) -> DetectorConfig:
    """A pre-trained detector's configuration with this stage's flags. Raises InputError where the two contradict."""
    trained = dict(zip(config.category_ids, config.class_names, strict=True))
    trained_names = first_names(config.class_names, 5)
    if trained != classes:
        raise InputError(
            f"{source} lists other classes than --init {options.init} was trained for: "
            f"{class_differences(classes, trained)}; give the same classes and ids, or pre-train on this data set"
        )
    if config.category_ids != tuple(classes):
        raise InputError(
            f"--init {options.init}: its classes are in another order than their ids ({trained_names}); "
            f"number the categories of {source} in that order"
        )
    if options.anchor_scale is not None:
        raise InputError(f"--anchor-scale: --init {options.init} has its own; leave the flag out")
    for flag in ("model", "backbone", "norm", "box_head", "channels"):
        given, found = getattr(options, flag), getattr(config, "name" if flag == "model" else flag)
        if given is not None and given != found:
            name = flag.replace("_", "-")
            raise InputError(f"--{name} {given}: --init {options.init} has {found}; leave the flag out")
    return options.applied_to(config, *sides)


if __name__ == "__main__":
    run_program(main)
