"""Pairs of experts in PEFT's fused form, and what the configuration says of them."""

import json
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.experts import PARAMETERS, divide, fuse
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.safetensors.file import SafetensorsFile

MLP = "model.layers.1.mlp"
SIZES = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
Pairs = dict[str, tuple[torch.Tensor, ...]]


def pairs(*projections: str, rank: int = 3, shared: bool = True) -> Pairs:
    pairs: Pairs = {
        f"{MLP}.experts.{expert}.{name}": (
            torch.randn(rank, SIZES[name][1]),
            torch.randn(SIZES[name][0], rank),
        )
        for expert in range(4)
        for name in projections
    }
    if shared:
        pairs[f"{MLP}.shared_expert.up_proj"] = (torch.randn(rank, 8), torch.randn(5, rank))
    return pairs


def config(*targets: str, fused: bool, use_rslora: bool = False) -> AdapterConfig:
    return AdapterConfig(3, 6.0, list(targets), fused_experts=fused, use_rslora=use_rslora)


def same(left: Pairs, right: Pairs) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def divided(fused: Pairs, rank: int = 3) -> Pairs:
    def rank_of(parameter: str) -> int:
        return 2 * rank if parameter.endswith("gate_up_proj") else rank

    return divide(fused, rank_of, PARAMETERS)[0]


@pytest.mark.parametrize(
    "projections",
    [("gate_proj", "up_proj", "down_proj"), ("up_proj",), ("down_proj",), ("gate_proj", "up_proj")],
)
def test_fused_pairs_come_apart_again(projections: tuple[str, ...]) -> None:
    made = pairs(*projections)
    fused = fuse(made)
    assert set(fused) == {
        f"{MLP}.experts", f"{MLP}.experts.base_layer", f"{MLP}.shared_expert.up_proj",
    }  # fmt: skip
    assert same(divided(fused), made)


def test_a_fused_pair_is_the_same_map_as_its_experts() -> None:
    made = pairs("gate_proj", "up_proj", "down_proj")
    a, b = fuse(made)[f"{MLP}.experts.base_layer"]
    a, b = a.view(4, 6, 8), b.reshape(24, 6, 4).permute(2, 0, 1)
    for expert in range(4):
        both = [made[f"{MLP}.experts.{expert}.{name}"] for name in ("gate_proj", "up_proj")]
        want = torch.cat([low_b @ low_a for low_a, low_b in both])
        assert torch.allclose(b[expert] @ a[expert], want, atol=1e-5)


def test_a_pair_that_mixes_gate_and_up_gives_both_all_of_a() -> None:
    fused = fuse(pairs("gate_proj", "up_proj", "down_proj"))
    a, b = fused[f"{MLP}.experts.base_layer"]
    b += 1.0
    joint = b.reshape(24, 6, 4).permute(2, 0, 1) @ a.view(4, 6, 8)
    apart = divided(fused)
    for expert in range(4):
        both = [apart[f"{MLP}.experts.{expert}.{name}"] for name in ("gate_proj", "up_proj")]
        assert torch.allclose(torch.cat([lb @ la for la, lb in both]), joint[expert], atol=1e-5)
        assert {la.shape[0] for la, _ in both} == {6}


def test_a_pair_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair of rank 10"):
        divided(fuse(pairs("gate_proj", "up_proj")), 5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_an_adapter_of_experts_is_saved_and_read(
    fused: bool, use_rslora: bool, tmp_path: Path
) -> None:
    made = pairs("gate_proj", "up_proj", "down_proj")
    asked = config("gate_proj", "up_proj", "down_proj", fused=fused, use_rslora=use_rslora)
    save_adapter(tmp_path, asked, made)
    names = SafetensorsFile(tmp_path / "adapter_model.safetensors").keys()
    assert len(names) == (6 if fused else 26)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["lora_dropout"] == 0.0
    assert len(raw["target_parameters"]) == (2 if fused else 1)
    assert bool(raw["rank_pattern"]) == fused
    adapter = load_adapter(tmp_path)
    loaded, read = adapter.config, adapter.pairs
    assert loaded.scale == pytest.approx(asked.scale)
    assert same(dict(read), made)


def test_a_pattern_of_another_rank_is_refused(tmp_path: Path) -> None:
    made = pairs("gate_proj", "up_proj", "down_proj")
    save_adapter(tmp_path, config("gate_proj", "up_proj", "down_proj", fused=True), made)
    path = tmp_path / "adapter_config.json"
    other = {"rank_pattern": {r".*\.gate_up_proj": 5}}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(CheckpointError, match="no pair of rank 5"):
        load_adapter(tmp_path)


def test_a_pattern_of_another_alpha_is_the_scale_of_its_experts(tmp_path: Path) -> None:
    made = pairs("gate_proj", "up_proj", "down_proj")
    save_adapter(tmp_path, config("gate_proj", "up_proj", "down_proj", fused=True), made)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["alpha_pattern"] |= {"experts.down_proj": 12}
    path.write_text(json.dumps(raw))
    scales = load_adapter(tmp_path).scales
    assert scales[f"{MLP}.experts.2.down_proj"] == 4.0
    assert scales[f"{MLP}.experts.2.up_proj"] == scales[f"{MLP}.shared_expert.up_proj"] == 2.0
