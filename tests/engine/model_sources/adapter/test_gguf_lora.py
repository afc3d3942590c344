"""LoRA adapters of llama.cpp: the same model as the adapter they were made from."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import CheckpointError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from engine.verbs.models.merge import merge

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden"
IDS = (torch.arange(40) * 7 % 61 + 1).reshape(2, 20)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"attn_q": 4, "attn_k": 2}
LLAMAS = ("llama", "mistral")
"""Families that llama.cpp converts as llamas."""
Pairs = dict[str, tuple[torch.Tensor, ...]]


def random_pairs(family: str) -> Pairs:
    weights = load_file(GOLDEN / family / "model.safetensors")
    pairs: Pairs = {}
    for layer in range(2):
        for name in NAMES:
            rows, columns = weights[f"model.layers.{layer}.{name}.weight"].shape
            pair = (torch.randn(3, columns) * 0.1, torch.randn(rows, 3) * 0.1)
            pairs[f"model.layers.{layer}.{name}"] = pair
    return pairs


def interleaved(b: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores those of a llama's queries and keys."""
    halves = b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b.shape))


def write(path: Path, family: str, pairs: Pairs, alpha: float, kind: str = "adapter") -> Path:
    writer = gguf.GGUFWriter(path, "llama" if family in LLAMAS else "qwen2")
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, (a, b) in pairs.items():
        _, _, layer, rest = module.split(".", 3)
        name = f"blk.{layer}.{NAMES[rest]}.weight"
        rows = b.numpy()
        if family in LLAMAS and NAMES[rest] in HEADS:
            rows = interleaved(rows, HEADS[NAMES[rest]])
        writer.add_tensor(f"{name}.lora_a", a.numpy())
        writer.add_tensor(f"{name}.lora_b", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alpha", [6.0, 0.0])
@pytest.mark.parametrize("family", [*LLAMAS, "qwen2"])
def test_a_gguf_adapter_is_the_adapter_it_was_made_from(
    family: str, alpha: float, tmp_path: Path
) -> None:
    pairs = random_pairs(family)
    # Without an alpha llama.cpp adds B A as it is.
    config = AdapterConfig(3, alpha or 3.0, [name.rpartition(".")[2] for name in NAMES])
    save_adapter(tmp_path / "peft", config, pairs)
    file = write(tmp_path / "lora.gguf", family, pairs, alpha)
    want = load_model(GOLDEN / family, adapter=tmp_path / "peft")(IDS)
    assert torch.allclose(load_model(GOLDEN / family, adapter=file)(IDS), want, atol=1e-6)
    assert (load_model(GOLDEN / family)(IDS) - want).abs().max() > 1e-2
    assert merge(GOLDEN / family, file, tmp_path / "merged").merged == len(pairs)
    assert torch.allclose(load_model(tmp_path / "merged")(IDS), want, atol=1e-5)


def test_what_is_no_lora_adapter_is_named(tmp_path: Path) -> None:
    pairs = random_pairs("qwen2")
    file = write(tmp_path / "model.gguf", "qwen2", pairs, 6.0, kind="model")
    with pytest.raises(CheckpointError, match="type 'model', not of a LoRA adapter"):
        load_model(GOLDEN / "qwen2", adapter=file)
    file = write(tmp_path / "other.gguf", "qwen2", pairs, 6.0)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(GOLDEN / "qwen3_moe", adapter=file)
    (tmp_path / "text.gguf").write_text("hello, this is no such file at all")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_model(GOLDEN / "qwen2", adapter=tmp_path / "text.gguf")
