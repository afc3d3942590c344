"""LLaMA-Factory's YAML files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.programs.hugging_face import training_arguments
from engine.config.programs.translation import (
    KERNELS,
    NO_HEAD,
    NO_PREFERENCES,
    SAME_VOCABULARY,
    GivenKeys,
    Translation,
    heldout,
    preferences,
)
from engine.errors import CheckpointError
from engine.storage.safe_files import read_json_object

_SAME = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "init_adapter",
    "model_revision": "revision",
    "max_samples": "limit_rows",
    "default_system": "system_prompt",
    "use_dora": "use_dora",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "use_rslora": "use_rslora",
    "plot_loss": "plot",
}
_MISSING = {
    "mask_history": "every assistant turn is trained, not the last alone",
    "train_on_prompt": "only the assistant's turns are trained",
    "additional_target": NO_HEAD,
    "freeze_trainable_layers": "single layers are not trained alone",
    "pissa_init": "adapters start at zero",
    "resize_vocab": SAME_VOCABULARY,
    "new_special_tokens": SAME_VOCABULARY,
    "use_badam": "the optimizer is AdamW",
    "use_galore": "the optimizer is AdamW",
    "use_adam_mini": "the optimizer is AdamW",
    "use_llama_pro": "blocks are not added",
    "rope_scaling": "rotary parameters come from config.json",
    "image_max_pixels": "only text is read",
    "video_max_pixels": "only text is read",
    "streaming": "rows are read before the first step",
    "tokenized_path": "rows are tokenised anew",
}


_PREFERENCES = {
    "pref_beta": "beta",
    "pref_ftx": "nll_weight",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "simpo_gamma",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ref_model": "reference",
}


def translate(given: dict[str, Any], folder: Path) -> Translation:
    """The settings of one file, whose relative paths are those of `folder`."""
    source = GivenKeys("LLaMA-Factory", given)
    _method(source)
    source.copy(_SAME)
    _data(source, folder)
    if source.take("packing") or source.left.get("neat_packing"):
        source.put("packing", True, "packing")
    source.take("neat_packing")
    source.copy_or_default({"cutoff_len": ("max_length", 2048)})
    thinking = source.take("enable_thinking")
    if thinking is not None:
        kwargs = {"enable_thinking": bool(thinking)}
        source.put("chat_template_kwargs", kwargs, "enable_thinking")
    heldout(source, "val_size")
    training_arguments(source)
    source.drop(("template", "tool_format"), "the model's own template (engine data preview)")
    source.drop(("use_unsloth", "use_unsloth_gc", "shift_attn", "mixture_of_depths"), KERNELS)
    source.drop(("quantization_method", "quantization_type", "upcast_layernorm"), "NF4 is built in")
    source.drop(("dataset_dir", "cache_dir", "media_dir", "mix_strategy"), "paths name the files")
    source.miss_if_asked(_MISSING)
    return source.finish()


def _method(source: GivenKeys) -> None:
    stage = source.take("stage", "sft")
    if stage in ("dpo", "kto"):
        asked = stage if stage == "kto" else source.take("pref_loss", "sigmoid")
        preferences(source, "stage", asked, _PREFERENCES)
    elif stage != "sft":
        source.miss("stage", f"{stage!r}: {NO_PREFERENCES}")
    kind = source.take("finetuning_type", "lora")
    bits = source.take("quantization_bit")
    double = source.take("double_quantization", True)
    if kind == "full":
        source.put("method", "full", "finetuning_type")
        return
    if kind != "lora":
        source.miss("finetuning_type", f"{kind!r}: there are adapters (lora) and full fine-tuning")
    if bits not in (None, 4):
        source.miss("quantization_bit", f"{bits} bits: a quantised base has 4 (NF4)")
    source.put("method", "lora" if bits is None else "qlora", "finetuning_type, quantization_bit")
    if not double:
        source.put("double_quant", False, "double_quantization")
    source.copy_or_default({"lora_rank": ("lora_rank", 8)})
    rank = source.as_number("lora_rank", source.result.settings["lora_rank"].value) or 8
    source.copy_or_default(
        {
            "lora_alpha": ("lora_alpha", 2 * int(rank)),
            "lora_dropout": ("lora_dropout", 0.0),
            "lora_target": ("target_modules", "all"),
        }
    )


def _data(source: GivenKeys, folder: Path) -> None:
    where = folder / str(source.left.get("dataset_dir", "data"))
    known = _known_files(where)
    for key, setting in (("dataset", "data"), ("eval_dataset", "eval_data")):
        given = source.several(key)
        listed = str(given[0]).split(",") if len(given) == 1 else given
        if given:
            files = [_file_of(source, key, str(name).strip(), where, known) for name in listed]
            source.put(setting, files, key)


def _known_files(where: Path) -> dict[str, Any]:
    """dataset_info.json; of one that cannot be read, every data set is reported as missing."""
    try:
        return read_json_object(where / "dataset_info.json")
    except (CheckpointError, ValueError):  # the latter of a name that no file can have
        return {}


def _file_of(source: GivenKeys, key: str, name: str, where: Path, known: Mapping[str, Any]) -> str:
    """The file of a data set, which dataset_info.json names."""
    entry = known.get(name)
    if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
        if entry.get("columns") or entry.get("ranking"):
            source.miss(
                f"{key}: {name}",
                "dataset_info.json renames its columns; rows here are read by their own keys",
            )
        return str(where / entry["file_name"])
    source.miss(f"{key}: {name}", f"{where}/dataset_info.json names no file of it: write the path")
    return name
