"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

For a module such as `model.layers.0.self_attn.q_proj` the file holds

    base_model.model.<module>.lora_A.weight   (r, in)
    base_model.model.<module>.lora_B.weight   (out, r)

and the adapted weight is W + scale * B @ A, where scale is lora_alpha / r, or lora_alpha / sqrt(r)
under `use_rslora`. Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.

What is written uses only keys that PEFT has known since early 2024, so that old versions, vLLM and
llama.cpp read it. What is read may use whatever changes nothing; a feature that changes the
arithmetic and is not supported here (DoRA, trained copies of modules, ranks per module, ...) is
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

from engine.errors import CheckpointError
from engine.formats import durable
from engine.formats.checkpoint import listing
from engine.formats.files import read_json_object
from engine.formats.safetensors import SafetensorsFile, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_LEGACY = ("adapter_model.bin", "adapter_model.pt")
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
# Written as they are, beside the keys of `AdapterConfig`.
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
    "use_dora": False,
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
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Initialisations that also change the base weights, which an adapter file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TENSOR_FEATURES = {
    "lora_magnitude_vector": "DoRA (use_dora)",
    "lora_embedding_": "LoRA on the embedding",
    "lora_B.bias": "a bias on LoRA (lora_bias)",
    "base_layer.": "a copy of a base weight (save_embedding_layers)",
    "trainable_tokens": "trained single tokens (trainable_token_indices)",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that says what the adapter is.

    `target_modules` are suffixes of module names, such as "q_proj".
    """

    r: int
    lora_alpha: float
    target_modules: list[str]
    base_model_name_or_path: str = ""
    lora_dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B @ A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def save_adapter(
    directory: Path | str,
    config: AdapterConfig,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write an adapter that PEFT loads into `directory`, replacing one that stands there.

    `tensors` maps a module's path to A (r, in) and B (out, r), which are saved in float32. Raises
    `CheckpointError` for a tensor that is not finite or of another shape, before anything is
    written, and if the disk refuses.
    """
    directory = Path(directory)
    flat: dict[str, torch.Tensor] = {}
    for module, (a, b) in tensors.items():
        _check_pair(module, a, b, config.r, str(directory))
        flat[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().float()
        flat[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().float()
    if not flat:
        raise CheckpointError(f"There is no adapter tensor to save to {directory}.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise durable.write_error(directory, error) from error
    durable.write_json(directory / CONFIG, _to_json(config))
    durable.write_text(directory / "README.md", _readme(config))
    save_file(dict(sorted(flat.items())), directory / WEIGHTS, {"format": "pt"})


def load_adapter(directory: Path | str) -> tuple[AdapterConfig, Pairs]:
    """Read a PEFT LoRA adapter: its configuration, and module path -> (A, B) in float32.

    Raises `CheckpointError` for a missing or damaged file, a pickle, a feature that is not
    supported, a tensor without its partner, or one of another rank than the configuration says.
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
    for module, (a, b) in pairs.items():
        _check_pair(module, a, b, config.r, str(path))
    if not config.target_modules:
        suffixes = sorted({module.rpartition(".")[2] for module in pairs})
        return replace(config, target_modules=suffixes), pairs
    _check_targets(config.target_modules, list(pairs), str(path))
    return config, pairs


def _read_pairs(file: SafetensorsFile) -> Pairs:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    odd = []
    for name in file.keys():  # noqa: SIM118
        for part, feature in _TENSOR_FEATURES.items():
            if part in name:
                raise CheckpointError(
                    f"{file.path}: tensor {name} belongs to {feature}, which is not supported."
                )
        match = _PAIR.fullmatch(name)
        if match is None or not file.dtype(name).is_floating_point:
            odd.append(f"{name} {list(file.shape(name))}")
            continue
        halves.setdefault(match[1], {})[match[2]] = file.tensor(name).to(torch.float32, copy=True)
    odd += [
        f"{module} has lora_{next(iter(half))} only"
        for module, half in halves.items()
        if len(half) != 2
    ]
    if odd or not halves:
        raise CheckpointError(
            f"{file.path} does not hold pairs of lora_A.weight and lora_B.weight alone: "
            f"{listing(odd) or 'it is empty'}. A trained copy of a module (modules_to_save) or "
            "another kind of adapter is not supported."
        )
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


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


def _check_pair(module: str, a: torch.Tensor, b: torch.Tensor, rank: int, source: str) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{source}: the adapter of {module} has A {list(a.shape)} and B {list(b.shape)}; "
            f"expected [{rank}, in] and [out, {rank}], since {CONFIG} gives the rank {rank}."
        )
    for letter, tensor in (("A", a), ("B", b)):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: lora_{letter} of {module} holds values that are not finite. Training "
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
        "use_rslora": config.use_rslora,
    }


def _from_json(raw: dict[str, Any], source: str) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{source}: peft_type is {raw.get('peft_type')!r}; only 'LORA' adapters are supported."
        )
    used = [key for key in _UNSUPPORTED if raw.get(key)]
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
