"""What a run goes on from: found and read by the main process, told to the others, put where it belongs."""

from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator, PartialState
from timm.utils import ModelEmaV3

from direct_pt.checkpoint import CONFIG, Tensors
from direct_pt.distributed.processes import main_decides, share_tensors
from direct_pt.models.detector import Detector
from direct_pt.training.checkpoints import TrainingState, load_training_state
from direct_pt.training.plan import Plan, read_plan
from direct_pt.training.prepared import Sharded
from direct_pt.training.progress import Progress
from direct_pt.training.settings import MENDABLE, Settings, read_settings


@dataclass
class Resumption:
    """A run's newest good checkpoint.

    Attributes:
        progress: how far it has come.
        scaler: of fp16's loss scale.
        of_processes: what each process had gathered since the last log.
        micro_batch_size: images at once on a device.
        plan: the run's batch, length, rate and schedule.
        notes: which settings have changed, in words.
        state: the tensors, on the main process.
    """

    progress: Progress
    scaler: dict[str, Any] | None
    of_processes: list[dict[str, Any]]
    micro_batch_size: int
    plan: Plan
    notes: list[str]
    state: TrainingState | None = None

    @classmethod
    def find(cls, settings: Settings, notes: list[str], processes: PartialState) -> "Resumption | None":
        """What `settings` go on from, or None for a new run. Every process must call it.

        Args:
            settings: of the run, as `resumed_settings` gave them, with its `notes`.
            notes: see above.
            processes: that look for it together.

        Raises:
            InputError: all checkpoints are damaged, or config.json is.
        """
        read: list[TrainingState] = []  # on the main process

        def look() -> Resumption | None:
            state = load_training_state(settings.output_dir / "checkpoints") if settings.resumes else None
            if state is None:
                return None
            read.append(state)
            state.progress.resume()
            plan = read_plan(settings.output_dir / CONFIG)
            return cls(state.progress, state.scaler, state.of_processes, state.micro_batch_size, plan, notes)

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
        notes = list(self.notes)
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


def resumed_settings(settings: Settings, processes: PartialState) -> tuple[Settings, list[str]]:
    """The settings of a run, and what has changed in them since it began, in words. Every process must call it.

    What may change when a run is resumed, and is not given now, is as an earlier resumption left it.

    Raises:
        InputError: the run's config.json cannot be read.
    """

    def look() -> tuple[Settings, list[str]]:
        path = settings.output_dir / CONFIG
        if not settings.resumes or not path.exists():
            return settings, []
        saved, names = read_settings(path), sorted(MENDABLE - {"micro_batch_size"})  # the plan keeps that if it fits
        kept = {name: saved[name] for name in names if getattr(settings, name) is None and saved.get(name) is not None}
        notes = []
        for name in names:
            now, then = kept.get(name, getattr(settings, name)), saved.get(name, getattr(Settings, name))
            if now != then:
                before = "not given before" if then is None else f"before {then}"
                notes.append(f"resumed with --{name.replace('_', '-')} {now}, {before}")
        return replace(settings, **kept), notes

    return main_decides(look, processes)
