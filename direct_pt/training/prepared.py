"""Model and optimizer as accelerate prepared them, whole or in DeepSpeed's shards: read out whole, and put back.

What is read out does not depend on the number of processes or on ZeRO's stage, so a run can go on with others.
"""

import copy
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from direct_pt.models.detector import Detector

# What an optimizer keeps for each parameter, of the parameter's shape; Adam counts its steps besides.
STATE = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


class Sharded:
    """A detector and its optimizer, prepared for however many processes there are.

    Attributes:
        model: to be called in training.
        detector: the same, unwrapped. Under ZeRO 3 its parameters are there only while a module computes.
        optimizer: whose `param_groups` may be changed.
    """

    def __init__(self, accelerator: Accelerator, detector: Detector, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        self.detector = detector
        self.zero_stage = 0
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.zero_stage = accelerator.state.deepspeed_plugin.zero_stage
        self._keys = STATE[type(optimizer)]
        self._copy = copy.deepcopy(detector).to(accelerator.device) if self.zero_stage == 3 else detector
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(detector, optimizer)
        if self.zero_stage:
            self._make_zero_states()

    def whole(self) -> Detector:
        """The detector with all its weights, on every process. Every process must call it."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.detector.parameters())):
                self._copy.load_state_dict(self.detector.state_dict())
        return self._copy

    def backward(self, loss: Tensor, all_finite: Tensor | None) -> None:
        """The gradients of a micro-batch's loss.

        Args:
            loss: of the micro-batch.
            all_finite: of the last micro-batch of a step, whether the losses of all of them were. DeepSpeed updates the
                weights in its backward pass, and leaves the step out where a gradient is not finite on any process.
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

    def leave_out(self) -> None:
        """Forget the gradient of a step that failed. fp16's loss scale stays as it is."""
        if self.accelerator.scaler is not None:  # which otherwise waits for the update that its gradients were for
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
        self.optimizer.zero_grad()

    def norm_after_update(self) -> float | None:
        """What DeepSpeed measured in its update."""
        if not self.zero_stage:
            return None
        norm = self.model.get_global_grad_norm()  # type: ignore[operator]  # of its engine
        return None if norm is None else float(norm)

    def update(self, clip_grad_norm: float | None, norm: Tensor | None, overflow: bool = False) -> bool:
        """One step of the optimizer; whether it was left out, as a gradient was not finite.

        What is left out while fp16 looks for its loss scale does not count.

        Args:
            clip_grad_norm: the most that the gradient may measure. DeepSpeed clips by itself.
            norm: what it measures, as `gradient_norm` told.
            overflow: whether that is not finite.
        """
        scaler = self.accelerator.scaler
        if overflow and scaler is not None:
            # Not left to the fused optimizer, which would set up its momentum from memory that nothing was written to.
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
                gathered = {f"{name}/{key}": value for key, value in self._gathered(parameter)}
                found |= gathered if self.accelerator.is_main_process else {}
            else:
                state = self.optimizer.optimizer.state.get(parameter, {})
                found |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def load_optimizer_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave, whatever it was spread over then. Every process must call it."""
        for state in self._zero_states() if self.zero_stage else ():
            if "step" in state:
                state["step"].fill_(max(int(value) for name, value in tensors.items() if name.endswith("/step")))
        for name, parameter in self.detector.named_parameters():
            state = {key: tensors[f"{name}/{key}"] for key in (*self._keys, "step") if f"{name}/{key}" in tensors}
            if self.zero_stage:
                for key in self._keys if state else ():
                    self._deal(parameter, key, state[key].to(self.accelerator.device))
            elif state:
                # In the parameter's own memory layout: fused optimizers walk through both in step.
                self.optimizer.optimizer.state[parameter] = {
                    key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.detector.parameters() if parameter.requires_grad]

    def _deal(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # By hand: DeepSpeed's own way fails where the shards are not all of the same size.
        processes = self.accelerator.num_processes
        shard = -(-value.numel() // processes)
        padded = nn.functional.pad(value.flatten(), (0, shard * processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.view(processes, shard)[self.accelerator.process_index], key)

    def _gathered(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for key in self._keys:
            yield key, safe_get_full_optimizer_state(parameter, key).cpu()  # all processes take part
        for state in self._zero_states():
            if "step" in state:
                yield "step", state["step"].cpu().clone()
                break

    def _make_zero_states(self) -> None:
        """What the first step would make for the shards of this process.

        DeepSpeed links that to the parameters once the first group of them has it, and not the others.
        """
        zero = self.optimizer.optimizer
        shards = zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups
        for shard in shards:
            state: dict[str, Tensor] = {key: torch.zeros_like(shard) for key in self._keys}
            if "exp_avg" in state:
                state["step"] = torch.zeros((), device=shard.device)
            zero.optimizer.state[shard] = state
        if self.zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _zero_states(self) -> list[dict[str, Tensor]]:
        return list(self.optimizer.optimizer.optimizer.state.values())
