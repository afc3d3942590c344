import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.hf_directory import HFDirectory
from engine.verbs.models.merge import merge
from kernels.nf4 import dequantize, quantize
from tests.support.quantised_gguf import write_q8_gguf

Golden = Callable[[str], Path]
Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
HEAD = "lm_head"


def write_adapter(
    folder: Path,
    base: Path,
    modules: tuple[str, ...] = (Q0, UP1),
    rank: int = 3,
    factor: float = 1.0,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Save a random adapter for `modules` of the model in `base`; returns scale * B @ A of each."""
    stored = load_file(base / "model.safetensors")
    config = AdapterConfig(
        r=rank,
        lora_alpha=6,
        target_modules=sorted(modules),
        **changes,
    )
    pairs = {}
    for module in modules:
        out, into = stored[f"{module}.weight"].shape
        pairs[module] = (torch.randn(rank, into) * factor, torch.randn(out, rank) * factor)
    save_adapter(folder, config, pairs)
    return {
        f"{module}.weight": (config.scale * b.double() @ a.double())
        for module, (a, b) in pairs.items()
    }


def half_precision_copy(source: Path, target: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, target / "model.safetensors"
    )
    return target


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merged_weights_are_base_plus_scaled_product(
    golden: Golden, tmp_path: Path, family: str, rslora: bool
) -> None:
    deltas = write_adapter(tmp_path / "a", golden(family), use_rslora=rslora)
    result = merge(golden(family), tmp_path / "a", tmp_path / "out")
    stored = load_file(golden(family) / "model.safetensors")
    merged = HFDirectory(tmp_path / "out")
    for name, weight in stored.items():
        expected = (weight.double() + deltas.get(name, 0)).float()
        if name in deltas:
            assert torch.allclose(merged.tensor(name), expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(merged.tensor(name), weight)
    assert result.output == tmp_path / "out"
    assert (result.merged, result.requantised) == (2, 0)
    assert result.written.tensors == len(stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(
    golden: Golden, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = half_precision_copy(golden("llama"), tmp_path / "base", dtype)
    deltas = write_adapter(tmp_path / "a", base)
    merge(base, tmp_path / "a", tmp_path / "out")
    merged = HFDirectory(tmp_path / "out")
    for name, delta in deltas.items():
        exact = load_file(base / "model.safetensors")[name].double() + delta
        written = merged.tensor(name)
        assert written.dtype == dtype
        # One rounding is at most half a unit in the last place; the sum in fp32 adds next to none.
        unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((written.double() - exact).abs() <= 0.5 * unit + 1e-6).all()


def test_an_untouched_base_is_kept_bit_for_bit(golden: Golden, tmp_path: Path) -> None:
    before = (golden("llama") / "model.safetensors").read_bytes()
    write_adapter(tmp_path / "a", golden("llama"))
    merge(golden("llama"), tmp_path / "a", tmp_path / "out")
    assert (golden("llama") / "model.safetensors").read_bytes() == before


def test_merging_onto_the_dequantised_weights_keeps_what_training_saw(
    golden: Golden, tmp_path: Path
) -> None:
    deltas = write_adapter(tmp_path / "a", golden("llama"))
    result = merge(golden("llama"), tmp_path / "a", tmp_path / "out", onto="dequantised")
    stored = load_file(golden("llama") / "model.safetensors")
    merged = HFDirectory(tmp_path / "out")
    assert (result.merged, result.requantised) == (2, 14)
    for name, weight in stored.items():
        expected = weight.double()
        if "_proj." in name:
            expected = dequantize(quantize(weight), dtype=torch.float32).double()
        expected = expected + deltas.get(name, 0)
        assert torch.allclose(merged.tensor(name), expected.float(), rtol=1e-6, atol=1e-6), name


def test_the_head_can_be_merged_where_it_is_not_tied(golden: Golden, tmp_path: Path) -> None:
    deltas = write_adapter(tmp_path / "a", golden("llama"), (HEAD,))
    merge(golden("llama"), tmp_path / "a", tmp_path / "out")
    stored = load_file(golden("llama") / "model.safetensors")["lm_head.weight"]
    written = HFDirectory(tmp_path / "out").tensor("lm_head.weight")
    assert torch.allclose(written, (stored + deltas["lm_head.weight"]).float(), atol=1e-6)


def test_a_head_that_was_tied_is_stored_beside_the_embedding(
    golden: Golden, tmp_path: Path
) -> None:
    config = AdapterConfig(r=2, lora_alpha=2, target_modules=["lm_head"])
    save_adapter(tmp_path / "a", config, {HEAD: (torch.ones(2, 64), torch.ones(128, 2))})
    result = merge(golden("llama3"), tmp_path / "a", tmp_path / "out")
    merged, base = HFDirectory(tmp_path / "out"), HFDirectory(golden("llama3"))
    assert not merged.config.tie_word_embeddings
    assert merged.raw_config["tie_word_embeddings"] is False
    embedding = base.tensor("model.embed_tokens.weight")
    assert torch.equal(merged.tensor("model.embed_tokens.weight"), embedding)
    assert torch.allclose(merged.tensor("lm_head.weight"), embedding + 2.0)
    assert result.merged == 1


def test_adapter_modules_without_a_weight_are_all_named(golden: Golden, tmp_path: Path) -> None:
    strays = {
        f"model.layers.{layer}.mlp.up_proj": (torch.ones(2, 64), torch.ones(96, 2))
        for layer in (1, 7, 8)
    }
    wrong = {Q0: (torch.ones(2, 32), torch.ones(64, 2))}
    config = AdapterConfig(r=2, lora_alpha=2, target_modules=["up_proj", "q_proj"])
    save_adapter(tmp_path / "a", config, strays | wrong)
    with pytest.raises(CheckpointError) as caught:
        merge(golden("llama"), tmp_path / "a", tmp_path / "out")
    message = str(caught.value)
    assert "model.layers.7.mlp.up_proj, model.layers.8.mlp.up_proj" in message
    assert f"{Q0} has [64, 64], the adapter [64, 32]" in message
    assert "layers.1" not in message
    assert not (tmp_path / "out").exists()


def test_a_merge_that_overflows_is_refused_and_leaves_nothing(
    golden: Golden, tmp_path: Path
) -> None:
    base = half_precision_copy(golden("llama"), tmp_path / "base", torch.float16)
    write_adapter(tmp_path / "a", base, factor=1000.0)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds values that are not finite"):
        merge(base, tmp_path / "a", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_base_that_is_not_finite_is_refused_when_quantised(
    golden: Golden, tmp_path: Path
) -> None:
    shutil.copytree(golden("llama"), tmp_path / "base")
    tensors = load_file(golden("llama") / "model.safetensors")
    tensors[f"{Q0}.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "a", golden("llama"))
    with pytest.raises(CheckpointError, match=f"tensor {Q0}"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", onto="dequantised")


def test_shards_and_type_are_as_asked(golden: Golden, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", golden("llama"))
    result = merge(
        golden("llama"), tmp_path / "a", tmp_path / "out", max_shard_size=50_000, dtype="bfloat16"
    )
    merged = HFDirectory(tmp_path / "out")
    assert result.written.shards > 2
    assert {merged.dtype(name) for name in merged.names()} == {torch.bfloat16}


def test_an_unknown_way_or_an_occupied_output_is_refused(golden: Golden, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", golden("llama"))
    with pytest.raises(ConfigError, match="onto"):
        merge(golden("llama"), tmp_path / "a", tmp_path / "out", onto="base")
    with pytest.raises(ConfigError, match="exists already"):
        merge(golden("llama"), tmp_path / "a", tmp_path / "a")


def test_a_gguf_base_merges_without_loss_unless_a_type_is_named(
    golden: Golden, tmp_path: Path
) -> None:
    write_q8_gguf(tmp_path / "base.gguf", golden("qwen2"))
    deltas = write_adapter(tmp_path / "a", golden("qwen2"))
    merge(tmp_path / "base.gguf", tmp_path / "a", tmp_path / "out")
    merge(tmp_path / "base.gguf", tmp_path / "a", tmp_path / "half", dtype="float16")
    full, half = HFDirectory(tmp_path / "out"), HFDirectory(tmp_path / "half")
    for name, weight in load_file(golden("qwen2") / "model.safetensors").items():
        stored = weight.numpy()
        if weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
        expected = (torch.from_numpy(stored).double() + deltas.get(name, 0)).float()
        assert torch.allclose(full.tensor(name), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(half.tensor(name), full.tensor(name).half())
