"""Models of random weights: their shapes, first weights, tokenizers, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.model_sources.load_model import build_model
from engine.model_sources.scratch.fresh_model import FreshModel
from engine.model_sources.scratch.open_base import fresh_model
from models.tensor_names import parameter_count

SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 140, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.05, "attention_bias": True, "eos_token_id": 139, "bos_token_id": 138,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def opened(model: str | Path, tokenizer: str | None = None, seed: int = 0) -> FreshModel:
    return fresh_model(
        SimpleNamespace(
            model=str(model), revision=None, method="scratch", tokenizer=tokenizer, seed=seed
        )
    )


@pytest.fixture
def shape_file(tmp_path: Path) -> Path:
    path = tmp_path / "shape" / "mine.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SHAPE))
    return path


def test_the_built_in_model_is_that_of_the_sources() -> None:
    config = opened("builtin:scratch").config
    assert (config.num_hidden_layers, config.num_attention_heads) == (12, 8)
    assert (config.hidden_size, config.intermediate_size) == (512, 2048)
    assert (config.vocab_size, config.max_position_embeddings) == (133, 512)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ((2,), 0, None)
    # Four projections of 512 x 512 and three of 512 x 2048 a layer, norms, embedding and head.
    layer = 4 * 512**2 + 3 * 512 * 2048 + 2 * 512
    assert parameter_count(config) == 12 * layer + 512 + 2 * 133 * 512 == 50_480_640


def test_matrices_are_normal_and_all_else_is_neutral(shape_file: Path) -> None:
    source = opened(shape_file, "char")
    model = build_model(source)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
        elif name.endswith("bias"):
            assert bool((tensor == 0).all()), name
        else:
            values = tensor[1:] if "embed" in name else tensor
            assert float(values.std()) == pytest.approx(0.05, rel=0.06), name
            assert abs(float(values.mean())) < 0.05 * 4 / values.numel() ** 0.5, name
    padding = source.tensor("model.embed_tokens.weight")[0]
    assert bool((padding == 0).all())


def test_weights_follow_from_seed_and_name(shape_file: Path) -> None:
    first, again, other = (opened(shape_file, "char", seed) for seed in (1, 1, 2))
    names = [name for name in first.names() if name.endswith("proj.weight")]
    for name in reversed(names):
        assert torch.equal(first.tensor(name), again.tensor(name))
        assert not torch.equal(first.tensor(name), other.tensor(name))
    drawn = torch.stack([first.tensor(n).flatten()[:1000] for n in names])
    assert float(torch.corrcoef(drawn).fill_diagonal_(0).abs().max()) < 0.15
    assert first.digest() == again.digest() != other.digest()


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_vl", "qwen2_moe", "smollm3", "mistral"])
def test_every_family_is_made(family: str, golden: Callable[[str], Path], shape_file: Path) -> None:
    raw = json.loads((golden(family) / "config.json").read_text())
    raw.get("text_config", raw)["vocab_size"] = 133
    shape_file.write_text(json.dumps(raw))
    source = opened(shape_file, "char")
    model = build_model(source)
    ids = torch.arange(40)[None] % source.config.vocab_size
    loss = model.loss(ids, ids).detach()
    assert float(loss) == pytest.approx(math.log(133), rel=0.05)
    assert "text_config" not in source.raw_config
    (architecture,) = source.raw_config["architectures"]
    assert architecture.endswith("ForCausalLM")
    assert architecture.lower().startswith(family.replace("_vl", "").replace("_moe", "moe")[:4])


def test_the_tokenizer_names_the_ids(shape_file: Path, tmp_path: Path) -> None:
    source = opened(shape_file, "char")
    assert source.raw_config["eos_token_id"] == 2
    assert "bos_token_id" not in source.raw_config
    assert "quantization_config" not in source.raw_config
    for name, content in source.tokenizer_files().items():
        (shape_file.parent / name).write_bytes(content)
    beside = opened(shape_file)  # its own tokenizer: its ids are its own affair
    assert beside.raw_config["eos_token_id"] == 139
    assert opened(shape_file, str(shape_file.parent)).raw_config["eos_token_id"] == 2
    assert opened("builtin:scratch", str(shape_file.parent)).config.vocab_size == 133


@pytest.mark.parametrize(
    ("change", "tokenizer", "message"),
    [
        ({}, None, "has no tokenizer beside it"),
        ({"vocab_size": 100}, "char", "a vocabulary of 100 and the tokenizer char 133 ids"),
        ({"initializer_range": -1}, "char", "initializer_range is -1"),
        ({"initializer_range": True}, "char", "initializer_range is True"),
        ({"model_type": "gpt9"}, "char", "model_type is 'gpt9'"),
    ],
)
def test_what_cannot_be_made_is_refused(
    change: dict[str, Any], tokenizer: str | None, message: str, shape_file: Path
) -> None:
    shape_file.write_text(json.dumps(SHAPE | change))
    with pytest.raises(ConfigError, match=message):
        opened(shape_file, tokenizer)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no built-in model builtin:huge; there is builtin:scr"):
        opened("builtin:huge")
    with pytest.raises(ConfigError, match="there is no tokenizer; expected one of"):
        opened("builtin:scratch", str(tmp_path))
