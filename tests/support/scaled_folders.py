"""Folders of models as other programs quantise them, made of the golden fixtures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
