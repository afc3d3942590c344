"""Names that other trainers give to the settings of `TrainConfig`.

Someone who comes with a configuration of axolotl, LLaMA-Factory, TRL, torchtune, litgpt, mlx-lm or
unsloth should not have to rename it. A key that has no counterpart here gets a hint where one
sentence can help, and is an error either way: a setting is never ignored.
"""

_BY_FIELD: dict[str, tuple[str, ...]] = {
    "model": (
        "base_model",
        "base_model_name_or_path",
        "model_id",
        "model_name",
        "model_name_or_path",
        "model_path",
    ),
    "revision": ("model_revision", "revision_of_model"),
    "data": (
        "data_dir",
        "data_path",
        "dataset",
        "dataset_path",
        "train_data",
        "train_dataset",
        "train_file",
        "training_data",
    ),
    "eval_data": ("eval_dataset", "eval_file", "val_data", "valid_data", "validation_data"),
    "heldout": (
        "heldout_fraction",
        "test_size",
        "val_set_size",
        "val_size",
        "validation_split",
        "validation_split_ratio",
    ),
    "limit_rows": ("max_samples", "max_train_samples", "limit"),
    "system_prompt": ("default_system", "system", "default_system_message"),
    "output_dir": ("out_dir", "output", "output_path", "save_dir"),
    "run_id": ("run_name", "session_id"),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    "overwrite": ("force_restart", "overwrite_output_dir"),
    "checkpoint_every": ("save_every", "save_interval", "save_steps", "steps_per_save"),
    "keep_checkpoints": ("keep_last", "keep_last_k", "save_total_limit"),
    "eval_every": ("eval_interval", "eval_steps", "steps_per_eval"),
    "report_to": ("log_with", "logger", "trackers"),
    "plot": ("plot_loss",),
    "log_every": ("log_interval", "logging_steps", "steps_per_report"),
    "method": ("adapter", "backend", "fine_tune_type", "finetuning_type", "train_type"),
    "lora_rank": ("lora_r", "r", "rank"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "use_rslora": ("peft_use_rslora", "rslora"),
    "use_dora": ("dora", "peft_use_dora"),
    "target_modules": ("lora_target", "lora_target_modules", "targets"),
    "init_adapter": (
        "adapter_name_or_path",
        "checkpoint_lora",
        "lora_model_dir",
        "resume_adapter_file",
    ),
    "double_quant": ("bnb_4bit_use_double_quant", "double_quantization", "use_double_quant"),
    "learning_rate": ("lr",),
    "lr_schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "warmup_ratio": ("warmup_fraction",),
    "warmup_steps": ("lr_warmup_steps", "num_warmup_steps", "warmup"),
    "weight_decay": ("wd",),
    "betas": ("adam_betas",),
    "eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "max_grad_norm": (
        "clip_grad_norm",
        "grad_clip",
        "gradient_clip_val",
        "gradient_clipping",
        "max_norm",
    ),
    "optimizer": ("optim",),
    "optimizer_in_backward": ("optimizer_in_bwd",),
    "epochs": ("max_epochs", "n_epochs", "num_epochs", "num_train_epochs"),
    "max_steps": ("iters", "max_iters", "max_steps_per_run", "steps", "total_steps"),
    "batch_size": (
        "micro_batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_batch_size",
    ),
    "accumulate": (
        "accumulation_steps",
        "grad_accum",
        "grad_accumulation_steps",
        "gradient_accumulation",
        "gradient_accumulation_steps",
    ),
    "max_length": (
        "context_length",
        "cutoff_len",
        "max_seq_len",
        "max_seq_length",
        "model_max_length",
        "seq_len",
        "seq_length",
        "sequence_len",
        "sequence_length",
    ),
    "packing": ("pack", "packed", "sample_packing"),
    "gradient_checkpointing": (
        "activation_checkpointing",
        "grad_checkpoint",
        "use_gradient_checkpointing",
    ),
    "dtype": ("compute_dtype", "precision", "torch_dtype"),
    "seed": ("random_seed", "random_state"),
    "threads": ("num_threads", "torch_threads"),
}

ALIASES: dict[str, str] = {
    alias: field for field, aliases in _BY_FIELD.items() for alias in aliases
}

HINTS: dict[str, str] = {
    "bf16": "write `dtype: bfloat16`",
    "fp16": "write `dtype: float16`",
    "chat_template": "the template comes from the model's own tokenizer files",
    "datasets": "write `data:` with one path or a list of paths",
    "flash_attention": "attention never crosses rows and needs no switch",
    "group_by_length": "rows are never padded, so there is nothing to gain from it",
    "load_in_4bit": "write `method: qlora`",
    "load_in_8bit": "write `method: qlora`; 8-bit bases cannot be trained on",
    "pad_to_sequence_len": "rows are never padded",
    "qlora": "write `method: qlora`",
    "train_on_inputs": "only the assistant's turns are trained on",
    "trust_remote_code": "code from a model's folder is never run",
    "warmup_epochs": "write `warmup_steps:` or `warmup_ratio:`",
}

# Headings under which other programs nest their keys; `lora: {rank: 8}` is `lora_rank: 8`.
GROUPS = frozenset(
    {
        "adapter",
        "checkpoint",
        "data",
        "dataset",
        "eval",
        "finetune",
        "logging",
        "lora",
        "model",
        "optim",
        "optimizer",
        "run",
        "schedule",
        "train",
        "training",
    }
)
