"""Angles of a rotation whose base follows the length of the document."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config.model_config import ModelConfig
from models.layers.rotary import Rotary

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
RAW: dict[str, Any] = json.loads((GOLDEN / "llama" / "config.json").read_text())


def config(**rope: Any) -> ModelConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0} | rope
    return ModelConfig.from_dict(RAW | {"max_position_embeddings": 16, "rope_parameters": rope})


def angles(base: float, length: int, width: int) -> torch.Tensor:
    inverse = [base ** (-2 * pair / width) for pair in range(width // 2)]
    return torch.outer(torch.arange(length).double(), torch.tensor(inverse).double())


def test_every_document_has_the_base_of_its_own_length() -> None:
    shape, lengths = config(), (16, 20, 3, 48)
    width = shape.head_dim
    positions = torch.cat([torch.arange(length) for length in lengths])
    cos, sin = Rotary(shape)(positions, torch.float32)
    bases = [
        100.0 * max(3.0 * length / 16 - 2.0, 1.0) ** (width / (width - 2)) for length in lengths
    ]
    expected = torch.cat(
        [angles(base, length, width) for base, length in zip(bases, lengths, strict=True)]
    )
    assert bases[0] == bases[2] == 100.0 < bases[1] < bases[3]
    assert torch.allclose(cos.double(), expected.cos(), atol=2e-6)
    assert torch.allclose(sin.double(), expected.sin(), atol=2e-6)


def test_documents_within_the_models_own_length_are_rotated_plainly() -> None:
    positions = torch.arange(16).repeat(2)
    plain = Rotary(config(rope_type="default", factor=None))(positions, torch.float32)
    stretched = Rotary(config())(positions, torch.float32)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, stretched, strict=True))


@pytest.mark.parametrize("given", [{"original_max_position_embeddings": 8}, {}])
def test_the_length_is_that_of_the_model_whatever_else_is_given(given: dict[str, int]) -> None:
    assert config(**given).rope_parameters["original_max_position_embeddings"] == 16


NUMBERS = (5e-324, 1e-30, 1e-12, 1e-6, 0.5, 1.0, math.nextafter(1, 2), 32, 2.0**31, 1e12, 1e308)
KEYS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor", "mscale"),
        *("mscale_all_dim", "original_max_position_embeddings"),
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_what_is_read_can_be_rotated(kind: str) -> None:
    """Numbers of any size are refused as they are read, or give finite angles."""
    usual = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 8}
    positions, refused, rotated = torch.tensor([0, 1, 100, 0, 2**20]), 0, 0
    for first, second in itertools.combinations((*KEYS[kind], "finetuned"), 2):
        for pair in itertools.product(NUMBERS, NUMBERS):
            numbers = {**usual, **dict(zip((first, second), pair, strict=True))}
            try:
                shape = config(**numbers)
            except ValueError:
                refused += 1
                continue
            rotated += 1
            for part in Rotary(shape)(positions, torch.float32):
                assert bool(part.isfinite().all()), numbers
    assert refused
    assert rotated


def test_a_base_that_grows_needs_more_than_two_elements() -> None:
    raw = json.loads((GOLDEN / "qwen3_next" / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.125}
    with pytest.raises(ValueError, match="the rope_type dynamic needs 4"):
        ModelConfig.from_dict(raw | {"rope_parameters": rope})
    ModelConfig.from_dict(raw | {"rope_parameters": {**rope, "partial_rotary_factor": 0.25}})
