"""Scores from weights against the formulas written out, and seeded controls."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.choices import Metric
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.interface.view import ModelSourceView
from engine.model_sources.open import open_model_source
from engine.pruning.scores import LayerScores, prunable_heads, weight_scores
from kernels.linear.int8 import dequantize_int8, quantize_int8
from kernels.nf4 import dequantize, quantize
from models.head_slices import AttentionHeads

Golden = Callable[[str], Path]


def scores(folder: Path, metric: Metric, **options: Any) -> list[LayerScores]:
    checkpoint = open_model_source(folder)
    return weight_scores(checkpoint, prunable_heads(checkpoint, "attention"), metric, **options)


def slices(folder: Path, layer: int, heads: int, kv_heads: int) -> list[list[torch.Tensor]]:
    """q, k, v, o of every query head, cut out by plain indexing, the norm's gain in q, k and v."""
    stored = load_file(folder / "model.safetensors")
    q, k, v, o = (
        stored[f"model.layers.{layer}.self_attn.{p}_proj.weight"].double() for p in "qkvo"
    )
    dim = o.shape[1] // heads
    gain = stored[f"model.layers.{layer}.input_layernorm.weight"].double()
    q, k, v = q * gain, k * gain, v * gain
    result = []
    for head in range(heads):
        group = head * kv_heads // heads
        rows, shared = slice(head * dim, head * dim + dim), slice(group * dim, group * dim + dim)
        result.append([q[rows], k[shared], v[shared], o[:, rows]])
    return result


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2"])
def test_l2_is_the_norm_of_all_slices_of_a_head(golden: Golden, family: str) -> None:
    for scored in scores(golden(family), "l2-weights"):
        assert scored.pruned == frozenset()
        for head, parts in enumerate(slices(golden(family), scored.heads.layer, 4, 2)):
            q, k, v, o = (part.square().sum() for part in parts)
            want = ((q + k) / scored.heads.head_dim**0.5 + v + o).sqrt()
            assert float(scored.values[head]) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_yarn"])
def test_l2_leaves_out_what_a_norm_of_each_head_divides_away(golden: Golden, family: str) -> None:
    for scored in scores(golden(family), "l2-weights"):
        heads = scored.heads
        assert isinstance(heads, AttentionHeads) and heads.head_norm
        parts = slices(golden(family), heads.layer, heads.heads, heads.kv_heads)
        for head, (_, _, v, o) in enumerate(parts):
            want = (v.square().sum() + o.square().sum()).sqrt()
            assert float(scored.values[head]) == pytest.approx(float(want), rel=1e-6)


def test_the_largest_first_is_the_same_order_turned_round(golden: Golden) -> None:
    pairs = [scores(golden("llama"), metric) for metric in ("l2-weights", "l2-weights-largest")]
    for smallest, largest in zip(*pairs, strict=True):
        order = smallest.values.argsort()
        assert torch.equal(largest.values.argsort(), order.flip(0))
        assert bool((largest.values > 0).all())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ov_is_the_norm_of_the_product(golden: Golden, family: str) -> None:
    for scored in scores(golden(family), "ov"):
        heads = scored.heads
        parts = slices(golden(family), heads.layer, heads.heads, heads.kv_heads)
        for head, (_, _, v, o) in enumerate(parts):
            assert float(scored.values[head]) == pytest.approx(float((o @ v).norm()), rel=1e-6)


def test_ov_does_not_see_how_the_product_is_split(golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(golden("llama"), tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for layer in (0, 1):
        stored[f"model.layers.{layer}.self_attn.v_proj.weight"] *= 64
        stored[f"model.layers.{layer}.self_attn.o_proj.weight"] /= 64
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for metric, equal in (("ov", True), ("l2-weights", False)):
        before = torch.stack([s.values for s in scores(golden("llama"), metric)])  # type: ignore[arg-type]
        after = torch.stack([s.values for s in scores(tmp_path / "m", metric)])  # type: ignore[arg-type]
        assert torch.allclose(before, after, rtol=1e-9) == equal


def test_random_scores_are_a_function_of_the_seed(golden: Golden) -> None:
    first, again, other = (scores(golden("llama"), "random", seed=n) for n in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.values, two.values)
        assert not torch.equal(one.values, three.values)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_is_scored_by_the_values_it_computes_with(
    golden: Golden, kind: str
) -> None:
    name = "model.layers.1.self_attn.{}_proj.weight"
    stored = load_file(golden("llama") / "model.safetensors")

    def seen(projection: str) -> torch.Tensor:
        weight = stored[name.format(projection)]
        if kind == "nf4":
            return dequantize(quantize(weight), dtype=torch.float32).double()
        return dequantize_int8(quantize_int8(weight), torch.float32).double()

    v = seen("v") * stored["model.layers.1.input_layernorm.weight"].double()
    o = seen("o")
    result = scores(golden("llama"), "ov", through=kind)[1].values
    for head in range(4):
        product = o[:, head * 16 : head * 16 + 16] @ v[head // 2 * 16 : head // 2 * 16 + 16]
        assert float(result[head]) == pytest.approx(float(product.norm()), rel=1e-6)


def test_a_head_without_output_is_dead(golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(golden("llama"), tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    stored["model.layers.1.self_attn.o_proj.weight"][:, 16:32] = 0
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert [s.pruned for s in scores(tmp_path / "m", "random")] == [frozenset(), frozenset({1})]


def test_a_score_that_is_not_finite_names_its_layer(golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(golden("llama"), tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    stored["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1's"):
        scores(tmp_path / "m", "l2-weights")


class _Hybrid(ModelSourceView):
    """A model whose layer 0 has no attention heads and whose layer 1 has an output gate."""

    def __init__(self, whole: Path, *, attention: bool = True) -> None:
        super().__init__(open_model_source(whole))
        kinds = ("linear_attention", "full_attention" if attention else "linear_attention")
        self.config = replace(self.config, layer_types=kinds, attention_gate=True)


def test_layers_without_heads_are_neither_counted_nor_scored(golden: Golden) -> None:
    checkpoint = _Hybrid(golden("llama"))
    assert prunable_heads(checkpoint, "attention") == [AttentionHeads(1, 4, 2, 16, 32)]
    with pytest.raises(ConfigError, match="no layer with attention heads"):
        prunable_heads(_Hybrid(golden("llama"), attention=False), "attention")
