"""Whole models on the Triton kernels against an independent implementation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.config.model_config import ModelConfig
from models.decoder import Decoder


@pytest.mark.parametrize("family", ["qwen3", "qwen2_swa"])
def test_loss_and_every_gradient_equal_the_golden_ones(
    family: str,
    golden: Callable[[str], Path],
    triton_on: None,
    device: torch.device,
) -> None:
    folder = golden(family)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = Decoder(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    model.to(device)
    stored = {k: v.to(device) for k, v in load_file(folder / "golden.safetensors").items()}
    loss = model.loss(stored["input_ids"], stored["labels"])
    assert abs(float(loss.detach() - stored["loss"])) <= 1e-5
    loss.backward()
    parameters = dict(model.named_parameters())
    wanted = {name[5:]: value for name, value in stored.items() if name.startswith("grad.")}
    assert wanted
    for name, want in wanted.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert float((gradient - want).norm() / want.norm()) <= 1e-4, name
