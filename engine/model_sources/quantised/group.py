"""Join the tensors that a file has of one quantised weight.

What a weight is stored as is decided by the tensors beside it, weight by weight, and never by the
list in config.json: dynamic quantisations leave some layers in 16 bits, and published lists are
wrong at times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, listing
from engine.model_sources.quantised.eight_bit import EightBitTensor
from engine.model_sources.quantised.four_bit import STATE, FourBitTensor
from engine.model_sources.quantised.methods import method_of, quantised_names, refuse
from engine.model_sources.quantised.scaled import ScaledTensor
from engine.model_sources.safetensors.stored_tensors import Home, StoredTensor

_STATE_NAME = re.compile(rf"(.+)\.{re.escape(STATE)}(nf4|fp4)")
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
# Scales of activations and caches, which do not change a weight.
_ACTIVATIONS = re.compile(
    r".*[._](input_scale|input_scale_ub|input_zero_point|output_scale|output_zero_point"
    r"|activation_scale\w*|input_global_scale|input_amax|output_amax)"
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def with_quantised(
    stored: Mapping[str, StoredTensor], raw_config: Mapping[str, Any], path: Path
) -> Home:
    """`stored` with every quantised weight as one tensor, under the name of the weight.

    Raises `CheckpointError` where weights are quantised in a way that is not read, or damaged.
    """
    home = {name: part for name, part in stored.items() if not _ACTIVATIONS.fullmatch(name)}
    method = method_of(raw_config)
    made: Home = {}
    _take_four_bit(home, made)
    _take_eight_bit(home, made, model_dtype(raw_config))
    if method not in ("mxfp4", "gptq", "awq"):
        _refuse_transforms(raw_config, path)
        _take_scaled(home, made, raw_config, path)
    left = quantised_names(home)
    coded = [name for name, part in home.items() if _is_coded(part.dtype)]
    if left or (coded and method is not None) or any(_is_float8(home[name]) for name in coded):
        raise refuse(path, method, left or coded)
    result: Home = {**home, **made}
    # In the order of the files, where others follow from it.
    return {name: result[name] for name in stored if name in result}


def model_dtype(raw_config: Mapping[str, Any]) -> torch.dtype:
    """The type that config.json gives a model's weights; bfloat16 where it gives none."""
    inner = raw_config.get("text_config")
    for raw in (raw_config, inner if isinstance(inner, Mapping) else {}):
        named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
        if named in _DTYPES:
            return _DTYPES[named]
    return torch.bfloat16


def _take_four_bit(home: dict[str, StoredTensor], made: Home) -> None:
    for name in list(home):
        match = _STATE_NAME.fullmatch(name)
        if match is None:
            continue
        weight, kind = match[1], match[2]
        parts = {"": home.pop(weight)} if weight in home else {}
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}{kind}"):
            if f"{weight}.{part}" in home:
                parts[part] = home.pop(f"{weight}.{part}")
        made[weight] = FourBitTensor.of(weight, parts, kind)


def _take_eight_bit(home: dict[str, StoredTensor], made: Home, dtype: torch.dtype) -> None:
    for name in [name for name in home if name.endswith(".SCB")]:
        module = name.removesuffix(".SCB")
        weight = f"{module}.weight"
        if weight in home:
            layout = home.pop(f"{module}.weight_format", None)
            made[weight] = EightBitTensor(weight, home.pop(weight), home.pop(name), layout, dtype)


def _take_scaled(
    home: dict[str, StoredTensor], made: Home, raw_config: Mapping[str, Any], path: Path
) -> None:
    block, dtype = _block(raw_config), model_dtype(raw_config)
    for name in list(home):
        suffix = next((end for end in _SCALE_SUFFIXES if name.endswith(end)), None)
        weight = name.removesuffix(suffix) if suffix else name
        if suffix is None or weight not in home or not _is_coded(home[weight].dtype):
            continue
        if home[weight].dtype == torch.uint8 or len(home[weight].shape) not in (2, 3):
            continue  # two codes a byte
        parts = home.pop(weight), home.pop(name), home.pop(f"{weight}_zero_point", None)
        made[weight] = ScaledTensor(weight, *parts, block, dtype)
    bare = [name for name, part in home.items() if _is_float8(part)]
    if bare:
        raise CheckpointError(
            f"{path}: {len(bare)} weights are stored as 8-bit floats without their scales: "
            f"{listing(bare)}. Files are missing or cut short; download the model again, or take "
            "the original 16-bit one."
        )


def _block(raw_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, where the configuration names them."""
    noted = raw_config.get("quantization_config")
    if not isinstance(noted, Mapping):
        return None
    size = noted.get("weight_block_size")
    groups = noted.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        size = size or (weights.get("block_structure") if isinstance(weights, Mapping) else None)
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _refuse_transforms(raw_config: Mapping[str, Any], path: Path) -> None:
    """Raise for rotations that a program applies to weights or activations as it computes."""
    noted = raw_config.get("quantization_config")
    transforms = noted.get("transform_config") if isinstance(noted, Mapping) else None
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise CheckpointError(
            f"{path}: quantization_config has a transform_config, by which the weights are stored "
            "rotated; that is not computed here. Take the model's original 16-bit files."
        )


def _is_coded(dtype: torch.dtype) -> bool:
    name = str(dtype).removeprefix("torch.")
    return name in _FLOAT8 or not dtype.is_floating_point


def _is_float8(part: StoredTensor) -> bool:
    return str(part.dtype).removeprefix("torch.") in _FLOAT8
