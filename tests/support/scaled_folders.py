"""Folders of models as other programs quantise them, made of the golden fixtures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.model_sources.quantised.eight_bit import eight_bit_rows
from engine.model_sources.quantised.four_bit import FP4_CODE, four_bit_parts
from kernels.nf4 import quantize

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
Encode = Callable[[str, Tensor], dict[str, Tensor]]


def write_quantised(
    target: Path, encode: Encode, noted: dict[str, Any] | None, family: str = "llama"
) -> Path:
    """The golden model of `family` with the layers' projections as `encode` stores them."""
    shutil.copytree(GOLDEN / family, target)
    tensors = load_file(target / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        quantised = "_proj." in name and name.endswith(".weight")
        stored |= encode(name, tensor) if quantised else {name: tensor}
    save_file({n: t.clone().contiguous() for n, t in stored.items()}, target / "model.safetensors")
    raw = json.loads((target / "config.json").read_text())
    raw |= {"dtype": "bfloat16"} | ({"quantization_config": noted} if noted else {})
    (target / "config.json").write_text(json.dumps(raw))
    return target


def golden_weight(name: str, family: str = "llama") -> Tensor:
    """A tensor of the golden model in float64."""
    return load_file(GOLDEN / family / "model.safetensors")[name].to(torch.float64)


def four_bit(
    block: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.bfloat16,
) -> Encode:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        weight = quantize(tensor.to(dtype), block, nested)
        parts = {
            f"{name}.{leaf}" if leaf else name: t for leaf, t in four_bit_parts(weight).items()
        }
        parts[name] = parts[name].view(-1).view(storage).view(-1, 1)
        return parts

    return encode


def fp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As NF4 with the values of FP4: the codes are what matters, not how near they come."""
    parts = four_bit(nested=False)(name, tensor)
    state = json.loads(bytes(parts.pop(f"{name}.quant_state.bitsandbytes__nf4").tolist()))
    state["quant_type"] = "fp4"
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts | {f"{name}.quant_state.bitsandbytes__fp4": raw, f"{name}.quant_map": FP4_CODE}


def eight_bit(name: str, tensor: Tensor) -> dict[str, Tensor]:
    rows = eight_bit_rows(tensor)
    module = name.removesuffix(".weight")
    layout = torch.zeros((), dtype=torch.uint8)
    return {name: rows.codes, f"{module}.SCB": rows.absmax, f"{module}.weight_format": layout}


def fp8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One scale for the whole weight, as compressed-tensors and others write it."""
    scale = tensor.abs().amax().float() / 448
    return {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
