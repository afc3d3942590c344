"""Files written here, read by transformers and PEFT, and theirs read here."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.export import export_hf_directory
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.open import open_model_source
from engine.verbs.models.merge import merge

pytestmark = pytest.mark.interop

Golden = Callable[[str], Path]
IDS = torch.tensor([[1, 5, 9, 100, 17, 3, 64, 2]])
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def peft_adapter(base: Path, target: Path, **changes: Any) -> Any:
    """A random adapter that PEFT made and saved; returns its model."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)
    model = get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(target)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_adapter_of_peft_merges_to_the_logits_of_peft(
    golden: Golden, tmp_path: Path, family: str, rslora: bool, dora: bool
) -> None:
    model = peft_adapter(golden(family), tmp_path / "adapter", use_rslora=rslora, use_dora=dora)
    adapter = load_adapter(tmp_path / "adapter")
    config, pairs = adapter.config, adapter.pairs
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 6, rslora)
    assert sorted(config.target_modules) == sorted(TARGETS)
    assert len(pairs) == 2 * len(TARGETS)
    merge(golden(family), tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(model), atol=2e-5)
    assert (logits(load(golden(family))) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_saved_here_loads_in_peft_and_in_transformers(
    golden: Golden, tmp_path: Path, changes: dict[str, bool]
) -> None:
    peft_adapter(golden("llama"), tmp_path / "theirs", **changes)
    adapter = load_adapter(tmp_path / "theirs")
    config, pairs = adapter.config, adapter.pairs
    save_adapter(tmp_path / "ours", config, pairs)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    expected = logits(PeftModel.from_pretrained(load(golden("llama")), tmp_path / "theirs"))
    assert torch.equal(
        logits(PeftModel.from_pretrained(load(golden("llama")), tmp_path / "ours")), expected
    )
    assert torch.equal(logits(load(tmp_path / "ours")), expected)


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2_swa", "qwen3_yarn", "mistral"])
def test_an_exported_model_has_the_logits_of_the_original(
    golden: Golden, tmp_path: Path, family: str
) -> None:
    export_hf_directory(open_model_source(golden(family)), tmp_path / "out", max_shard_size=50_000)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(golden(family))))


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_model_saved_by_transformers_is_read(
    golden: Golden, tmp_path: Path, shard_size: str
) -> None:
    load(golden("qwen3")).save_pretrained(tmp_path, max_shard_size=shard_size)
    saved, original = HFDirectory(tmp_path), HFDirectory(golden("qwen3"))
    assert saved.config == original.config
    for name in original.names():
        assert torch.equal(saved.tensor(name), original.tensor(name))


def test_smollm2_equals_transformers_own_reading_of_the_file(
    smollm2_gguf: Path, smollm2_directory: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).state_dict()
    ours = HFDirectory(smollm2_directory)
    assert {name for name in theirs if name != "lm_head.weight"} == set(ours.names())
    assert all(torch.equal(ours.tensor(name), theirs[name]) for name in ours.names())
    del theirs
    gc.collect()


def test_an_adapter_on_smollm2_merges_from_the_gguf_file(
    smollm2_gguf: Path, smollm2_directory: Path, tmp_path: Path
) -> None:
    module = "model.layers.4.self_attn.q_proj"
    config = AdapterConfig(r=8, lora_alpha=16, target_modules=[module])
    pair = (torch.randn(8, 576) * 0.02, torch.randn(576, 8) * 0.02)
    save_adapter(tmp_path / "adapter", config, {module: pair})
    result = merge(smollm2_gguf, tmp_path / "adapter", tmp_path / "merged")
    assert (result.merged, result.written.tensors) == (1, 272)
    adapted = PeftModel.from_pretrained(load(smollm2_directory), tmp_path / "adapter")
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(adapted), atol=2e-4)
