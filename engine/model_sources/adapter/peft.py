"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

For a module such as `model.layers.0.self_attn.q_proj` the file holds

    base_model.model.<module>.lora_A.weight   (r, in)
    base_model.model.<module>.lora_B.weight   (out, r)

and the adapted weight is W + scale * B @ A, where scale is lora_alpha / r, or lora_alpha / sqrt(r)
under `use_rslora`. Under `use_dora` there is a third tensor, and each row of the adapted weight is
scaled to the length that it gives (`kernels.linear.dora`):

    base_model.model.<module>.lora_magnitude_vector   (out,)

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. What else there may be is in
`engine.model_sources.adapter.contents`, what it does to a model in `adapted_source`.

What is written uses only keys that PEFT has known since early 2024, one rank and one scale, so that
old versions, vLLM and llama.cpp read it. A feature that changes the arithmetic and cannot be
computed is refused by its name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.config import AdapterConfig, from_json, model_card, to_json
from engine.model_sources.adapter.contents import PREFIX, OtherTensors, Pairs, read_contents
from engine.model_sources.adapter.experts import EXPERTS, divide, fuse, fused_keys
from engine.model_sources.safetensors.file import SafetensorsFile, save_file
from engine.storage import durable, names
from engine.storage.safe_files import not_shown, read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
_LEGACY = ("adapter_model.bin", "adapter_model.pt")
# Keys of the configuration that belong to tensors which are carried from one adapter to the next.
_CARRIED_KEYS = (
    "bias",
    "ensure_weight_tying",
    "init_lora_weights",
    "loftq_config",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read: `pairs` and their `scales` by module, and all `others`.

    `interleaved` says that rows of B are as llama.cpp stores those of the weights, and `also` has
    the paths of further adapters whose sum with the one in `path` this is.
    """

    path: Path
    config: AdapterConfig
    pairs: Pairs
    scales: dict[str, float]
    others: OtherTensors = field(default_factory=OtherTensors)
    interleaved: bool = False
    also: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where it comes from."""
        return (self.path, *self.also)


def save_adapter(
    directory: Path | str,
    config: AdapterConfig,
    tensors: Mapping[str, tuple[torch.Tensor, ...]],
    carried: Adapter | None = None,
    whole: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter that PEFT loads into `directory`, replacing one that stands there.

    `tensors` maps a module's path to A (r, in), B (out, r) and, under DoRA, the magnitude (out,),
    which are saved in float32; `whole` are weights by their names that stand in place of the
    model's (`modules_to_save`), saved in their type. Whatever `carried` holds beside pairs and
    these is written as it is. Raises `CheckpointError` for a tensor that is not finite or of
    another shape, before anything is written, and if the disk refuses.
    """
    directory = Path(directory)
    whole = whole or {}
    modules = {name.removesuffix(".weight") for name in whole}
    flat = {} if carried is None else _carried_tensors(carried, modules)
    flat |= {f"{PREFIX}{name}": _whole(name, t, directory) for name, t in whole.items()}
    for module, parts in tensors.items():
        _check_parts(module, parts, config, str(directory))
    stored = fuse(tensors) if config.fused_experts else tensors
    for module, parts in stored.items():
        for name, tensor in zip(_names(module), parts, strict=False):
            flat[name] = tensor.detach().float().contiguous()
    if not flat:
        raise CheckpointError(f"There is no adapter tensor to save to {directory}.")
    with durable.writing(directory):
        names.mkdir(directory, parents=True, exist_ok=True)
    keys = _of_experts(config, tensors) | ({} if carried is None else _carried_keys(carried))
    if whole:
        saved = {module.rpartition(".")[2] for module in modules}
        keys["modules_to_save"] = sorted(saved | set(keys.get("modules_to_save") or ()))
    durable.write_json(directory / CONFIG, to_json(config, keys))
    durable.write_text(directory / "README.md", model_card(config, sorted(modules)))
    save_file(dict(sorted(flat.items())), directory / WEIGHTS, {"format": "pt"})


def load_adapter(directory: Path | str) -> Adapter:
    """Read a PEFT LoRA adapter, every tensor in float32.

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
    with not_shown(directory / CONFIG):
        config = from_json(read_json_object(directory / CONFIG), str(directory / CONFIG))
    if not path.exists():
        pickles = [name for name in _LEGACY if (directory / name).exists()]
        what = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no weights"
        raise CheckpointError(f"{directory} holds {what}; expected {WEIGHTS}.")
    pairs, others = read_contents(SafetensorsFile(path), config.raw)
    sources = {module: module for module in pairs}
    for module, parts in pairs.items():
        if not (config.fused_experts and f"{module}.".endswith((EXPERTS, f"{EXPERTS}base_layer."))):
            _check_parts(module, parts, config, str(path))
    _check_others(config, pairs, others, str(path))
    if config.fused_experts:
        try:
            pairs, sources = divide(pairs, config.rank, config.raw["target_parameters"])
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}.") from error
    scales = {module: config.module_scale(source) for module, source in sources.items()}
    if not config.target_modules:
        suffixes = sorted({module.rpartition(".")[2] for module in pairs})
        config = replace(config, target_modules=suffixes)
    return Adapter(directory, config, pairs, scales, others)


def _names(module: str) -> tuple[str, ...]:
    """The file's names of A, B and magnitude; old and new versions of PEFT agree on them."""
    path = f"{PREFIX}{module}"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_magnitude_vector"


def _whole(name: str, tensor: torch.Tensor, directory: Path) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{directory}: {name} holds values that are not finite. Training diverged; use an "
            "earlier checkpoint."
        )
    return tensor.detach().cpu().clone()


