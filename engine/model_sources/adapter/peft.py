"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

For a module such as `model.layers.0.self_attn.q_proj` the file holds

    base_model.model.<module>.lora_A.weight   (r, in)
    base_model.model.<module>.lora_B.weight   (out, r)

and the adapted weight is W + scale * B @ A, where scale is lora_alpha / r, or lora_alpha / sqrt(r)
under `use_rslora`. Under `use_dora` there is a third tensor, and each row of the adapted weight is
scaled to the length that it gives (`kernels.linear.dora`):

    base_model.model.<module>.lora_magnitude_vector   (out,)

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.

What is written uses only keys that PEFT has known since early 2024, so that old versions, vLLM and
llama.cpp read it. What is read may use whatever changes nothing; a feature that changes the
arithmetic and is not supported here (trained copies of modules, ranks per module, ...) is
refused by its name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.experts import (
    EXPERTS,
    PARAMETERS,
    divide,
    fuse,
    fused_keys,
    is_ours,
)
from engine.model_sources.safetensors.file import SafetensorsFile, save_file
from engine.storage import durable
from engine.storage.safe_files import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(.+)\.(lora_magnitude_vector)")
_LEGACY = ("adapter_model.bin", "adapter_model.pt")
Pairs = dict[str, tuple[torch.Tensor, ...]]
"""Module path -> (A, B), under DoRA (A, B, magnitude)."""
# Written as they are, next to the keys of `AdapterConfig`.
_CONSTANT: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}
# Features that change the arithmetic, unless they have one of the values that switch them off.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that also change the base weights, which an adapter file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TENSOR_FEATURES = {
    "lora_embedding_": "LoRA on the embedding",
    "lora_B.bias": "a bias on LoRA (lora_bias)",
    "base_layer.": "a copy of a base weight (save_embedding_layers)",
    "trainable_tokens": "trained single tokens (trainable_token_indices)",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that says what the adapter is.

    `target_modules` are suffixes of module names, such as "q_proj". With `fused_experts` the pairs
    of experts are written as `engine.model_sources.adapter.experts` says.
    """

    r: int
    lora_alpha: float
    target_modules: list[str]
    base_model_name_or_path: str = ""
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    fused_experts: bool = False

    @property
    def scale(self) -> float:
        """The factor of B @ A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def save_adapter(
    directory: Path | str,
    config: AdapterConfig,
    tensors: Mapping[str, tuple[torch.Tensor, ...]],
) -> None:
    """Write an adapter that PEFT loads into `directory`, replacing one that stands there.

    `tensors` maps a module's path to A (r, in), B (out, r) and, under DoRA, the magnitude (out,),
    which are saved in float32. Raises `CheckpointError` for a tensor that is not finite or of
    another shape, before anything is written, and if the disk refuses.
    """
    directory = Path(directory)
    flat: dict[str, torch.Tensor] = {}
    for module, parts in tensors.items():
        _check_parts(module, parts, config, str(directory))
    stored = fuse(tensors) if config.fused_experts else tensors
    for module, parts in stored.items():
        for name, tensor in zip(_names(module), parts, strict=False):
            flat[name] = tensor.detach().float().contiguous()
    if not flat:
        raise CheckpointError(f"There is no adapter tensor to save to {directory}.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise durable.write_error(directory, error) from error
    durable.write_json(directory / CONFIG, _to_json(config) | _of_experts(config, tensors))
    durable.write_text(directory / "README.md", _readme(config))
    save_file(dict(sorted(flat.items())), directory / WEIGHTS, {"format": "pt"})


def load_adapter(directory: Path | str) -> tuple[AdapterConfig, Pairs]:
    """Read a PEFT LoRA adapter: its configuration, and module path -> (A, B) in float32.

    Under DoRA a module has (A, B, magnitude). Raises `CheckpointError` for a missing or damaged
    file, a pickle, a feature that is not supported, a tensor without its partner, or one of another
    rank than the configuration says.
    """
    directory = Path(directory)
    path = directory / WEIGHTS
    if not (directory / CONFIG).exists():
        raise CheckpointError(
            f"{directory} holds no {CONFIG}, so it is not a LoRA adapter. Name the folder that the "
            "adapter was saved to."
        )
    config = _from_json(read_json_object(directory / CONFIG), str(directory / CONFIG))
    if not path.exists():
        pickles = [name for name in _LEGACY if (directory / name).exists()]
        what = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no weights"
        raise CheckpointError(f"{directory} holds {what}; expected {WEIGHTS}.")
    pairs = _read_pairs(SafetensorsFile(path))
    if config.fused_experts:
        try:
            pairs = divide(pairs, config.r)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}.") from error
    for module, parts in pairs.items():
        _check_parts(module, parts, config, str(path))
    if not config.target_modules:
        suffixes = sorted({module.rpartition(".")[2] for module in pairs})
        return replace(config, target_modules=suffixes), pairs
    _check_targets(config.target_modules, list(pairs), str(path))
    return config, pairs


