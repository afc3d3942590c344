"""Parts of a tensor are together the tensor, whatever stands between it and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.exporting.gguf_file import write_gguf
from engine.exporting.merging import BelowPairs
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.peft import load_adapter
from engine.model_sources.export import export_hf_directory, write_directory
from engine.model_sources.gguf.source import GGUFSource
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.interface import row_parts as interface
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import MakesParts, row_parts
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import MaskedSource, Pruning
from engine.pruning.apply import CutSource
from engine.pruning.reconstruction.repair import Change, RepairedSource
from engine.pruning.structures.views import NarrowSource, ShallowSource

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
ROWS = 9
"""Rows of a part of a matrix (128, 64): no divisor of 128."""
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "head": ({}, {f"{HEAD}.lora_A.weight": (4, 64), f"{HEAD}.lora_B.weight": (128, 4)}),
    "dora of the head": (
        {"use_dora": True},
        {
            f"{HEAD}.lora_A.weight": (4, 64),
            f"{HEAD}.lora_B.weight": (128, 4),
            f"{HEAD}.lora_magnitude_vector": (128,),
        },
    ),
    "pissa of the head": (
        {"init_lora_weights": "pissa"},
        {f"{HEAD}.lora_A.weight": (4, 64), f"{HEAD}.lora_B.weight": (128, 4)},
    ),
    "embedding": (
        {},
        {
            f"{EMBEDDING}.lora_embedding_A": (4, 128),
            f"{EMBEDDING}.lora_embedding_B": (64, 4),
        },
    ),
    "dora of the embedding": (
        {"use_dora": True},
        {
            f"{EMBEDDING}.lora_embedding_A": (4, 128),
            f"{EMBEDDING}.lora_embedding_B": (64, 4),
            f"{EMBEDDING}.lora_magnitude_vector": (64,),
        },
    ),
    "single tokens": (
        {"trainable_token_indices": [100, 3, 8, 9, 127]},
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (5, 64)},
    ),
    "a copy of the head": ({"modules_to_save": ["lm_head"]}, {f"{HEAD}.weight": (128, 64)}),
    "head above its own weight": (
        {},
        {
            f"{HEAD}.base_layer.weight": (128, 64),
            f"{HEAD}.lora_A.weight": (4, 64),
            f"{HEAD}.lora_B.weight": (128, 4),
        },
    ),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "PART", ROWS * 64)


def write_adapter(folder: Path, kind: str) -> Path:
    keys, shapes = ADAPTERS[kind]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
    }
    pairs = {name.partition(".lora_")[0] for name in shapes if ".lora_" in name}
    targets = sorted(path.rpartition(".")[2] for path in pairs)
    config |= {"target_modules": targets, "base_model_name_or_path": "x"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    torch.manual_seed(1)
    tensors = {PREFIX + name: torch.rand(shape) / 4 for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def require_same(source: ModelSource) -> int:
    """Compare every tensor with its parts; returns how many came in several."""
    several = 0
    for name in source.names():
        parts = [part.clone() for part in row_parts(source, name)]
        whole = source.tensor(name)
        # Products of some rows may be added up in another order than those of all.
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6, msg=name)
        assert all(part.dtype == whole.dtype for part in parts)
        if whole.dim() == 2:
            assert max(len(part) * part.shape[1] for part in parts) <= max(
                ROWS * 64, whole.shape[1]
            )
        several += len(parts) > 1
    return several


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # an untied head, a tied one
def test_parts_of_an_adapted_model_are_its_tensors(family: str, kind: str, tmp_path: Path) -> None:
    base = open_model_source(GOLDEN / family)
    source = AdaptedSource(base, load_adapter(write_adapter(tmp_path / "adapter", kind)))
    assert source.folded
    assert isinstance(source, MakesParts)
    assert require_same(source)
    # What is written in parts and read again is what the source says.
    identity = write_directory(source, tmp_path / "out", lambda _, t: t, torch.float32, 10**9)
    written = HFDirectory(identity.output)
    assert written.names() == source.names()
    for name in source.names():
        torch.testing.assert_close(written.tensor(name), source.tensor(name).float())


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_parts_of_a_gguf_model_are_its_tensors(kind: str, tmp_path: Path) -> None:
    base = open_model_source(GOLDEN / "llama")
    write_gguf(base, tmp_path / "m.gguf", kind)
    source = GGUFSource(tmp_path / "m.gguf")
    assert require_same(source)
    write_gguf(source, tmp_path / "again.gguf", "f32")
    again = GGUFSource(tmp_path / "again.gguf")
    for name in source.names():
        assert torch.equal(again.tensor(name), source.tensor(name).float()), name


def views(base: ModelSource) -> dict[str, ModelSource]:
    o = "model.layers.0.self_attn.o_proj.weight"
    staying = torch.arange(base.config.intermediate_size - 3)
    change = Change(torch.zeros(base.shape(o)))
    return {
        "masked": MaskedSource(base, Pruning("mask", {0: (1,)}, {})),
        "cut": CutSource(base, {0: (0, 1), 1: (0, 1)}, {"num_attention_heads": 2}),
        "repaired": RepairedSource(base, {o: change}),
        "narrow": NarrowSource(base, dict.fromkeys((0, 1), staying)),
        "shallow": ShallowSource(base, [1]),
    }


@pytest.mark.parametrize("view", ["masked", "cut", "repaired", "narrow", "shallow", "below"])
def test_a_view_passes_on_the_parts_of_what_it_does_not_change(view: str, tmp_path: Path) -> None:
    write_gguf(open_model_source(GOLDEN / "llama"), tmp_path / "m.gguf", "q8_0")
    base = Recorder(tmp_path / "m.gguf")
    adapter = load_adapter(write_adapter(tmp_path / "adapter", "head"))
    below = BelowPairs(AdaptedSource(base, adapter), "original", double_quant=True)
    source = below if view == "below" else views(base)[view]
    assert isinstance(source, MakesParts)
    assert require_same(source)
    base.whole.clear()
    export_hf_directory(source, tmp_path / "out")
    assert not base.whole & {"lm_head.weight", "model.embed_tokens.weight"}
    assert "model.layers.1.mlp.up_proj.weight" in base.whole


class Recorder(GGUFSource):
    """Notes which tensors were read whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.whole: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        self.whole.add(name)
        return super().tensor(name)
