"""axolotl's YAML files."""

from pathlib import Path
from typing import Any

from engine.config.programs.hugging_face import MISSING, best_checkpoint
from engine.config.programs.schedules import schedule
from engine.config.programs.translation import (
    KERNELS,
    NEVER_PADDED,
    NO_HEAD,
    NO_PREFERENCES,
    NOT_EIGHT_BITS,
    NOTHING_UPLOADED,
    OPTIMIZERS,
    PROCESSES,
    SAME_VOCABULARY,
    GivenKeys,
    Translation,
    checkpointing,
    compute_type,
    heldout,
    preferences,
    stands,
)

_SAME = {
    "base_model": "model",
    "revision_of_model": "revision",
    "lora_model_dir": "init_adapter",
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "ddp_timeout": "ddp_timeout",
    "context_parallel_size": "context_parallel",
    "sequence_parallel_degree": "context_parallel",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_ratio",
    "adam_epsilon": "eps",
    "max_grad_norm": "max_grad_norm",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "peft_layers_to_transform": "layers",
    "cosine_min_lr_ratio": "min_lr_ratio",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "gradient_clipping": "max_grad_norm",
    "max_steps": "max_steps",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "eval_every",
    "logging_steps": "log_every",
    "output_dir": "output_dir",
    "seed": "seed",
    "default_system_message": "system_prompt",
    "chat_template_kwargs": "chat_template_kwargs",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "private",
}
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "micro_batch_size": ("batch_size", 1),
    "gradient_accumulation_steps": ("accumulate", 1),
    "weight_decay": ("weight_decay", 0.0),
}
_NEEDLESS = {
    KERNELS: (
        "flash_attention", "sdp_attention", "xformers_attention", "eager_attention",
        "flex_attention", "attn_implementation", "s2_attention", "plugins", "lora_mlp_kernel",
        "lora_qkv_kernel",
        "lora_o_kernel", "unsloth_cross_entropy_loss", "cut_cross_entropy", "torch_compile",
        "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu",
        "liger_layer_norm", "liger_fused_linear_cross_entropy", "flash_attn_cross_entropy",
    ),
    NEVER_PADDED: (
        "pad_to_sequence_len", "group_by_length", "eval_sample_packing", "sample_packing_eff_est",
        "pad_to_multiple_of", "sample_packing_sequentially",
    ),
    "the classes of model and tokenizer follow from their files": (
        "model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model",
        "is_qwen_derived_model", "tokenizer_use_fast", "tokenizer_legacy", "processor_type",
        "trust_remote_code", "base_model_config", "tokenizer_config", "base_model_ignore_patterns",
    ),
    "rows are tokenised before the first step": (
        "dataset_prepared_path", "dataset_processes", "dataloader_num_workers", "strict", "debug",
        "dataloader_pin_memory", "dataloader_prefetch_factor", "shuffle_merged_datasets",
        "data_processes", "dataset_exact_deduplication",
    ),
    "evaluation chooses its batches and generates nothing": (
        "eval_batch_size", "eval_table_size", "eval_max_new_tokens", "do_eval",
        "do_causal_lm_eval",
    ),
    "a checkpointed layer is computed by this engine's own code": (
        "gradient_checkpointing_kwargs",
    ),
    "products of fp32 are exact here": ("tf32", "bfloat16", "float16"),
    PROCESSES: (
        "local_rank", "ddp_find_unused_parameters", "device_map", "world_size",
    ),
    "what happens here anyway": (
        "save_safetensors", "low_cpu_mem_usage", "lora_on_cpu", "logging_first_step",
        "include_tokens_per_second", "save_only_model", "save_strategy", "eval_strategy",
        "evaluation_strategy", "wandb_watch", "wandb_log_model", "wandb_mode", "wandb_run_id",
        "lora_fan_in_fan_out", "use_wandb", "auto_resume_from_checkpoints",
        "mlflow_experiment_name",
    ),
}  # fmt: skip
_MISSING = {
    **MISSING,
    "train_on_inputs": "only the assistant's turns are trained",
    "lora_modules_to_save": NO_HEAD,
    "lora_target_parameters": "adapters go by the names of projections",
    "peft_init_lora_weights": "adapters start at zero",
    "relora_steps": "ReLoRA is not implemented",
    "unfrozen_parameters": "all weights are trained, or an adapter",
    "tokens": SAME_VOCABULARY,
    "added_tokens_overrides": SAME_VOCABULARY,
    "resize_token_embeddings_to_32x": SAME_VOCABULARY,
    "fsdp_version": PROCESSES,
    "hub_strategy": NOTHING_UPLOADED,
    "push_dataset_to_hub": NOTHING_UPLOADED,
    "saves_per_epoch": "`checkpoint_every` counts steps, not parts of an epoch",
    "evals_per_epoch": "`eval_every` counts steps, not parts of an epoch",
    "cosine_constant_lr_ratio": "the learning rate falls from the warm-up on",
    "reward_model": NO_PREFERENCES,
    "pretraining_dataset": "raw text is not trained",
    "batch_size": "a step has `batch_size` x `accumulate` rows: set `accumulate`",
    "overrides_of_model_config": "the configuration is the model's own",
    "rope_scaling": "rotary parameters come from config.json",
    "loss_watchdog_threshold": "a run stops where the loss is not finite: `nonfinite`",
    "loss_watchdog_patience": "a run stops where the loss is not finite: `nonfinite`",
    "use_otel_metrics": "figures are in metrics.jsonl, and where `report_to` says",
    "use_mlflow": "figures are in metrics.jsonl, and where `report_to` says",
    "max_memory": "one limit for the device: `memory_budget`",
}
_SHAPES = ("alpaca", "chat_template", "sharegpt", "input_output", "context_qa", "gpteacher")