def _read_pairs(file: SafetensorsFile) -> Pairs:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    odd = []
    for name in file.keys():  # noqa: SIM118
        for part, feature in _TENSOR_FEATURES.items():
            if part in name and f"{EXPERTS}{part}lora_" not in name:
                raise CheckpointError(
                    f"{file.path}: tensor {name} belongs to {feature}, which is not supported."
                )
        match = _TENSOR.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if match is None or not file.dtype(name).is_floating_point:
            odd.append(f"{name} {list(file.shape(name))}")
            continue
        modules.setdefault(match[1], {})[match[2]] = file.tensor(name).to(torch.float32, copy=True)
    odd += [
        f"{module} has {' and '.join(parts)} only"
        for module, parts in modules.items()
        if not {"lora_A", "lora_B"} <= parts.keys()
    ]
    if odd or not modules:
        raise CheckpointError(
            f"{file.path} does not hold pairs of lora_A.weight and lora_B.weight alone: "
            f"{listing(odd) or 'it is empty'}. A trained copy of a module (modules_to_save) or "
            "another kind of adapter is not supported."
        )
    order = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {
        module: tuple(parts[part] for part in order if part in parts)
        for module, parts in modules.items()
    }


def _names(module: str) -> tuple[str, ...]:
    """The file's names of A, B and magnitude; old and new versions of PEFT agree on them."""
    path = f"{_PREFIX}{module}"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_magnitude_vector"


def _check_targets(targets: list[str], modules: list[str], source: str) -> None:
    """Every module must be meant by a target, and every target must have a module."""
    hits = {
        module: [target for target in targets if f".{module}".endswith(f".{target}")]
        for module in modules
    }
    strays = [module for module, matched in hits.items() if not matched]
    unused = sorted(set(targets) - {target for matched in hits.values() for target in matched})
    if strays or unused:
        raise CheckpointError(
            f"{source}: the tensors do not fit target_modules {sorted(targets)}: without a target "
            f"{listing(strays) or 'none'}; without a tensor {listing(unused) or 'none'}. The two "
            "files belong to different adapters."
        )


def _check_parts(
    module: str, parts: tuple[torch.Tensor, ...], config: AdapterConfig, source: str
) -> None:
    (a, b), magnitude, rank = parts[:2], parts[2:], config.r
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{source}: the adapter of {module} has A {list(a.shape)} and B {list(b.shape)}; "
            f"expected [{rank}, in] and [out, {rank}], since {CONFIG} gives the rank {rank}."
        )
    if len(magnitude) != int(config.use_dora):
        raise CheckpointError(
            f"{source}: {module} has {'a' if magnitude else 'no'} lora_magnitude_vector, and "
            f"{CONFIG} says use_dora {str(config.use_dora).lower()}; the two files belong to "
            "different adapters."
        )
    if magnitude and magnitude[0].shape != b.shape[:1]:
        raise CheckpointError(
            f"{source}: lora_magnitude_vector of {module} is {list(magnitude[0].shape)}; expected "
            f"[{b.shape[0]}], one length per row of the weight."
        )
    for name, tensor in zip(("lora_A", "lora_B", "lora_magnitude_vector"), parts, strict=False):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} of {module} holds values that are not finite. Training "
                "diverged or the file is damaged; use an earlier checkpoint."
            )


