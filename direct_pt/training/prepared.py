"""Model and optimizer as accelerate prepared them, whole or in DeepSpeed's shards: gathered whole, and scattered again.

What is gathered does not depend on the number of processes or on ZeRO's stage, so a run can resume with others.
"""

import copy
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from direct_pt.models.detector import Detector

# The tensors of the parameter's shape that an optimizer keeps for each; AdamW counts its steps besides.
STATE_NAMES = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


class PreparedModel:
    """A detector and its optimizer, prepared for one process or several.

    Attributes:
        model: the module to call in training.
        detector: the same, unwrapped. Under ZeRO 3 its parameters exist only while a module computes.
        optimizer: its `param_groups` may be changed.
    """

    def __init__(self, accelerator: Accelerator, detector: Detector, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        self.detector = detector
        self.zero_stage = 0
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.zero_stage = accelerator.state.deepspeed_plugin.zero_stage
        self._state_names = STATE_NAMES[type(optimizer)]
        self._full_detector = copy.deepcopy(detector).to(accelerator.device) if self.zero_stage == 3 else detector
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(detector, optimizer)
        if self.zero_stage:
            self._create_zero_states()

    def full_detector(self) -> Detector:
        """The detector with all its weights, on every process. Every process must call it."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.detector.parameters())):
                self._full_detector.load_state_dict(self.detector.state_dict())
        return self._full_detector

    def backward(self, loss: Tensor, all_finite: Tensor | None) -> None:
        """The gradients of a micro-batch's loss.

        Args:
            loss: of the micro-batch.
            all_finite: with the last micro-batch of a step, whether the losses of all its micro-batches are finite.
                DeepSpeed skips the update where a gradient is not finite on any process: one is made NaN then.
        """
        if self.zero_stage and all_finite is not None:
            loss = loss * torch.where(all_finite, 1.0, math.nan)
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor | None:
        """Of a step's whole gradient, on all processes alike, without fp16's loss scale, and infinite or NaN where that
        is too large. Under DeepSpeed None: see `norm_after_update`."""
        if self.zero_stage:
            return None
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None])

    def discard_gradients(self) -> None:
        """Forget the gradients of a step that failed. fp16's loss scale stays as it is."""
        if self.accelerator.scaler is not None:  # it has unscaled them, and otherwise waits for their update
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
        self.optimizer.zero_grad()

    def norm_after_update(self) -> float | None:
        """The gradient norm that DeepSpeed measured in its update."""
        if not self.zero_stage:
            return None
        norm = self.model.get_global_grad_norm()  # type: ignore[operator]  # of its engine
        return None if norm is None else float(norm)

    def update(self, clip_grad_norm: float | None, norm: Tensor | None, overflow: bool = False) -> bool:
        """One step of the optimizer. Returns whether it was skipped, as a gradient was not finite.

        Steps that are skipped while fp16 looks for its loss scale do not count.

        Args:
            clip_grad_norm: maximum norm of the gradient. DeepSpeed clips by itself.
            norm: of the gradient, from `gradient_norm`.
            overflow: whether that is not finite.
        """
        scaler = self.accelerator.scaler
        if overflow and scaler is not None:
            # Not left to the fused optimizer: it would set up its momentum from uninitialised memory.
            before = scaler.get_scale()
            scaler.update()
            self.optimizer.zero_grad()
            return scaler.get_scale() < 1 or scaler.get_scale() >= before
        if clip_grad_norm is not None and norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained(), clip_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bool(self.zero_stage) and self.optimizer.step_was_skipped

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state by "parameter name/entry", on the main process. Every process must call it."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.detector.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.zero_stage:
                gathered = {f"{name}/{key}": value for key, value in self._gather(parameter)}
                found |= gathered if self.accelerator.is_main_process else {}
            else:
                state = self.optimizer.optimizer.state.get(parameter, {})
                found |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def trained_names(self) -> tuple[list[str], tuple[str, ...]]:
        """The names of the parameters that train, and of what the optimizer keeps for each."""
        return [name for name, p in self.detector.named_parameters() if p.requires_grad], self._state_names

    def load_optimizer_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `optimizer_state` returned, however it was sharded then. Every process must call it."""
        for state in self._zero_states() if self.zero_stage else ():
            if "step" in state:
                state["step"].fill_(max(int(value) for name, value in tensors.items() if name.endswith("/step")))
        for name, parameter in self.detector.named_parameters():
            state = {
                key: tensors[f"{name}/{key}"] for key in (*self._state_names, "step") if f"{name}/{key}" in tensors
            }
            if self.zero_stage:
                for key in self._state_names if state else ():
                    self._scatter(parameter, key, state[key].to(self.accelerator.device))
            elif state:
                # In the parameter's own memory layout: fused optimizers walk through both in step.
                self.optimizer.optimizer.state[parameter] = {
                    key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.detector.parameters() if parameter.requires_grad]

    def _scatter(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # By hand: DeepSpeed's own function fails where the shards differ in size.
        processes = self.accelerator.num_processes
        shard = -(-value.numel() // processes)
        padded = nn.functional.pad(value.flatten(), (0, shard * processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.view(processes, shard)[self.accelerator.process_index], key)

    def _gather(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for key in self._state_names:
            yield key, safe_get_full_optimizer_state(parameter, key).cpu()  # all processes take part
        for state in self._zero_states():
            if "step" in state:
                yield "step", state["step"].cpu().clone()
                break

    def _create_zero_states(self) -> None:
        """Create the optimizer state of this process's shards, as the first step would.

        DeepSpeed links state to parameters once, when the first group of them has some: the others would have none.
        """
        zero = self.optimizer.optimizer
        shards = zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups
        for shard in shards:
            state: dict[str, Tensor] = {key: torch.zeros_like(shard) for key in self._state_names}
            if "exp_avg" in state:
                state["step"] = torch.zeros((), device=shard.device)
            zero.optimizer.state[shard] = state
        if self.zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _zero_states(self) -> list[dict[str, Tensor]]:
        return list(self.optimizer.optimizer.optimizer.state.values())
