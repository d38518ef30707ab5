"""The names that --report-to takes. They are apart from trackers.py, as accelerate takes a second to load."""

from importlib.util import find_spec

from direct_pt.errors import InputError

TRACKERS = (
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
NO_TRACKER = "none"


def check_trackers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The trackers that --report-to names, each once.

    Raises:
        InputError: "none" stands beside others, or a package is not installed.
    """
    chosen = tuple(dict.fromkeys(names))
    if NO_TRACKER in chosen and len(chosen) > 1:
        raise InputError(f"--report-to {' '.join(chosen)}: none excludes the others: leave it out")
    chosen = tuple(name for name in chosen if name != NO_TRACKER)
    for name in chosen:
        if find_spec(name) is None:
            raise InputError(
                f"--report-to {name}: its package is not installed: pip install {name}, or --report-to none"
            )
    return chosen
