"""What a stage costs in processor time, by its steps: so that arms that are compared get the same time."""

from dataclasses import dataclass, field
from pathlib import Path

from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, read_json, write_json
from direct_pt.schema import WrongValue, list_of, mapping, number
from small_sets.plan import STEPS, Arm

LENGTH = "--max-steps"


@dataclass
class Costs:
    """Measured costs, in a JSON file.

    Attributes:
        path: the file.
        stages: {key: (seconds without any step, seconds a step)}, evaluation included.
    """

    path: Path
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """From a file, if there is one. Raises InputError."""
        if not path.exists():
            return cls(path)
        try:
            found = read_json(path)
            mapping(list_of(number(), 2, 2))(found, "costs")
        except (DamagedFile, WrongValue) as error:
            raise InputError(f"{path}: cannot be read as costs ({error}); run calibrate anew without it") from error
        return cls(path, {key: (float(a), float(b)) for key, (a, b) in found.items()})

    def write(self) -> None:
        """To the file."""
        write_json(self.path, {key: [round(one, 4) for one in pair] for key, pair in sorted(self.stages.items())})

    def add(self, seconds: dict[str, tuple[float, float]], low: int, high: int) -> None:
        """Add the costs of stages of one set.

        A known cost stays, and the new ones are in its seconds: those of another machine, perhaps.

        Args:
            seconds: {key: (of a run of `low` steps, of one of `high` steps)}, of known and new stages.
            low: steps.
            high: more steps.

        Raises:
            InputError: more steps took no longer.
        """
        known = {key: self.stages[key] for key in seconds if key in self.stages}
        as_known = sum(fixed + high * per_step for fixed, per_step in known.values())
        scale = as_known / sum(seconds[key][1] for key in known) if known else 1.0
        for key, (short, long) in seconds.items():
            per_step = (long - short) / (high - low)
            if per_step <= 0:
                raise InputError(f"{key}: {high} steps took no longer than {low}: give larger --calibration-steps")
            self.stages.setdefault(key, ((short - low * per_step) * scale, per_step * scale))

    def of_arm(self, data: str, arm: Arm) -> float:
        """Processor seconds of an arm whose lengths are all stated. Raises InputError."""
        seconds = 0.0
        for stage, flags in arm.stages.items():
            fixed, per_step = self.of_stage(data, stage, flags)
            seconds += fixed + per_step * stated_length(arm, flags)
        return seconds

    def of_stage(self, data: str, stage: str, flags: tuple[str, ...]) -> tuple[float, float]:
        """Seconds without any step, and a step. Raises InputError where they were not measured."""
        key = cost_key(data, stage, flags)
        if key not in self.stages:
            raise InputError(f"{self.path}: has no cost of {key}: run calibrate")
        return self.stages[key]

    def equal_steps(self, data: str, target: Arm, arm: Arm) -> int:
        """The steps of the stage of `arm` that has {steps}, with which it costs what `target` does.

        Raises:
            InputError: the costs were not measured, or the other stages cost more already.
        """
        left, per_step = self.of_arm(data, target), 0.0
        for stage, flags in arm.stages.items():
            fixed, own = self.of_stage(data, stage, flags)
            if any(STEPS in flag for flag in flags):
                per_step = own
                left -= fixed
            else:
                left -= fixed + own * stated_length(arm, flags)
        if left < per_step:
            raise InputError(f"arm {arm.name} on {data}: costs more than {target.name} even with a single step")
        return round(left / per_step)


def cost_key(data: str, stage: str, flags: tuple[str, ...]) -> str:
    """What a cost depends on."""
    return f"{data} {stage} {' '.join(without_length(flags))}"


def without_length(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags without --max-steps and its value."""
    if LENGTH not in flags:
        return flags
    place = flags.index(LENGTH)
    return flags[:place] + flags[place + 2 :]


def stated_length(arm: Arm, flags: tuple[str, ...]) -> int:
    """The steps that a stage's flags state. Raises InputError."""
    try:
        return int(flags[flags.index(LENGTH) + 1])
    except (ValueError, IndexError):
        raise InputError(f"arm {arm.name}: give {LENGTH} in each of its stages, as its cost is compared") from None
