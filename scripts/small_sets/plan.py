"""What an experiment file declares, and the runs that follow from it."""

import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from direct_pt.errors import InputError
from direct_pt.files import read_regular
from direct_pt.reports.duplicates import MAX_BITS
from small_sets.factorial import MAX_FACTORS, combinations

PEERS = "peers"  # the stage of an arm that is another project's trainer: see peers.py
STAGES = ("pretrain", "finetune", PEERS)
SECONDS = "{seconds}"  # in a peer's flags: what another arm costs
CHECKPOINT = re.compile(r"^\{pretrain@([1-9][0-9]*)\}$")  # in --init: stage 1's, by its step
STEPS = "{steps}"  # in an arm's last stage: as many as make it cost what another arm costs


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: unique.
        folder: below --data-root; its name unless told.
        images: training images of each fold that are used, chosen at random; 0 for all.
        folds: that it is divided into.
        group: regular expression; images whose file names match it alike stay in one fold.
        near_bits: near-duplicates, whose perceptual hashes differ in no more of 256 bits, stay in one fold, too. Of a
            camera that does not move all images are near each other, unless this is low.
    """

    name: str
    folder: str = ""
    images: int = 0
    folds: int = 5
    group: str = ""
    near_bits: int = MAX_BITS

    def path(self, root: Path) -> Path:
        """Where it is. Raises InputError where it is not."""
        path = root / (self.folder or self.name)
        if not path.is_dir():
            raise InputError(f"--data-root {root}: has no folder {path.name}")
        return path


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: unique within its experiment.
        stages: flags of each stage that it has, in order; without --data, --seed, --init of a run, --output-dir.
            "--init {pretrain@N}" starts from stage 1's checkpoint of step N in place of its last weights.
        equal_cost: the arm of the same experiment whose processor time {steps} in the flags is to match.
        levels: whether each factor of the experiment is on.
    """

    name: str
    stages: dict[str, tuple[str, ...]]
    equal_cost: str = ""
    levels: tuple[bool, ...] = ()

    @property
    def first_steps(self) -> int:
        """The steps of stage 1 after which stage 2 starts; 0 for all of them."""
        found = [CHECKPOINT.match(part) for part in self.stages.get("finetune", ())]
        return next((int(match[1]) for match in found if match), 0)


