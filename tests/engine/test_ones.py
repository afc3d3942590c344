"""Models in which a number is one: experts, experts a token, heads, layers, tokens.

Against models without ones that compute the same: a mixture of one expert is that expert, and of
two equal ones too. tests/interop/models/test_random_configs.py has the equality with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config.choices import Quantization
from engine.config.train_config import TrainConfig
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.export import export_hf_directory
from engine.model_sources.from_model import TrainedSource
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from models.adapters import adapter_tensors, add_lora
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.families import FAMILIES
from models.tensor_layout import Layout
from models.tensor_names import expected_tensors, projections_of

MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_vl")
ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1}
ONES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"one expert of {family}": (family, ONE_EXPERT) for family in MIXTURES},
    "every expert of qwen3_moe": ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 3}),
    "one layer of qwen2_moe": ("qwen2_moe", ONE_EXPERT | {"num_hidden_layers": 1}),
    "one head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}),
    "one head of a hybrid": (
        "qwen3_next",
        {"num_attention_heads": 1, "num_key_value_heads": 1}
        | {"linear_num_key_heads": 1, "linear_num_value_heads": 1},
    ),
    "one layer": ("qwen3", {"num_hidden_layers": 1, "layer_types": None}),
    "inner width one": ("llama", {"intermediate_size": 1}),
}
VOCAB = 128
IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
BOUNDS = torch.tensor([0, 1, 25, 26, 40], dtype=torch.int32)
"""Documents of one token, and the last id of the vocabulary."""
IDS[0, 0] = IDS[0, 25] = VOCAB - 1


@pytest.fixture(params=ONES)
def source(request: pytest.FixtureRequest, golden: Callable[[str], Path], tmp_path: Path) -> Path:
    """A random model in a Hugging Face directory."""
    family, change = ONES[request.param]
    return written(golden(family), change, tmp_path / "model")


def written(directory: Path, change: dict[str, Any], target: Path, **layout: bool) -> Path:
    raw = json.loads((directory / "config.json").read_text())
    text = raw.get("text_config", raw)
    text |= change | {"vocab_size": VOCAB}
    if "num_experts" in change:
        text.pop("num_local_experts", None)
    if text.get("num_hidden_layers") == 1:
        text.pop("layer_types", None)
        text.pop("mlp_only_layers", None)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_dict(raw)
    generator = torch.Generator().manual_seed(1)
    stored = Layout(config.nested, **layout) if layout else None
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2
        + (1.0 if len(shape) == 1 and "norm" in name else 0.0)
        for name, shape in expected_tensors(config, stored).items()
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS, BOUNDS)
    return out


def adapted(source: Path, quantize: Quantization | None = None) -> Decoder:
    model = load_model(source, quantize=quantize, dtype=torch.float64)
    add_lora(model, rank=1, alpha=2.0)
    generator = torch.Generator().manual_seed(2)
    for parts in adapter_tensors(model).values():
        for part in parts:
            part.normal_(0, 0.3, generator=generator)
    return model.double()


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_gradients_are_those_of_the_loss(source: Path, quantize: Quantization | None) -> None:
    model = adapted(source, quantize)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.loss(IDS, IDS, BOUNDS).backward()
    directions = [torch.randn_like(p) for p in trained]
    assert all(p.grad is not None for p in trained)
    slope = sum(
        float((p.grad * d).sum())
        for p, d in zip(trained, directions, strict=True)
        if p.grad is not None
    )
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, direction in zip(trained, directions, strict=True):
                p.add_(direction, alpha=step)
            values.append(float(model.loss(IDS, IDS, BOUNDS)))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_adapters_merge_and_models_are_written_again(source: Path, tmp_path: Path) -> None:
    model = adapted(source)
    family = FAMILIES[model.config.model_type]
    config = AdapterConfig(
        r=1, lora_alpha=2.0, target_modules=list(projections_of(model.config)),
        fused_experts=family.fused_adapters,
    )  # fmt: skip
    save_adapter(tmp_path / "adapter", config, adapter_tensors(model))
    again = load_model(source, adapter=tmp_path / "adapter", dtype=torch.float64).double()
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert open_model_source(tmp_path / "merged").names() == open_model_source(source).names()
    merged = load_model(tmp_path / "merged", dtype=torch.float64)
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    plain = load_model(source)
    export_hf_directory(TrainedSource(open_model_source(source), plain), tmp_path / "copy")
    assert torch.equal(logits(load_model(tmp_path / "copy")), logits(plain))


def test_generation_a_token_at_a_time_equals_the_whole(source: Path) -> None:
    model = load_model(source, dtype=torch.float64)
    cache = KVCache(model.config, IDS.shape[1], torch.float64, torch.device("cpu"))
    with torch.no_grad():
        whole = model(IDS)[0]
    for index, token in enumerate(IDS[0]):
        assert torch.allclose(model.decode(token[None], cache), whole[index], rtol=0, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_one_expert_is_what_two_equal_ones_are(
    family: str, fused: bool, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    change = ONE_EXPERT | {"norm_topk_prob": True}
    one = written(golden(family), change, tmp_path / "one", fused=fused)
    single = load_model(one, dtype=torch.float64)
    raw = json.loads((one / "config.json").read_text())
    raw.get("text_config", raw).update({"num_experts": 2, "num_experts_per_tok": 2})
    double = Decoder(ModelConfig.from_dict(raw)).double()
    weights = {
        name: tensor.expand(2, *tensor.shape[1:]) if ".experts." in name
        else tensor.expand(2, -1) if name.endswith("mlp.gate.weight") else tensor
        for name, tensor in single.state_dict().items()
    }  # fmt: skip
    double.load_state_dict(weights)
    assert torch.allclose(logits(double), logits(single), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_run_of_one_expert_learns_one_row_of_one_batch(
    method: str,
    golden: Callable[[str], Path],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    add_tokenizer: Callable[[Path], None],
) -> None:
    model = written(golden("qwen3_moe"), ONE_EXPERT, tmp_path / "model")
    add_tokenizer(model)
    config = TrainConfig(
        model=str(model), data=str(write_rows(1)), output_dir=tmp_path / "run", method=method,
        max_steps=4, batch_size=1, max_length=64, learning_rate=1e-2, warmup_steps=0, lora_rank=1,
    )  # fmt: skip
    train(config, console=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