def _to_json(config: AdapterConfig) -> dict[str, Any]:
    alpha = config.lora_alpha
    return {
        **_CONSTANT,
        "base_model_name_or_path": config.base_model_name_or_path,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "r": config.r,
        "target_modules": sorted(config.target_modules),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _of_experts(config: AdapterConfig, modules: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of an adapter of experts says in addition, or otherwise.

    For the families whose divided experts PEFT knows it takes `gate_proj` and its like in
    `target_modules` to mean the experts and nothing else; it finds shared experts and dense layers
    by their names in `target_parameters`. Other programs find all by `target_modules`. Dropout,
    which matters for training alone, PEFT refuses on experts.
    """
    if not any(EXPERTS in name for name in modules):
        return {}
    if config.fused_experts:
        fused = fused_keys(config.r, config.lora_alpha, config.use_rslora)
        return {"lora_dropout": 0.0} | fused
    keys: dict[str, Any] = {"lora_dropout": 0.0}
    others = sorted(f"{name}.weight" for name in modules if _beside_experts(f"{name}.weight"))
    if others:
        keys["target_parameters"] = others
    if config.use_rslora:
        # PEFT fuses gate and up to twice the rank with twice alpha, which under rsLoRA is another
        # scale; alpha that has the root in it is right either way.
        keys |= {"use_rslora": False, "lora_alpha": config.lora_alpha * math.sqrt(config.r)}
    return keys


def _beside_experts(parameter: str) -> bool:
    """Whether this is the weight of a shared expert or of a dense feed-forward layer."""
    return ".mlp." in parameter and parameter.endswith(".weight") and EXPERTS not in parameter


def _from_json(raw: dict[str, Any], source: str) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{source}: peft_type is {raw.get('peft_type')!r}; only 'LORA' adapters are supported."
        )
    used = [key for key in _UNSUPPORTED if raw.get(key)]
    parameters = list(map(str, raw.get("target_parameters") or []))
    fused = bool(parameters) and set(parameters) <= set(PARAMETERS)
    if fused and is_ours(raw):
        used = [key for key in used if key not in ("rank_pattern", "alpha_pattern")]
    elif not all(map(_beside_experts, parameters)):
        used.append("target_parameters")
    if raw.get("bias", "none") != "none":
        used.append("bias")
    initial = str(raw.get("init_lora_weights", True)).lower()
    if initial.startswith(_CHANGES_BASE):
        used.append(f"init_lora_weights={initial}")
    if used:
        raise CheckpointError(
            f"{source}: the adapter uses {', '.join(used)}, which is not supported. Train one "
            "without it, or merge it with the program that made it."
        )
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 65_536:
        raise CheckpointError(f"{source}: r is {rank!r}; expected a rank of at least 1.")
    for key, value, high in (("lora_alpha", alpha, math.inf), ("lora_dropout", dropout, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < high:
            raise CheckpointError(f"{source}: {key} is {value!r}; expected a number from 0.")
    targets = raw.get("target_modules")
    # A text is a pattern over module names; the tensors say just as well which modules it means.
    listed = list(map(str, targets)) if isinstance(targets, list) else []
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=listed,
        base_model_name_or_path=str(raw.get("base_model_name_or_path") or ""),
        lora_dropout=float(dropout),
        use_rslora=bool(raw.get("use_rslora", False)),
        use_dora=bool(raw.get("use_dora", False)),
        fused_experts=fused,
    )


def _readme(config: AdapterConfig) -> str:
    """The model card that PEFT writes: front matter by which the hub knows what this is."""
    base = json.dumps(config.base_model_name_or_path)
    tag = json.dumps(f"base_model:adapter:{config.base_model_name_or_path}")
    targets = ", ".join(sorted(config.target_modules))
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        f"tags:\n- {tag}\n- lora\n- transformers\n---\n\n# LoRA adapter\n\n"
        f"Rank {config.r}, alpha {config.lora_alpha}, on {targets} of "
        f"`{config.base_model_name_or_path}`. Load it with PEFT:\n\n"
        "    from peft import PeftModel\n"
        "    model = PeftModel.from_pretrained(base_model, this_folder)\n"
    )
