"""Adapters for other programs: scale in B, one rank, and llama.cpp's order of rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

import engine
from cli import main as cli
from engine.errors import ConfigError
from engine.exporting.gguf_adapter import gguf_pairs
from engine.exporting.gguf_layout import layout
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.interface.stops import adapter_stops
from engine.model_sources.open import open_model_source
from engine.verbs.models.export import export_adapter, export_gguf
from models.tensor_layout import Layout
from models.tensor_names import expected_tensors

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TARGETS = ("q_proj", "k_proj", "o_proj", "down_proj", "in_proj_qkvz", "in_proj_qkv", "out_proj")


def adapter(folder: Path, family: str = "llama", rank: int = 4) -> Path:
    """An adapter on some projections, under rsLoRA and with another rank for q."""
    shapes = expected_tensors(open_model_source(str(GOLDEN / family)).config)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS and "experts" not in name and len(shape) == 2:
            r = 2 * rank if module.endswith("q_proj") else rank
            tensors[module] = (torch.randn(r, shape[1]), torch.randn(shape[0], r))
    names = sorted({module.rpartition(".")[2] for module in tensors})
    plain = {m: t for m, t in tensors.items() if not m.endswith("q_proj")}
    config = AdapterConfig(rank, 8.0, names, use_rslora=False)
    save_adapter(folder, config, plain)
    # The pairs of q under a pattern, which save_adapter does not write.
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "adapter_model.safetensors")
    for module in tensors.keys() - plain.keys():
        for part, tensor in zip(("lora_A", "lora_B"), tensors[module], strict=True):
            stored[f"base_model.model.{module}.{part}.weight"] = tensor.contiguous()
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw |= {"rank_pattern": {"q_proj": 2 * rank}, "alpha_pattern": {"k_proj": 3}}
    path.write_text(json.dumps(raw | {"use_rslora": True}))
    return folder


def logits(folder: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = engine.load_model(folder, adapter=adapter)(torch.arange(2, 30)[None])
    return made


def test_a_portable_adapter_computes_the_same_with_one_rank(tmp_path: Path) -> None:
    base = GOLDEN / "llama"
    before = adapter(tmp_path / "a")
    notes = export_adapter(adapter=before, output=tmp_path / "b").notes
    raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (8, 8, False)
    assert not raw.get("rank_pattern")
    assert not raw.get("alpha_pattern")
    assert {a.shape[0] for a, *_ in load_adapter(tmp_path / "b").pairs.values()} == {8}
    assert torch.allclose(logits(base, before), logits(base, tmp_path / "b"), atol=1e-4)
    assert any("vLLM: loads it" in note for note in notes)


def test_an_adapter_can_be_written_as_it_is_with_what_others_would_make_of_it(
    tmp_path: Path,
) -> None:
    base, before = GOLDEN / "llama", adapter(tmp_path / "a")
    notes = export_adapter(adapter=before, output=tmp_path / "b", portable=False).notes
    raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (raw["r"], raw["rank_pattern"], raw["alpha_pattern"], raw["use_rslora"]) == (
        4, {"q_proj": 8}, {"k_proj": 3}, True,
    )  # fmt: skip
    assert torch.equal(logits(base, before), logits(base, tmp_path / "b"))
    assert [note for note in notes if "--portable" in note] == [
        "vLLM: reads no patterns, so its scale is wrong; write it with --portable.",
        "llama.cpp: reads no patterns, so its scale is wrong; write it with --portable.",
    ]
    config = AdapterConfig(2, 4.0, ["q_proj"], use_dora=True)
    rows = open_model_source(str(base)).shape("model.layers.0.self_attn.q_proj.weight")
    parts = (torch.randn(2, rows[1]), torch.randn(rows[0], 2), torch.ones(rows[0]))
    pairs = {f"model.layers.{layer}.self_attn.q_proj": parts for layer in (0, 1)}
    save_adapter(tmp_path / "dora", config, pairs)
    notes = export_adapter(adapter=tmp_path / "dora", output=tmp_path / "c", portable=False).notes
    assert sum("refuses DoRA" in note for note in notes) == 2
    assert torch.equal(logits(base, tmp_path / "dora"), logits(base, tmp_path / "c"))


@pytest.mark.parametrize("portable", [True, False])
def test_what_a_run_left_beside_its_adapter_goes_along(portable: bool, tmp_path: Path) -> None:
    before = adapter(tmp_path / "a")
    left = {
        "base.json": '{"quantization": "nf4"}',
        "generation_config.json": '{"eos_token_id": [7, 9]}',
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    for name, text in left.items():
        (before / name).parent.mkdir(exist_ok=True)
        (before / name).write_text(text)
    export_adapter(adapter=before, output=tmp_path / "b", portable=portable)
    for name, text in left.items():
        assert (tmp_path / "b" / name).read_text() == text
    assert adapter_stops(tmp_path / "b") == (7, 9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next", "qwen3_5_vl"])
def test_pairs_lie_as_the_tensors_of_the_gguf_file(family: str, tmp_path: Path) -> None:
    source = open_model_source(str(GOLDEN / family))
    read = load_adapter(adapter(tmp_path / "a", family))
    pairs = gguf_pairs(source, read)
    layouts = {tensor.name: tensor for tensor in layout(source.config)}
    assert len(pairs) >= len(read.pairs)
    for name, (a, b) in pairs.items():
        tensor = layouts[name]
        paths = Layout(source.config.nested)
        module = paths.path(str(tensor.parameter)).removesuffix(".weight")
        a0, b0, *_ = read.pairs[module]
        want = tensor.make(read.scales[module] * (b0 @ a0))
        assert torch.allclose(b @ a, want, atol=1e-4), name


def test_the_file_has_llama_cpp_s_factor(tmp_path: Path) -> None:
    before = adapter(tmp_path / "a")
    result = export_gguf(model=str(GOLDEN / "llama"), adapter=before, output=tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    pairs = gguf_pairs(open_model_source(str(GOLDEN / "llama")), load_adapter(before))
    assert len(stored) == 2 * len(pairs) == 2 * result.tensors
    for name, (a, b) in pairs.items():
        factor = alpha / stored[f"{name}.lora_a"].shape[0]
        made = factor * stored[f"{name}.lora_b"] @ stored[f"{name}.lora_a"]
        assert torch.allclose(made, b @ a, atol=1e-4)


def test_what_others_do_not_compute_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = str(GOLDEN / "llama"), tmp_path / "dora"
    config = AdapterConfig(2, 4.0, ["q_proj"], use_dora=True)
    rows = open_model_source(base).shape("model.layers.0.self_attn.q_proj.weight")
    parts = (torch.randn(2, rows[1]), torch.randn(rows[0], 2), torch.ones(rows[0]))
    save_adapter(folder, config, {"model.layers.0.self_attn.q_proj": parts})
    words = ["--adapter", str(folder), "--output"]
    assert cli.main(["export", "adapter", *words, str(tmp_path / "p")]) == 2
    assert "engine merge" in capsys.readouterr().err
    assert cli.main(["export", "gguf", "--model", base, *words, str(tmp_path / "p.gguf")]) == 2
    assert "no magnitudes" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora"]
    shutil.rmtree(folder)
    save_adapter(folder, replace(config, use_dora=False), {"model.layers.0.mlp.other": parts[:2]})
    with pytest.raises(engine.CheckpointError):
        export_gguf(model=base, adapter=folder, output=tmp_path / "p.gguf")
    with pytest.raises(ConfigError, match="for a model"):
        export_gguf(model=base, adapter=folder, output=tmp_path / "p.gguf", modelfile=True)