def _carried_tensors(adapter: Adapter, without: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file beside pairs of linear layers, under their names there.

    Those of the modules in `without` are left out.
    """
    file, others = SafetensorsFile(adapter.path / WEIGHTS), adapter.others
    leaves = {module.rpartition(".")[2] for module in without}
    named = {module for module in others.modules() if module.rpartition(".")[2] not in leaves}
    pairs = {name for module in adapter.pairs for name in _names(module)}
    return {
        name: file.tensor(name).clone()
        for name in file.keys()  # noqa: SIM118
        if name not in pairs and any(f".{module}." in name for module in named)
    }


def _carried_keys(adapter: Adapter) -> dict[str, Any]:
    raw = adapter.config.raw
    return {key: raw[key] for key in _CARRIED_KEYS if raw.get(key)}


def _check_parts(
    module: str, parts: tuple[torch.Tensor, ...], config: AdapterConfig, source: str
) -> None:
    (a, b), magnitude, rank = parts[:2], parts[2:], config.rank(module)
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
    for name, tensor in zip(PARTS, parts, strict=False):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} of {module} holds values that are not finite. Training "
                "diverged or the file is damaged; use an earlier checkpoint."
            )


def _check_others(config: AdapterConfig, pairs: Pairs, others: OtherTensors, source: str) -> None:
    """Features that the configuration switches on have their tensors, and the other way round."""
    wrong = []
    for module, parts in others.embeddings.items():
        a, b, *magnitude = parts
        rank = config.rank(module)
        if a.shape[:1] != (rank,) or b.shape[1:] != (rank,):
            wrong.append(f"{module} has A {list(a.shape)} and B {list(b.shape)}, of rank {rank}")
        if len(magnitude) != int(config.use_dora):
            wrong.append(f"use_dora is {config.use_dora}, and {module} says otherwise")
    biased = {module for module in pairs if EXPERTS not in f"{module}."}
    if bool(config.raw.get("lora_bias")) != bool(others.biases) or others.biases.keys() - pairs:
        wrong.append(f"lora_bias is {config.raw.get('lora_bias')}, and the tensors say otherwise")
    elif others.biases and biased - others.biases.keys():
        wrong.append(f"lora_B.bias is missing: {listing(sorted(biased - others.biases.keys()))}")
    if wrong:
        raise CheckpointError(
            f"{source}: {'; '.join(wrong)}. The two files belong to different adapters."
        )


def _of_experts(config: AdapterConfig, modules: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of an adapter of experts says in addition, or otherwise.

    For the families whose divided experts PEFT knows it takes `gate_proj` and its like in
    `target_modules` to mean the experts and nothing else; it finds shared experts and dense layers
    by their names in `target_parameters`. Other programs find all by `target_modules`. Dropout,
    which matters for training alone, PEFT refuses on experts.
    """
    if not any(EXPERTS in name for name in modules):
        return {}
    keys: dict[str, Any] = {"lora_dropout": 0.0}
    if config.fused_experts:
        return keys | fused_keys(config.r, config.plain_alpha)
    others = sorted(f"{name}.weight" for name in modules if _beside_experts(f"{name}.weight"))
    if others:
        keys["target_parameters"] = others
    return keys


def _beside_experts(parameter: str) -> bool:
    """Whether this is the weight of a shared expert or of a dense feed-forward layer."""
    return ".mlp." in parameter and parameter.endswith(".weight") and EXPERTS not in parameter


def uniform(
    pairs: Mapping[str, tuple[torch.Tensor, ...]], scales: Mapping[str, float], scale: float
) -> tuple[int, Pairs]:
    """`pairs` with one rank, the largest, and one `scale`, and that rank.

    Ranks are filled up with zeros and B carries the quotient of the scales: programs that read
    neither `rank_pattern` nor `alpha_pattern` compute the same.
    """
    rank = max(int(a.shape[0]) for a, *_ in pairs.values())
    result: Pairs = {}
    for module, (a, b, *magnitude) in pairs.items():
        extra = rank - int(a.shape[0])
        if extra or not math.isclose(scales[module], scale):
            b = torch.nn.functional.pad(b * (scales[module] / scale), (0, extra))
            a = torch.nn.functional.pad(a, (0, 0, 0, extra))
        result[module] = (a, b, *magnitude)
    return rank, result