@dataclass(frozen=True)
class Experiment:
    """A question, and the runs that answer it: every arm on every fold of every set with every seed.

    Attributes:
        name: unique.
        question: in words.
        arms: what is compared.
        sets: by name.
        folds, seeds: numbers.
        factors: names of flags that are added to one arm, in combinations that are the arms then.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    sets: tuple[str, ...]
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunId:
    """One run: the key of its row in the results."""

    experiment: str
    set: str
    fold: int
    seed: int
    arm: str

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.experiment}, {self.set} fold {self.fold}, seed {self.seed}, {self.arm}"


@dataclass(frozen=True)
class Plan:
    """An experiment file: its sets by name, and its experiments in order."""

    path: Path
    sets: dict[str, DataSet]
    experiments: tuple[Experiment, ...]

    def runs(self, names: list[str] | None = None) -> list[RunId]:
        """All runs, or those of some experiments; seeds and folds go slowest, so that arms are compared early.

        Raises:
            InputError: there is no such experiment.
        """
        return [
            RunId(one.name, data, fold, seed, arm.name)
            for one in self.only(names).experiments
            for seed in one.seeds
            for fold in one.folds
            for data in one.sets
            for arm in one.arms
        ]

    def only(self, names: list[str] | None) -> "Plan":
        """Some of the experiments, or all. Raises InputError where there is no such one."""
        known = [experiment.name for experiment in self.experiments]
        for name in names or ():
            if name not in known:
                raise InputError(f"{self.path}: has no experiment {name}, only {', '.join(known)}")
        return replace(self, experiments=tuple(one for one in self.experiments if names is None or one.name in names))

    def arm(self, run: RunId) -> Arm:
        """The arm of a run."""
        return self.arm_named(run.experiment, run.arm)

    def arm_named(self, experiment: str, name: str) -> Arm:
        """An arm of an experiment."""
        (found,) = [arm for one in self.experiments if one.name == experiment for arm in one.arms if arm.name == name]
        return found


@dataclass
class _Reader:
    """Reads tables of TOML, and names what is wrong in them."""

    path: Path
    used: set[str] = field(default_factory=set)

    def fail(self, where: str, what: str) -> InputError:
        return InputError(f"{self.path}: {where}: {what}")

    def table(self, kind: type, values: Any, where: str) -> dict[str, Any]:
        """The values of a table, whose keys are fields of `kind`; lists become tuples."""
        if not isinstance(values, dict):
            raise self.fail(where, "is no table")
        known = {one.name for one in fields(kind)}
        if unknown := sorted(set(values) - known):
            raise self.fail(where, f"has an unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def read_plan(path: Path) -> Plan:
    """An experiment file. Raises InputError, naming the table and the key."""
    reader = _Reader(path)
    try:
        content = tomllib.loads(read_regular(path).decode())  # UTF-8, whatever the locale
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from error
    common = _flags(content.get("flags", {}), "flags", reader)
    sets = {}
    for name, values in content.get("sets", {}).items():
        sets[name] = DataSet(name, **reader.table(DataSet, values, f"sets.{name}"))
        for one in fields(DataSet)[1:]:  # all have a default
            if type(getattr(sets[name], one.name)) is not type(one.default):
                raise reader.fail(f"sets.{name}", f"{one.name} must be of the kind of {one.default!r}")
        if sets[name].folds < 2:
            raise reader.fail(f"sets.{name}", "folds must be 2 or more")
        if not 0 <= sets[name].near_bits <= 256:
            raise reader.fail(f"sets.{name}", "near_bits must be from 0 to 256")
    if not isinstance(content.get("experiments"), list):
        raise reader.fail("experiments", "declare some, as [[experiments]]")
    experiments = tuple(_experiment(values, common, sets, reader) for values in content["experiments"])
    names = [one.name for one in experiments]
    if len(set(names)) < len(names):
        raise reader.fail("experiments", "give each a name of its own")
    return Plan(path, sets, experiments)


def _experiment(
    values: dict[str, Any], common: dict[str, tuple[str, ...]], sets: dict[str, DataSet], reader: _Reader
) -> Experiment:
    where = f"experiment {values.get('name', '?')}"
    factors = values.get("factors", {})
    if not isinstance(factors, dict):
        raise reader.fail(f"{where}, factors", "is no table")
    own = reader.table(Experiment, {key: value for key, value in values.items() if key != "arms"}, where)
    own["factors"] = tuple(factors)
    arms = []
    for name, flags in values.get("arms", {}).items():
        place = f"{where}, arm {name}"
        equal_cost = flags.get("equal_cost", "")
        given = _flags({key: value for key, value in flags.items() if key != "equal_cost"}, place, reader)
        if equal_cost and equal_cost not in values["arms"]:
            raise reader.fail(place, f"equal_cost names no arm of this experiment: {equal_cost}")
        wanted = SECONDS if PEERS in given else STEPS
        if bool(equal_cost) != any(wanted in part for stage in given.values() for part in stage):
            raise reader.fail(place, f"equal_cost and {wanted} in the flags belong together")
        if PEERS in given and len(given) > 1:
            raise reader.fail(place, f"{PEERS} is a stage for itself")
        stages = {stage: (*common.get(stage, ()), *given[stage]) for stage in STAGES if stage in given}
        if not stages:
            raise reader.fail(place, f"has flags for no stage: {' or '.join(STAGES)}")
        arms.append(Arm(name, stages, equal_cost))
    if factors:
        if len(arms) != 1 or arms[0].equal_cost or not 2 <= len(factors) <= MAX_FACTORS:
            raise reader.fail(where, f"needs one arm without equal_cost, and 2 to {MAX_FACTORS} factors")
        added = {name: _flags(flags, f"{where}, factor {name}", reader) for name, flags in factors.items()}
        for name, flags in added.items():
            if unknown := set(flags) - set(arms[0].stages):
                raise reader.fail(f"{where}, factor {name}", f"its arm has no stage {unknown.pop()}")
        arms = [_with_factors(arms[0], added, levels) for levels in combinations(len(factors))]
    for arm in arms:
        if arm.first_steps and ("pretrain" not in arm.stages or any(arm.equal_cost for arm in arms)):
            raise reader.fail(f"{where}, arm {arm.name}", "{pretrain@N} needs a stage pretrain, and no equal_cost")
    try:
        found = Experiment(**{"question": "", **own}, arms=tuple(arms))
    except TypeError as error:
        raise reader.fail(where, str(error).removeprefix("Experiment.__init__() ")) from error
    if not arms:
        raise reader.fail(where, "has no arms")
    for name in found.sets:
        if name not in sets:
            raise reader.fail(where, f"names a set that is not declared: {name}")
        if max(found.folds) >= sets[name].folds:
            raise reader.fail(where, f"has fold {max(found.folds)}, and {name} only {sets[name].folds}, from 0")
    return found


def _with_factors(arm: Arm, added: dict[str, dict[str, tuple[str, ...]]], levels: tuple[bool, ...]) -> Arm:
    """An arm with the flags of the factors that are on; it is named by them."""
    on = [name for name, is_on in zip(added, levels, strict=True) if is_on]
    stages = {
        stage: tuple(itertools.chain(flags, *(added[name].get(stage, ()) for name in on)))
        for stage, flags in arm.stages.items()
    }
    return Arm(" + ".join([arm.name, *on]), stages, levels=levels)


def _flags(values: Any, where: str, reader: _Reader) -> dict[str, tuple[str, ...]]:
    """The flags of each stage, split as a shell would."""
    if not isinstance(values, dict) or not set(values) <= set(STAGES):
        raise reader.fail(where, f"has other keys than {', '.join(STAGES)}")
    for stage, text in values.items():
        if not isinstance(text, str):
            raise reader.fail(where, f"{stage} is no text")
    return {stage: tuple(shlex.split(text)) for stage, text in values.items()}
