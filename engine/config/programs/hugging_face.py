"""GivenKeys of transformers' TrainingArguments, which LLaMA-Factory and TRL share."""

from engine.config.programs.schedules import schedule
from engine.config.programs.translation import (
    KERNELS,
    NEVER_PADDED,
    OPTIMIZERS,
    PROCESSES,
    GivenKeys,
    checkpointing,
    compute_type,
)

_SAME = {
    "output_dir": "output_dir",
    "seed": "seed",
    "save_total_limit": "keep_checkpoints",
    "logging_steps": "log_every",
    "max_steps": "max_steps",
    "adam_epsilon": "eps",
    "overwrite_output_dir": "overwrite",
    "run_name": "run_id",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "label_smoothing_factor": "label_smoothing_factor",
    "ddp_timeout": "ddp_timeout",
}
_DEFAULTS = {
    "per_device_train_batch_size": ("batch_size", 8),
    "gradient_accumulation_steps": ("accumulate", 1),
    "learning_rate": ("learning_rate", 5e-5),
    "weight_decay": ("weight_decay", 0.0),
    "max_grad_norm": ("max_grad_norm", 1.0),
}
_NEEDLESS = {
    "rows are tokenised before the first step": (
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "preprocessing_num_workers",
        "dataset_num_proc",
        "overwrite_cache",
    ),
    "evaluation chooses its batches; its result does not depend on them": (
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
    ),
    PROCESSES: ("ddp_find_unused_parameters", "local_rank"),
    "a run always trains, and evaluates what is held out": ("do_train", "do_eval"),
    "weights are always saved without the optimizer's state beside the checkpoints": (
        "save_only_model",
        "save_safetensors",
    ),
    "what happens here anyway": ("logging_first_step", "logging_dir", "disable_tqdm"),
    KERNELS: ("use_liger_kernel", "enable_liger_kernel", "attn_implementation", "flash_attn"),
    NEVER_PADDED: ("group_by_length", "pad_to_multiple_of"),
    "unused keys of a row are reported": ("remove_unused_columns",),
    "code from a model's folder is never run": ("trust_remote_code",),
    "products of fp32 are exact here": ("tf32",),
    "a checkpointed layer is computed by this engine's own code": (
        "gradient_checkpointing_kwargs",
    ),
}
MISSING = {
    "deepspeed": PROCESSES,
    "fsdp": PROCESSES,
    "fsdp_config": PROCESSES,
    "optim_args": "the optimizer has `betas`, `eps` and `weight_decay`",
    "resume_from_checkpoint": "`engine train --resume auto` goes on with a run of this engine",
}


def training_arguments(source: GivenKeys) -> None:
    """Take every key of TrainingArguments that is there, and its defaults where it is not."""
    source.copy(_SAME)
    source.copy_or_default(_DEFAULTS)
    source.whole("num_train_epochs", "epochs", 3.0)
    source.choose("optim", "optimizer", OPTIMIZERS, "adamw_torch")
    schedule(source, "lr_scheduler_type", "linear")
    _warmup(source)
    betas = (source.take("adam_beta1", 0.9), source.take("adam_beta2", 0.999))
    if betas != (0.9, 0.999):
        source.put("betas", list(betas), "adam_beta1, adam_beta2")
    checkpointing(source)
    compute_type(source)
    _strategy(source, "save_strategy", "save_steps", "checkpoint_every")
    _strategy(source, "eval_strategy", "eval_steps", "eval_every", "evaluation_strategy")
    best_checkpoint(source)
    _trackers(source)
    _upload(source)
    source.drop_by_reason(_NEEDLESS)
    source.miss_if_asked(MISSING)


def best_checkpoint(source: GivenKeys) -> None:
    """`load_best_model_at_end` with its metric, the start's evaluation, and early stopping."""
    metric, greater = source.take("metric_for_best_model"), source.take("greater_is_better")
    if source.take("load_best_model_at_end"):
        source.put("load_best_at_end", True, "load_best_model_at_end")
    elif source.left.get("early_stopping_patience") is None:
        metric = None
    patience, least = (source.number(f"early_stopping_{key}") for key in ("patience", "threshold"))
    if patience:
        text = f"{int(patience)},{least or 0:g}"
        source.put("early_stopping", text, "early_stopping_patience")
    if metric in ("loss", "eval_loss"):
        source.put("save_best", "eval_loss", "metric_for_best_model")
    elif metric is not None:
        source.miss("metric_for_best_model", f"evaluations here have no {metric!r}: eval_loss")
    if greater is not None:
        source.result.needless["greater_is_better"] = "a loss is to be low"
    source.copy({"eval_on_start": "eval_at_start"})


def _warmup(source: GivenKeys) -> None:
    ratio, steps, key = source.number("warmup_ratio"), source.number("warmup_steps"), "warmup_ratio"
    if steps is not None and 0 < steps < 1:
        ratio, steps, key = steps, None, "warmup_steps"
    if steps:
        source.put("warmup_steps", int(steps), "warmup_steps")
    elif ratio:
        source.put("warmup_ratio", ratio, key)
    else:
        source.default("warmup_steps", 0)


def _strategy(source: GivenKeys, key: str, steps_key: str, setting: str, earlier: str = "") -> None:
    """`save_strategy` and the like: never, after epochs, or after so many steps."""
    strategy, steps = source.take(key), source.number(steps_key)
    if earlier and strategy is None:
        strategy = source.take(earlier)
    if strategy in ("no", False):
        return
    if strategy == "epoch":
        source.miss(key, f"`{setting}` counts steps, not epochs")
    elif steps is not None and steps >= 1:
        source.put(setting, int(steps), steps_key)
    elif steps is not None:
        source.miss(steps_key, f"`{setting}` counts steps, not a share of the run")


def _upload(source: GivenKeys) -> None:
    """Names of a repository count only where they are asked for."""
    if not source.left.get("push_to_hub"):
        keys = ("push_to_hub", "hub_model_id", "hub_private_repo")
        source.drop(keys, "it asks for nothing: push_to_hub is not set")
        return
    source.take("push_to_hub")
    name, private = source.take("hub_model_id"), source.take("hub_private_repo")
    if not name:
        source.miss("push_to_hub", "`push_to_hub` names the repository here: organisation/name")
        return
    source.put("push_to_hub", name, "hub_model_id")
    if private:
        source.put("private", True, "hub_private_repo")


def _trackers(source: GivenKeys) -> None:
    names = [str(name) for name in source.several("report_to")]
    known = [name for name in names if name in ("tensorboard", "wandb")]
    if known:
        source.put("report_to", known, "report_to")
    others = [name for name in names if name not in ("tensorboard", "wandb", "none", "all")]
    if others:
        source.miss("report_to", f"there is no tracker {', '.join(others)}")
