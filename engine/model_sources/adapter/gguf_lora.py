"""LoRA adapters in llama.cpp's format, one GGUF file.

    general.type = "adapter"      adapter.type = "lora"      adapter.lora.alpha
    <name>.weight.lora_a  (r, in)        <name>.weight.lora_b  (out, r)

under llama.cpp's names of the weights; lora_a of the embedding is stored as (V, r). The scale is
alpha / r, r that of each pair, or 1 where alpha is 0. Rows of B of query and key projections are
interleaved where those of the weights are (`engine.model_sources.gguf.tensor_map`), which is undone
as soon as the model is known. Source: convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.contents import OtherTensors, Pairs
from engine.model_sources.adapter.peft import Adapter
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.gguf.source import dequantise
from engine.model_sources.gguf.tensor_map import (
    IN_LAYER,
    interleaved_heads,
    undo_permutation,
)
from models.config.model_config import ModelConfig

_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight\.lora_([ab])")
_OUTER = {"output": "lm_head", "token_embd": "model.embed_tokens"}


def load_gguf_adapter(path: Path) -> Adapter:
    """Read a GGUF LoRA adapter. Raises `CheckpointError` for a file that is none, or damaged."""
    file = GGUFFile(path)
    kind = (file.metadata.get("general.type"), file.metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise CheckpointError(
            f"{path} is a GGUF file of type {kind[0]!r}, not of a LoRA adapter. Give a model as "
            "--model."
        )
    if any("alora" in key for key in file.metadata):
        raise CheckpointError(
            f"{path} is an activated LoRA, which acts only after its invocation tokens."
        )
    parts, odd = dict[str, dict[str, torch.Tensor]](), list[str]()
    names = {theirs: ours for ours, theirs in IN_LAYER.items()}
    for stored in file.tensors:
        match = _TENSOR.fullmatch(stored)
        module = None if match is None else _module(match, names)
        if match is None or module is None:
            odd.append(stored)
            continue
        parts.setdefault(module, {})[match[3]] = dequantise(file, stored).float()
    odd += [f"{m} has half a pair" for m, given in parts.items() if len(given) < 2]
    if odd or not parts:
        raise CheckpointError(
            f"{path} holds tensors that are no pairs of a known weight: {listing(odd) or 'none'}."
        )
    return _adapter(path, file, {m: (given["a"], given["b"]) for m, given in parts.items()})


def _module(match: re.Match[str], names: dict[str, str]) -> str | None:
    if match[1] is None:
        return _OUTER.get(match[2])
    return f"model.layers.{match[1]}.{names[match[2]]}" if match[2] in names else None


def _adapter(path: Path, file: GGUFFile, pairs: Pairs) -> Adapter:
    alpha = float(file.metadata.get("adapter.lora.alpha") or 0.0)
    embedding = pairs.pop(_OUTER["token_embd"], None)
    others = OtherTensors()
    if embedding is not None:
        others.embeddings[_OUTER["token_embd"]] = (embedding[0].T.contiguous(), embedding[1])
    everything = pairs | others.embeddings
    for module, (a, b, *_) in everything.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{path}: the pair of {module} has A {list(a.shape)} and B {list(b.shape)}."
            )
    ranks = {module: int(a.shape[0]) for module, (a, *_) in everything.items()}
    rank = max(ranks.values())
    scales = {module: alpha / ranks[module] if alpha else 1.0 for module in everything}
    config = AdapterConfig(
        r=rank,
        lora_alpha=alpha or float(rank),
        target_modules=sorted({module.rpartition(".")[2] for module in everything}),
        base_model_name_or_path=str(file.metadata.get("general.base_model.0.name", "")),
        rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
        alpha_pattern={re.escape(m): scales[m] * ranks[m] for m in everything},
    )
    return Adapter(path, config, pairs, scales, others, interleaved=True)


def in_order(adapter: Adapter, model: ModelConfig) -> Adapter:
    """`adapter` with the rows of B as Hugging Face has them."""
    if not adapter.interleaved:
        return adapter

    def restored(module: str, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        layer = module.partition(".layers.")[2].partition(".")[0]
        heads = interleaved_heads(model, module, int(layer)) if layer else 0
        return (parts[0], undo_permutation(parts[1], heads)) if heads else parts

    pairs = {module: restored(module, parts) for module, parts in adapter.pairs.items()}
    return replace(adapter, pairs=pairs, interleaved=False)
