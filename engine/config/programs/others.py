"""TRL's and mlx-lm's YAML files."""

from pathlib import Path
from typing import Any

from engine.config.programs.hugging_face import training_arguments
from engine.config.programs.translation import (
    ADAMW,
    KERNELS,
    NEVER_PADDED,
    NO_HEAD,
    NO_PREFERENCES,
    NOT_EIGHT_BITS,
    GivenKeys,
    Translation,
    checkpointing,
    stands,
)


def translate_trl(given: dict[str, Any], folder: Path) -> Translation:
    """A file of `trl sft --config`, whose relative paths are those of `folder`."""
    source = GivenKeys("TRL", given)
    source.copy({"model_name_or_path": "model", "model_revision": "revision"})
    _trl_adapter(source)
    name = source.take("dataset_name")
    if name is not None:
        source.put("data", [str(name)], "dataset_name")
        if not stands(str(name)):
            source.miss("dataset_name", "save its rows as JSONL, and name that file")
    source.copy({"max_seq_length": "max_length", "packing": "packing"})
    source.copy_or_default(
        {"max_length": ("max_length", 1024), "learning_rate": ("learning_rate", 2e-5)}
    )
    training_arguments(source)
    source.drop(("dtype", "torch_dtype", "bnb_4bit_quant_type"), "the compute type is `dtype`")
    source.drop(("packing_strategy", "padding_free", "eval_packing"), NEVER_PADDED)
    source.drop(("use_liger", "attn_implementation"), KERNELS)
    source.drop(("assistant_only_loss", "completion_only_loss"), "only answers are trained")
    source.drop(("dataset_text_field", "dataset_kwargs"), "rows are read by their keys")
    source.miss_if_asked(
        {
            "dataset_config": "name a file of rows",
            "dataset_train_split": "name a file of rows",
            "dataset_test_split": "name a file of held-out rows: `eval_data`",
            "lora_modules_to_save": NO_HEAD,
            "chat_template_path": "the template comes from the model's own files",
            "eos_token": "special tokens come from the model's own files",
        }
    )
    return source.finish()


def _trl_adapter(source: GivenKeys) -> None:
    if not source.take("use_peft", False):
        source.put("method", "full", "use_peft")
        return
    four, eight = source.take("load_in_4bit", False), source.take("load_in_8bit", False)
    if eight:
        source.miss("load_in_8bit", NOT_EIGHT_BITS)
    source.put("method", "qlora" if four else "lora", "use_peft, load_in_4bit")
    source.put("double_quant", bool(source.take("use_bnb_nested_quant", False)), "double quant")
    source.copy_or_default(
        {
            "lora_r": ("lora_rank", 16),
            "lora_alpha": ("lora_alpha", 32),
            "lora_dropout": ("lora_dropout", 0.05),
            "lora_target_modules": ("target_modules", "qv"),
        }
    )
    source.copy({"use_rslora": "use_rslora", "use_dora": "use_dora"})


def translate_mlx(given: dict[str, Any], folder: Path) -> Translation:
    """A file of `mlx_lm.lora --config`, whose relative paths are those of `folder`."""
    source = GivenKeys("mlx-lm", given)
    source.copy(
        {
            "model": "model",
            "batch_size": "batch_size",
            "iters": "max_steps",
            "learning_rate": "learning_rate",
            "steps_per_report": "log_every",
            "steps_per_eval": "eval_every",
            "save_every": "checkpoint_every",
            "max_seq_length": "max_length",
            "adapter_path": "output_dir",
            "seed": "seed",
            "grad_accumulation_steps": "accumulate",
        }
    )
    for setting, value in (("max_steps", 1000), ("learning_rate", 1e-5), ("seed", 0)):
        source.default(setting, value)
    source.default("warmup_steps", 0)
    source.default("lr_schedule", "constant")
    kind = source.take("fine_tune_type", "lora")
    source.put("method", "full" if kind == "full" else "lora", "fine_tune_type")
    if kind == "dora":
        source.put("use_dora", True, "fine_tune_type")
    elif kind == "lora":
        source.miss("model", "a model quantised by MLX is not read; with `method: qlora` a 16-bit "
                    "one is quantised to NF4")  # fmt: skip
    if kind != "full":
        _mlx_adapter(source)
    checkpointing(source, "grad_checkpoint")
    source.choose("optimizer", "optimizer", ADAMW, "adam")
    data = folder / str(source.take("data", "data"))
    source.put("data", [str(data / "train.jsonl")], "data")
    if stands(data / "valid.jsonl"):
        source.put("eval_data", [str(data / "valid.jsonl")], "data")
    source.drop(("train", "test", "val_batches", "test_batches"), "all held-out rows are evaluated")
    mode = source.take("training_mode", "normal")
    if mode not in ("normal", "sft"):
        source.miss("training_mode", f"{mode!r}: {NO_PREFERENCES}")
    source.drop(("mask_prompt",), "only the answer is trained")
    source.miss_if_asked(
        {
            "lr_schedule": "its names are MLX's; the rate is constant",
            "resume_adapter_file": "`init_adapter` takes an adapter in PEFT's format",
            "optimizer_config": "the optimizer has `betas`, `eps` and `weight_decay`",
            "wandb": "`report_to: wandb`",
        }
    )
    return source.finish()


def _mlx_adapter(source: GivenKeys) -> None:
    layers = source.take("num_layers", 16)
    if layers != -1:
        source.miss("num_layers", f"an adapter is put on every layer, not the last {layers}")
    given = source.table("lora_parameters")
    rank = source.as_number("lora_parameters.rank", given.get("rank", 8))
    scale = source.as_number("lora_parameters.scale", given.get("scale", 20.0))
    if rank is not None:
        source.put("lora_rank", given.get("rank", 8), "lora_parameters.rank")
    if rank is not None and scale is not None:
        source.put("lora_alpha", scale * int(rank), "lora_parameters.scale x rank")
    source.put("lora_dropout", given.get("dropout", 0.0), "lora_parameters.dropout")
    keys = given.get("keys")
    if isinstance(keys, list) and keys:
        names = [str(key).rpartition(".")[2] for key in keys]
        source.put("target_modules", names, "lora_parameters.keys")
    elif keys:
        source.miss("lora_parameters.keys", "a list of names is expected")
