"""What a run goes on from: found and read by the main process, told to the others, put where it belongs."""

from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator, PartialState
from timm.utils import ModelEmaV3

from direct_pt.checkpoint import CONFIG, Tensors, TrainingState, load_training_state
from direct_pt.models.detector import Detector
from direct_pt.plan import Plan, read_plan
from direct_pt.processes import main_decides, share_tensors
from direct_pt.progress import Progress
from direct_pt.settings import MENDABLE, Settings, read_settings
from direct_pt.sharding import Sharded


@dataclass
class Resumption:
    """A run's newest good checkpoint.

    Attributes:
        progress: how far it has come.
        scaler: of fp16's loss scale.
        of_processes: what each process had gathered since the last log.
        micro_batch_size: images at once on a device.
        plan: the run's batch, length, rate and schedule.
        changed: the flags that may change when a run is resumed, and have: name, value now, value before.
        state: the tensors, on the main process.
    """

    progress: Progress
    scaler: dict[str, Any] | None
    of_processes: list[dict[str, Any]]
    micro_batch_size: int
    plan: Plan
    changed: list[tuple[str, Any, Any]]
    state: TrainingState | None = None

    @classmethod
    def find(cls, settings: Settings, processes: PartialState) -> "Resumption | None":
        """What `settings` go on from, or None for a new run. Every process must call it.

        Raises:
            InputError: all checkpoints are damaged, or config.json is.
        """
        read: list[TrainingState] = []  # on the main process

        def look() -> Resumption | None:
            state = load_training_state(settings.output_dir / "checkpoints") if settings.resumes else None
            if state is None:
                return None
            read.append(state)
            plan, changed = _earlier_plan(settings)
            state.progress.resume()
            return cls(state.progress, state.scaler, state.of_processes, state.micro_batch_size, plan, changed)

        found = main_decides(look, processes)
        if found is not None and read:
            found.state = read[0]
        return found

    def put_weights(self, detector: Detector, accelerator: Accelerator) -> None:
        """Before the detector is prepared. Every process must call it, also the methods below."""
        detector.load_state_dict(share_tensors(self._tensors("weights"), accelerator))

    def put_state(self, sharded: Sharded, average: ModelEmaV3 | None, accelerator: Accelerator) -> Progress:
        """Optimizer, moving average and loss scale, of what is prepared. Returns how far the run has come."""
        sharded.load_optimizer_state(share_tensors(self._tensors("optimizer"), accelerator))
        if average is not None:
            average.module.load_state_dict(share_tensors(self._tensors("average"), accelerator))
        if accelerator.scaler is not None and self.scaler is not None:
            accelerator.scaler.load_state_dict(self.scaler)
        return self.progress

    def of_process(self, accelerator: Accelerator) -> dict[str, Any]:
        """What this process had gathered; with another number of processes, all of them share alike."""
        if len(self.of_processes) == accelerator.num_processes:
            return self.of_processes[accelerator.process_index]
        first = self.of_processes[0]
        sums = {name: sum(one["losses"][name] for one in self.of_processes) for name in first["losses"]}
        return {**first, "losses": {name: total / len(self.of_processes) for name, total in sums.items()}}

    def differences(self, plan: Plan) -> tuple[str, ...]:
        """What is another than before, in words."""
        notes = [f"resumed with --{name.replace('_', '-')} {now}, before {then}" for name, now, then in self.changed]
        before = len(self.of_processes), self.micro_batch_size
        if before != (plan.processes, plan.micro_batch_size):
            notes.insert(
                0,
                f"resumed on {plan.processes} process(es) with {plan.micro_batch_size} images at once, before "
                f"{before[0]} with {before[1]}: the same global batch and schedule",
            )
        return tuple(notes)

    def _tensors(self, name: str) -> Tensors | None:
        return None if self.state is None else getattr(self.state, name)


def _earlier_plan(settings: Settings) -> tuple[Plan, list[tuple[str, Any, Any]]]:
    """The plan of the run that is resumed, and the flags that may change then and have."""
    path = settings.output_dir / CONFIG
    saved, given = read_settings(path), asdict(settings)
    changed = [
        (name, given[name], saved.get(name))
        for name in sorted(MENDABLE - {"micro_batch_size"})
        if saved.get(name, vars(Settings).get(name)) != given[name]
    ]
    return read_plan(path), changed