_PREFERENCES = {
    "rl_beta": "beta",
    "orpo_alpha": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "simpo_gamma",
    "rpo_alpha": "nll_weight",
    "cpo_alpha": "nll_weight",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
}


def translate(given: dict[str, Any], folder: Path) -> Translation:
    """The settings of one file, whose relative paths are those of `folder`."""
    source = GivenKeys("axolotl", given)
    _method(source)
    source.copy(_SAME)
    source.copy_or_default(_DEFAULTS)
    source.default("max_length", 512)
    source.whole("num_epochs", "epochs", 1.0)
    source.choose("optimizer", "optimizer", OPTIMIZERS, "adamw_torch_fused")
    schedule(source, "lr_scheduler", "cosine")
    _optimizer_arguments(source)
    checkpointing(source)
    compute_type(source)
    heldout(source, "val_set_size")
    for key, setting in (("datasets", "data"), ("test_datasets", "eval_data")):
        entries = source.several(key)
        if entries:
            source.put(setting, [_path_of(source, key, entry) for entry in entries], key)
    _special_tokens(source)
    template = source.take("chat_template", "tokenizer_default")
    if template != "tokenizer_default":
        source.miss("chat_template", f"the model's own template is used, and not {template!r}")
    source.drop(("chat_template_jinja",), "the template comes from the model's own files")
    if source.take("wandb_project"):
        source.put("report_to", ["wandb"], "wandb_project")
    source.drop(("wandb_entity", "wandb_name", "wandb_run"), "wandb reads its own variables")
    if source.take("use_tensorboard"):
        source.put("report_to", ["tensorboard"], "use_tensorboard")
    best_checkpoint(source)
    asked = source.take("rl")
    if asked:
        preferences(source, "rl", asked, _PREFERENCES)
    source.drop_by_reason(_NEEDLESS)
    source.miss_if_asked(_MISSING)
    return source.finish()


def _method(source: GivenKeys) -> None:
    adapter, four = source.take("adapter"), source.take("load_in_4bit", False)
    eight = source.take("load_in_8bit", False)
    source.drop(("qlora_sharded_model_loading",), PROCESSES)
    if adapter in (None, ""):
        source.put("method", "full", "adapter")
        return
    if adapter not in ("lora", "qlora"):
        source.miss("adapter", f"there is no adapter {adapter!r}; lora was taken")
    if eight:
        source.miss("load_in_8bit", NOT_EIGHT_BITS)
    source.put("method", "qlora" if adapter == "qlora" or four else "lora", "adapter")
    source.copy_or_default({"lora_r": ("lora_rank", 8)})
    targets, linear = source.take("lora_target_modules"), source.take("lora_target_linear")
    if linear or targets == "all-linear":
        source.put("target_modules", "all", "lora_target_linear")
    elif targets:
        source.put("target_modules", targets, "lora_target_modules")
    else:
        source.put("target_modules", "qv", "PEFT's default")


def _special_tokens(source: GivenKeys) -> None:
    """A padding token needs nothing; another may end a turn."""
    given = source.table("special_tokens")
    if given.pop("pad_token", None) is not None:
        source.result.needless["special_tokens: pad_token"] = NEVER_PADDED
    if given:
        source.miss("special_tokens", "special tokens come from the model's own files")


def _optimizer_arguments(source: GivenKeys) -> None:
    """Betas and epsilon, alone or in `optim_args`, a mapping or `a=1,b=2`."""
    text = source.left.get("optim_args")
    if isinstance(text, str) and "=" in text:
        pairs = (part.partition("=") for part in text.split(",") if "=" in part)
        source.left["optim_args"] = {name.strip(): value for name, _, value in pairs}
    given = source.table("optim_args")
    first = source.number("adam_beta1", given.pop("adam_beta1", given.pop("beta1", 0.9)))
    second = source.number("adam_beta2", given.pop("adam_beta2", given.pop("beta2", 0.999)))
    if None not in (first, second) and (first, second) != (0.9, 0.999):
        source.put("betas", [first, second], "adam_beta1, adam_beta2")
    epsilon = source.as_number("optim_args", given.pop("adam_epsilon", given.pop("eps", None)))
    if epsilon is not None:
        source.put("eps", epsilon, "optim_args")
    if given:
        source.miss("optim_args", f"the optimizer has no {', '.join(map(str, given))}")


def _path_of(source: GivenKeys, key: str, entry: Any) -> str:
    """The file of one data set; what its entry says beyond that is checked."""
    entry = dict(entry) if isinstance(entry, dict) else {"path": entry}
    path = str(entry.get("path", ""))
    files = entry.get("data_files")
    name = f"{key}: {path}"
    if files and not path.endswith((".json", ".jsonl")):
        listed = files if isinstance(files, list) else [files]
        first = str(listed[0])
        path = first if path in ("json", "") else str(Path(path) / first)
        if len(listed) > 1:
            source.miss(name, f"only the first of its {len(listed)} files was taken: list them all")
    elif not path.endswith((".json", ".jsonl")) and not stands(path):
        source.miss(name, "a data set of the hub: save its rows as JSONL, and name that file")
    kind = entry.get("type")
    if isinstance(kind, dict):
        fields = {f: value for f, value in kind.items() if str(f).startswith("field_") and value}
        source.miss(name, f"its keys are named in the file ({fields}): rename them in the rows")
    elif kind is not None and not str(kind).split(".")[0].startswith(_SHAPES):
        source.miss(name, f"type {kind!r}: rows are read by their keys (engine data preview)")
    for option in ("roles_to_train", "train_on_eos", "shards", "message_field_training"):
        if entry.get(option) not in (None, ["assistant"], "turn", 1):
            source.miss(f"{name}: {option}", "every assistant turn is trained, with its end")
    return path
