"""The tensors of an adapter's file, by what they do.

    <module>.lora_A.weight (r, in)  lora_B.weight (out, r)  [lora_B.bias (out,)]  a pair, W + s B A
    <module>.lora_magnitude_vector  (out,)                             DoRA of the pair
    <module>.lora_diag  (r,)                                           KaSA: W + s B diag(d) A
    <module>.lora_embedding_A (r, V)  lora_embedding_B (H, r)          a pair of the embedding
    <module>.base_layer.weight                                         the weight below a pair
    <module>.token_adapter.trainable_tokens_delta  (n, H)              n rows in place of W's
    <module>.weight, <module>.bias, ...                                in place of the model's own

all under `base_model.model.`. Source: the files of PEFT 0.21, and for `original_module` and
`modules_to_save` in names those of older versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, listing
from engine.model_sources.safetensors.file import SafetensorsFile

PREFIX = "base_model.model."
Pairs = dict[str, tuple[Tensor, ...]]
"""Module path -> (A, B), under DoRA (A, B, magnitude)."""
_PART = re.compile(
    r"(.+)\.(?:(lora_[AB])\.weight|(lora_B\.bias)|(lora_magnitude_vector)(?:\.weight)?"
    r"|(lora_embedding_[AB])|(lora_diag))"
)
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_BASE = re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.(weight|bias)")
_COPY = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(\w+)")
# Left by PEFT beside what is used: the untrained copy, and what a backward pass measured.
_IGNORED = (".original_module.", ".lora_velora_")


@dataclass
class OtherTensors:
    """What an adapter holds beside pairs of linear layers, in float32.

    `biases` are added to s B A x; `embeddings` are (A (r, V), B (H, r)[, magnitude (H,)]); `bases`
    stand below a pair and `copies` in place of a tensor, by the tensor's name; `rows` are new rows
    of a matrix, whose indices the configuration holds.
    """

    biases: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Pairs = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.biases, self.embeddings, self.bases, self.copies, self.rows))

    def modules(self) -> set[str]:
        """Paths of all modules that have a tensor here."""
        named = {name.rpartition(".")[0] for name in (*self.bases, *self.copies)}
        return named | {*self.biases, *self.embeddings, *self.rows}


def read_contents(file: SafetensorsFile, raw: Mapping[str, Any]) -> tuple[Pairs, OtherTensors]:
    """The pairs of linear layers and all other tensors of an adapter of configuration `raw`.

    Raises `CheckpointError` naming tensors that are no part of such an adapter, pairs without one
    half, and values that are not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others, odd = OtherTensors(), list[str]()
    for stored in file.keys():  # noqa: SIM118
        if any(mark in stored for mark in _IGNORED):
            continue
        if not stored.startswith(PREFIX) or not file.dtype(stored).is_floating_point:
            odd.append(f"{stored} {list(file.shape(stored))}")
            continue
        name, tensor = stored.removeprefix(PREFIX), _finite(file, stored)
        match = _PART.fullmatch(name)
        if match is not None:
            leaf = next(group for group in match.groups()[1:] if group)
            parts.setdefault(match[1], {})[leaf] = tensor
        elif not _file_other(name, tensor, others, raw):
            odd.append(f"{stored} {list(tensor.shape)}")
    pairs = _blocks_as_matrices(_paired(parts, others, odd), raw.get("use_bdlora") or {})
    odd += _without_pair(pairs, others)
    if odd or not (pairs or others):
        raise CheckpointError(
            f"{file.path} does not hold pairs of lora_A.weight and lora_B.weight alone, nor what "
            f"its configuration names beside them: {listing(odd) or 'it is empty'}. It is damaged, "
            "or another kind of adapter, which is not supported."
        )
    return pairs, others


def _finite(file: SafetensorsFile, name: str) -> Tensor:
    tensor = file.tensor(name).to(torch.float32, copy=True)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{file.path}: {name.removeprefix(PREFIX)} holds values that are not finite. Training "
            "diverged or the file is damaged; use an earlier checkpoint."
        )
    return tensor


def _file_other(name: str, tensor: Tensor, others: OtherTensors, raw: Mapping[str, Any]) -> bool:
    """Put a tensor that is no part of a pair where it belongs, if its feature is switched on."""
    rows = _ROWS.fullmatch(name)
    if rows is not None:
        others.rows[rows[1]] = tensor
        return bool(raw.get("trainable_token_indices"))
    base = _BASE.fullmatch(name)
    if base is not None and base[2] == "weight":
        others.bases[f"{base[1]}.weight"] = tensor
        return True
    copy = base or _COPY.fullmatch(name)
    if copy is None or "lora_" in name:
        return False
    # PEFT copies what has the name of a weight of the model, whether it is listed or not.
    others.copies[f"{copy[1]}.{copy[2]}"] = tensor
    return base is None or raw.get("bias", "none") != "none"


def _without_pair(pairs: Pairs, others: OtherTensors) -> list[str]:
    """Weights below a pair where there is none, which PEFT passes over in silence."""
    wrapped = pairs.keys() | others.embeddings.keys() | others.rows.keys()
    return [
        f"{name} without a pair" for name in others.bases if name.rpartition(".")[0] not in wrapped
    ]


def _paired(parts: dict[str, dict[str, Tensor]], others: OtherTensors, odd: list[str]) -> Pairs:
    """Pairs of linear layers; those of embeddings go to `others`, halves to `odd`."""
    pairs: Pairs = {}
    for module, given in parts.items():
        embedding = "lora_embedding_A" in given or "lora_embedding_B" in given
        halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if not set(halves) <= given.keys():
            odd.append(f"{module} has {' and '.join(given)} only")
            continue
        a, b = (given.pop(half) for half in halves)
        diagonal = given.pop("lora_diag", None)
        if diagonal is not None and diagonal.shape == b.shape[1:]:
            b = b * diagonal
        magnitude = given.pop("lora_magnitude_vector", None)
        bias = given.pop("lora_B.bias", None)
        if bias is not None and not embedding:
            others.biases[module] = bias
        elif bias is not None or given:
            odd += [f"{module}.{leaf}" for leaf in given] or [f"{module}.lora_B.bias"]
        target = others.embeddings if embedding else pairs
        target[module] = (a, b) if magnitude is None else (a, b, magnitude)
    return pairs


def _blocks_as_matrices(pairs: Pairs, blocks: Mapping[str, Any]) -> Pairs:
    """BD-LoRA stores the blocks of a block diagonal A or B below each other."""
    count = blocks.get("nblocks", 1)
    result: Pairs = {}
    for module, (a, b, *rest) in pairs.items():
        if any(part in module for part in blocks.get("target_modules_bd_a") or []):
            a = torch.block_diag(*a.chunk(count))
        elif any(part in module for part in blocks.get("target_modules_bd_b") or []):
            b = torch.block_diag(*b.chunk(count))
        result[module] = (a, b, *rest)
    return result
