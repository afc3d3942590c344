"""DoRA through whole runs: it trains, resumes to the same bits, reloads, merges, and is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config.choices import MergeOnto, Quantization
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.load_model import load_model
from engine.runs.metrics import read_metrics
from engine.training.trainable import make_trainable
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from models.adapters import adapter_tensors, add_lora
from models.layers.context import StepSettings
from models.layers.linear import Linear

Rows = Callable[..., Path]
Golden = Callable[[str], Path]
IDS = torch.arange(2, 60).reshape(2, 29)


def config(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_dir": output,
        "max_steps": 4,
        "batch_size": 2,
        "max_length": 64,
        "learning_rate": 5e-3,
        "warmup_steps": 0,
        "device": "cpu",
        "plot": False,
        "checkpoint_every": 2,
        "use_dora": True,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_new_magnitude_is_the_length_of_each_row_and_changes_nothing(
    golden: Golden, quantize: Quantization | None, dtype: torch.dtype
) -> None:
    model = load_model(golden("qwen3"), quantize=quantize, dtype=dtype)
    before = model(IDS)
    add_lora(model, rank=4, use_dora=True)
    assert torch.equal(model(IDS), before)
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(linear, Linear)
    magnitude = linear.lora_magnitude_vector
    assert magnitude is not None and magnitude.dtype == torch.float32
    if isinstance(linear.weight, torch.Tensor):
        lengths = linear.weight.double().norm(dim=1)
        assert torch.allclose(magnitude.double(), lengths, rtol=1e-6)


def gradients(
    folder: Path, quantize: Quantization | None, policy: str, settings: StepSettings
) -> dict[str, torch.Tensor]:
    model = load_model(folder, quantize=quantize, dtype=torch.float64)
    add_lora(model, rank=4, use_dora=True)
    model.double()
    generator = torch.Generator().manual_seed(1)
    for a, b, magnitude in adapter_tensors(model).values():
        a.normal_(0, 0.3, generator=generator)
        b.normal_(0, 0.3, generator=generator)
        magnitude.uniform_(0.5, 2, generator=generator)
    model.loss(IDS, IDS, settings=replace(settings, checkpointing=policy)).backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(results) == 2 * 7 * 3
    return results


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("selective", StepSettings()),
        ("full", StepSettings()),
        ("full", StepSettings(mlp_tile_tokens=16)),
        ("full", StepSettings(low_memory_decode=True)),
        ("none", StepSettings(mlp_tile_tokens=7, low_memory_decode=True)),
    ],
)
def test_recomputing_and_saving_memory_change_no_gradient(
    golden: Golden, quantize: Quantization | None, policy: str, settings: StepSettings
) -> None:
    want = gradients(golden("qwen3"), quantize, "none", StepSettings())
    got = gradients(golden("qwen3"), quantize, policy, settings)
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) <= 1e-9, name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_magnitude_moves_at_the_first_step(
    method: str, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    fresh = load_model(tiny_model, quantize="nf4" if method == "qlora" else None)
    add_lora(fresh, use_dora=True, seed=42)
    data, run = write_rows(4), tmp_path / "run"
    train(config(tiny_model, data, run, method=method, max_steps=1), console=False)
    adapter = load_adapter(run / "adapter")
    settings, tensors = adapter.config, adapter.pairs
    assert settings.use_dora
    assert len(tensors) == 14
    for path, (_, b, magnitude) in adapter_tensors(fresh).items():
        assert not torch.equal(tensors[path][1], b), path
        moved = tensors[path][2] != magnitude
        assert bool(moved.all()), path


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_merged_model_is_the_adapted_one(
    method: str, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config(tiny_model, write_rows(8), run, method=method, use_rslora=True), console=False)
    quantize: Quantization | None = "nf4" if method == "qlora" else None
    onto: MergeOnto = "dequantised" if method == "qlora" else "original"
    adapted = load_model(tiny_model, quantize=quantize, adapter=run / "adapter")
    merge(tiny_model, run / "adapter", tmp_path / "merged", onto=onto)
    with torch.no_grad():
        want, got = adapted(IDS), load_model(tmp_path / "merged")(IDS)
        base = load_model(tiny_model, quantize=quantize)(IDS)
    assert float((want - got).abs().max()) <= 1e-4
    assert float((want - base).abs().max()) > 1e-2


def test_a_run_goes_on_from_an_earlier_magnitude(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data, first = write_rows(4), tmp_path / "one" / "adapter"
    train(config(tiny_model, data, tmp_path / "one"), console=False)
    second = config(tiny_model, data, tmp_path / "two", init_adapter=first, max_steps=1)
    train(second, console=False)
    steps = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    assert steps[1][0]["loss"] < steps[0][0]["loss"]
    before, after = load_adapter(first).pairs, load_adapter(tmp_path / "two" / "adapter").pairs
    for path, (_, _, magnitude) in before.items():
        change = (after[path][2] - magnitude).abs()
        assert 0 < float(change.max()) <= 5e-3 * 1.01, path


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_with_or_without_magnitude_is_no_start_for_the_other(
    dora: bool, tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(4)
    train(config(tiny_model, data, tmp_path / "one", max_steps=1, use_dora=dora), console=False)
    start = tmp_path / "one" / "adapter"
    settings = config(tiny_model, data, tmp_path / "two", init_adapter=start, use_dora=not dora)
    with pytest.raises(CheckpointError, match=f"its use_dora is {dora}, this run's {not dora}"):
        train(settings, console=False)


def test_a_checkpoint_without_magnitudes_is_refused(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data, run = write_rows(4), tmp_path / "run"
    train(config(tiny_model, data, run, max_steps=1, use_dora=False), console=False)
    with pytest.raises(CheckpointError, match="use_dora was False and is True"):
        train(config(tiny_model, data, run, max_steps=1, resume="auto"), console=False)


def test_magnitudes_and_full_fine_tuning_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="use_dora needs method lora or qlora"):
        TrainConfig(model="m", data="d", method="full", use_dora=True)


def test_magnitudes_of_experts_are_refused_by_name(golden: Golden) -> None:
    model = load_model(golden("qwen3_moe"))
    told = r"experts of a qwen3_moe .* PEFT refuses DoRA.* --target-modules attn"
    with pytest.raises(ConfigError, match=told):
        make_trainable(model, TrainConfig(model="m", data="d", use_dora=True), None)
    settings = TrainConfig(
        model="m", data="d", use_dora=True, target_modules="attn", gradient_checkpointing="full"
    )
    assert make_trainable(model, settings, None) > 0
    assert all(len(parts) == 3 for parts in adapter_tensors(model).values())


def test_magnitudes_of_another_model_are_refused(golden: Golden, tmp_path: Path) -> None:
    settings = AdapterConfig(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=True)
    path = "model.layers.{}.self_attn.q_proj"
    parts = (torch.ones(2, 64), torch.ones(32, 2), torch.ones(32))
    save_adapter(tmp_path / "a", settings, {path.format(layer): parts for layer in (0, 1)})
    words = r"layers\.0\.self_attn\.q_proj has \[64, 64\], the adapter \[32, 64\]"
    with pytest.raises(CheckpointError, match=words):
        load_model(golden("llama"), adapter=tmp_path / "a")


def test_the_configuration_file_says_that_it_is_dora(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config(tiny_model, write_rows(4), run, max_steps=1, target_modules="qv"), console=False)
    raw = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert raw["use_dora"] is True
    names = load_file(run / "adapter" / "adapter_model.safetensors").keys()
    magnitudes = [name for name in names if name.endswith("_proj.lora_magnitude_vector")]
    assert len(names) == 3 * len(magnitudes) == 12
