"""What ends a run, in words, and the flags to continue with."""

from direct_pt.data.loader import FeedFailed
from direct_pt.data.reader_processes import ReadersFailed
from direct_pt.distributed.peers import failed_peer
from direct_pt.recipes import Recipe
from direct_pt.training.micro_batch import is_out_of_memory
from direct_pt.training.plan import Plan, smaller_micro_batches

LOST_PEER_WORDS = ("gloo", "NCCL", "Connection", "c10d")  # in the messages of collectives that fail

ONE_VALUE = "Expected more than 1 value per channel"  # in PyTorch's message


def is_lost_peer(error: BaseException, plan: Plan) -> bool:
    """Whether an error says that another process is gone or stuck."""
    return plan.processes > 1 and any(word in str(error) for word in LOST_PEER_WORDS)


def explain_failure(error: BaseException, plan: Plan, source: str) -> tuple[str, str] | None:
    """What went wrong and the flags to continue with; None where the error is not one of those that are known.

    Args:
        error: that ended a step or an evaluation.
        plan: of the run.
        source: of the training data, for messages.
    """
    first_line = next(iter(str(error).splitlines()), "")
    if isinstance(error, ReadersFailed):
        return error.reason, f"--resume; {error.remedy}"
    if is_out_of_memory(error):
        smaller = smaller_micro_batches(plan)
        advice = f"--micro-batch-size {smaller[0]}, which keeps the global batch" if smaller else "a larger card"
        what = f"out of memory with {plan.micro_batch_size} images at once ({first_line})"
        return what, f"--resume and {advice}, or --gradient-checkpointing"
    if isinstance(error, FeedFailed):
        return f"{source} cannot be read any further ({first_line})", "--resume"
    if ONE_VALUE in str(error):
        what = f"BatchNorm saw one value of a channel, which has no variance ({first_line})"
        return what, "--resume and a larger --micro-batch-size; else start anew with --norm group"
    if is_lost_peer(error, plan):
        failed = failed_peer()
        gone = f"another of the {plan.processes} processes is gone or stuck ({first_line})"
        return (gone if failed is None else str(failed)), "--resume"
    return None


def divergence_advice(
    plan: Plan, recipe: Recipe, first_failed_step: int, lr: float, clip_grad_norm: float | None, uses_fp16: bool
) -> str:
    """Flags to resume a run with that has diverged.

    Args:
        plan: of the run.
        recipe: of its stage and detector; its rate for the run's batch is known to train.
        first_failed_step: from 1.
        lr: of that step.
        clip_grad_norm: of the run.
        uses_fp16: whether it computes in fp16.
    """
    in_warmup = first_failed_step <= plan.warmup_steps
    lower = min((lr if in_warmup else plan.lr) / 4, recipe.lr_for(plan.global_batch_size))
    advice = [f"a lower rate, such as --lr {lower:.2g}"]
    if in_warmup or plan.warmup_steps < recipe.warmup_steps:
        longer = max(recipe.warmup_steps, 2 * plan.warmup_steps if in_warmup else 0)
        advice.append(f"a longer warm-up, such as --warmup-steps {longer}")
    if clip_grad_norm is None:
        advice.append("--clip-grad-norm 10 where single batches are the cause")
    if uses_fp16:
        advice.append("--mixed-precision bf16")
    return ", or ".join(advice)
