"""Which settings of a run cannot be had together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config.train_config import TrainConfig


def check_together(config: TrainConfig) -> None:
    """Raises `ValueError` where two settings contradict each other."""
    if config.warmup_ratio is not None and config.warmup_steps is not None:
        raise ValueError("set warmup_ratio or warmup_steps, not both")
    if config.eval_data and config.heldout:
        raise ValueError("set eval_data or heldout, not both: one names the held-out rows")
    if config.teacher is not None and config.method == "full":
        raise ValueError("teacher needs a frozen head: method lora or qlora, and it is full")
    if config.teacher is not None and config.memory_budget is not None:
        raise ValueError("memory_budget does not know what a teacher takes: set one of them")
    if config.method == "full" and config.init_adapter is not None:
        raise ValueError("init_adapter needs method lora or qlora, and method is full")
    if config.method == "full" and config.use_dora:
        raise ValueError("use_dora needs method lora or qlora, and method is full")
    frozen = config.head_precision == "8bit" or config.embedding_on == "host"
    if config.method == "full" and frozen:
        raise ValueError(
            "head_precision 8bit and embedding_on host are for a frozen head and embedding, "
            "and method full trains them"
        )
    if config.optimizer_in_backward:
        _check_in_backward(config)
    if "weights" in config.offload and (config.method != "qlora" or config.use_dora):
        raise ValueError("offload weights streams NF4 weights: for method qlora, no use_dora")
    if config.cuda_graphs:
        _check_graphs(config)
    if config.resume == "auto" and config.output_dir is None and config.run_id is None:
        raise ValueError("resume auto needs output_dir or run_id, to know which run goes on")
    if config.resume is not None and config.overwrite:
        raise ValueError("resume goes on with a run and overwrite replaces it: set one of them")


def _check_graphs(config: TrainConfig) -> None:
    """Raises `ValueError` for settings that recorded launches cannot be used with."""
    if config.method == "full":
        raise ValueError(
            "cuda_graphs keeps the gradients of the layers at fixed addresses all the time, "
            "which only an adapter's are small enough for: method lora or qlora, not full"
        )
    lent = [f"offload {what}" for what in config.offload]
    if config.memory_budget is not None:
        lent.append("memory_budget")
    if lent:
        raise ValueError(
            f"cuda_graphs was given with {' and '.join(lent)}. Recorded launches hold memory "
            "of their own, at addresses that stay: leave out one or the other"
        )


def _check_in_backward(config: TrainConfig) -> None:
    """Raises `ValueError` where the optimizer cannot step in backward."""
    if config.method != "full":
        raise ValueError(
            f"optimizer_in_backward is for method full, and it is {config.method}: an adapter's "
            "gradients are too small to be worth it. Leave it out, or train with --method full"
        )
    if config.max_grad_norm > 0 or config.accumulate > 1:
        raise ValueError(
            f"optimizer_in_backward was given with max_grad_norm {config.max_grad_norm:g} and "
            f"accumulate {config.accumulate}. It moves a layer before the gradients of the "
            "others are there, so it can neither clip by the norm of all of them nor add them "
            "up over micro-batches. Give --max-grad-norm 0 --accumulate 1, or leave it out"
        )
    if config.dtype == "float16":
        raise ValueError(
            "optimizer_in_backward was given with dtype float16, whose gradients need a loss "
            "scale: a step that overflows is done again at a lower one, and part of the "
            "weights would have moved by then. Give --dtype bfloat16 or float32, or leave it "
            "out"
        )
