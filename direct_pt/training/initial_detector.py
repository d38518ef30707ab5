"""The detector that a stage starts from: random weights, a backbone's, or a whole detector's, of any classes."""

from dataclasses import replace

from direct_pt.checkpoint import History, describe_model, from_pretrained, model_folder, read_history
from direct_pt.errors import InputError, first_names
from direct_pt.images.tiles import Tiling, trained_tiling
from direct_pt.models.backbone_weights import load_backbone
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.models.transfer import transfer
from direct_pt.training.detector_flags import InitOptions
from direct_pt.training.limits import check_channels


def initial_detector(
    options: InitOptions, classes: dict[int, str], sides: tuple[int, int], seed: int, anchor_scale: float | None
) -> tuple[Detector, History, str]:
    """The detector that --init names.

    Args:
        options: what it starts from, and is built from.
        classes: {category id: name} of the data, in their order.
        sides: (short, long) of test images, in pixels.
        seed: for the message.
        anchor_scale: of a detector with random heads.

    Returns:
        The detector, in training mode; the stages of training behind it; where its weights come from, in words.

    Raises:
        InputError: it cannot be read, or contradicts the flags.
    """
    if options.init_kind == "run":
        detector, history, origin = _from_run(options, classes, sides, seed)
    else:
        config = DetectorConfig.from_paper(options.model or "", tuple(classes.values()), tuple(classes))
        config = replace(options.applied_to(config, *sides), anchor_scale=anchor_scale)
        detector, history = build_detector(config.name, config=check_channels(config)), []
        tensors = len(detector.state_dict())
        origin = f"random: 0 of {tensors} tensors loaded (seed {seed})"
        if options.init_kind != "none":
            loaded = load_backbone(detector.backbone, detector.config.backbone, options.init)
            origin = f"{loaded}; the other {tensors - loaded.tensors} of {tensors} random (seed {seed})"
    return detector.train(), history, origin


def tiling_of_init(options: InitOptions) -> Tiling | None:
    """The tiles that the detector that --init names was trained on, if any. Raises InputError."""
    return trained_tiling(read_history(options.init, options.weights)) if options.init_kind == "run" else None


def _from_run(
    options: InitOptions, classes: dict[int, str], sides: tuple[int, int], seed: int
) -> tuple[Detector, History, str]:
    """The same of a run, or a model folder, whose classes may be others."""
    folder = model_folder(options.init, options.weights)
    source = from_pretrained(folder, lambda config: _matching_config(config, options, sides))
    history, tensors, config = read_history(folder), len(source.state_dict()), source.config
    if list(zip(config.category_ids, config.class_names, strict=True)) == list(classes.items()):
        return source, history, f"{tensors} of {tensors} tensors loaded from {describe_model(folder)}"
    config = replace(config, class_names=tuple(classes.values()), category_ids=tuple(classes))
    detector = build_detector(config.name, config=config)
    taken = transfer(source, detector)
    others = [name for name in config.class_names if name not in taken.classes]
    kept = f"{len(taken.classes)} of {len(config.class_names)} classes by name ({first_names(taken.classes, 5)})"
    fresh = f", random (seed {seed}): {first_names(others, 5)}" if others else ""
    origin = (
        f"{taken.whole} of {tensors} tensors loaded from {describe_model(folder)}, a detector of other classes; of the "
        f"{taken.by_class} with rows of classes: {kept if taken.classes else 'none is the same by name'}{fresh}"
    )
    return detector, history, origin


def _matching_config(config: DetectorConfig, options: InitOptions, sides: tuple[int, int]) -> DetectorConfig:
    """A trained detector's configuration with this stage's flags. Raises InputError where the two contradict."""
    if options.anchor_scale is not None:
        raise InputError(f"--anchor-scale: --init {options.init} has its own; leave the flag out")
    for flag in ("model", "backbone", "norm", "box_head", "channels"):
        given, found = getattr(options, flag), getattr(config, "name" if flag == "model" else flag)
        if given is not None and given != found:
            name = flag.replace("_", "-")
            raise InputError(f"--{name} {given}: --init {options.init} has {found}; leave the flag out")
    return options.applied_to(config, *sides)
