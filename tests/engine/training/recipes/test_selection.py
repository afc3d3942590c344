"""Which projections an adapter is on: layers, exclusions and patterns, in the run and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import Simulations, plan
from engine.model_sources.adapter.peft import load_adapter
from engine.model_sources.load_model import load_model
from engine.model_sources.open import describe_model
from engine.training.adapters.selection import layers_are_alike, layers_of, selection
from engine.training.trainable import make_trainable
from engine.verbs.training.train import train
from models.config.model_config import ModelConfig
from tests.support.small_runs import adapter_bytes, small_run
from tests.support.tiny_model import GOLDEN

Rows = Callable[..., Path]


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    return describe_model(GOLDEN / "llama").config


def settings(**changes: object) -> TrainConfig:
    return TrainConfig(model="m", data="d", **changes)


def paths(model: ModelConfig, **changes: object) -> set[str]:
    return {projection.path for projection in selection(settings(**changes), model)}


def test_layers_are_numbers_ranges_and_open_ranges() -> None:
    assert layers_of("8-11,3,14-", 16) == [3, 8, 9, 10, 11, 14, 15]
    assert layers_of(None, 4) == []
    for wrong in ("4", "2-9", "3-1"):
        with pytest.raises(ConfigError, match="the layers 0 to 3"):
            layers_of(wrong, 4)


@pytest.mark.parametrize("given", [[0, 1], "0,1", "0-1", "0-"])
def test_layers_come_in_the_spellings_of_configurations(given: object, llama: ModelConfig) -> None:
    assert len(paths(llama, layers=given, target_modules="qv")) == 4


def test_a_pattern_matches_whole_names_and_a_list_matches_endings(llama: ModelConfig) -> None:
    one = {"model.layers.1.mlp.up_proj"}
    assert paths(llama, target_modules=r".*\.1\.mlp\.up_proj") == one
    assert paths(llama, target_modules=["layers.1.mlp.up_proj"]) == one
    assert paths(llama, target_modules="up_proj,down_proj", exclude_modules=r".*\.0\..*|.*down.*")
    with pytest.raises(ConfigError, match="none of the projections"):
        paths(llama, target_modules=r"up_proj|")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "q_proj("}, "neither names nor a pattern"),
        ({"target_modules": ["q_proj", ".*up"]}, "given alone, not in a list"),
        ({"layers": "1..3"}, "ranges of them"),
        ({"rank_pattern": "q_proj"}, "form q_proj=8"),
        ({"rank_pattern": "q_proj=0"}, "at least 1"),
        ({"alpha_pattern": {"(": 2}}, "nor a pattern"),
    ],
)
def test_what_is_no_choice_of_modules_is_told(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_experts_are_adapted_in_all_layers_alike(tmp_path: Path) -> None:
    from engine.training.adapters.selection import check_selection

    model = describe_model(GOLDEN / "qwen3_moe").config
    assert check_selection(settings(layers="1", target_modules="attn"), model)
    with pytest.raises(ConfigError, match="experts of a qwen3_moe model"):
        check_selection(settings(layers="1"), model)


def test_ranks_and_alphas_follow_the_first_pattern(llama: ModelConfig) -> None:
    chosen = selection(
        settings(
            target_modules="q_proj,v_proj",
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 5},
            alpha_pattern="v_proj=7",
        ),
        llama,
    )
    sizes = {projection.path: (size.rank, size.alpha) for projection, size in chosen.items()}
    attention = "model.layers.{}.self_attn.{}"
    assert sizes == {
        attention.format(0, "q_proj"): (5, 32.0),
        attention.format(0, "v_proj"): (16, 7.0),
        attention.format(1, "q_proj"): (3, 32.0),
        attention.format(1, "v_proj"): (16, 7.0),
    }


def test_a_plan_counts_what_is_trained_where_layers_differ(llama: ModelConfig) -> None:
    deep = llama.with_layers(9)
    uneven = {"layers": "3-", "rank_pattern": "q_proj=3", "target_modules": "q_proj,up_proj"}
    for changes in (uneven, {"layers": "0-8", "rank_pattern": "q_proj=3"}):
        config = settings(
            method="lora", batch_size=1, max_length=16, gradient_checkpointing="full", **changes
        )
        assert layers_are_alike(config, deep) == (changes is not uneven)
        plans = [
            plan(deep, config, gpu=False, dtype=torch.float32, simulations=Simulations(whole))
            for whole in (False, True)
        ]
        assert plans[0].step == plans[1].step
        sizes = selection(config, deep).items()
        assert plans[0].trainable == sum(s.rank * (p.rows + p.columns) for p, s in sizes)


def test_the_adapter_of_some_layers_is_resumed_and_read_back(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    changes = {
        "method": "lora", "layers": "1", "target_modules": "attn", "exclude_modules": ["k_proj"],
        "rank_pattern": "q_proj=3", "alpha_pattern": "o_proj=9", "lora_rank": 4,
        "use_rslora": True,
    }  # fmt: skip
    data = write_rows(9)
    train(small_run(tiny_model, data, tmp_path / "whole", **changes), console=False)
    train(small_run(tiny_model, data, tmp_path / "run", **changes), console=False)
    (tmp_path / "run" / "checkpoint-6" / "MANIFEST.json").unlink()
    again = small_run(tiny_model, data, tmp_path / "run", resume="auto", **changes)
    train(again, console=False)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    folder = tmp_path / "run" / "adapter"
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["layers_to_transform"] == [1]
    assert raw["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert (raw["rank_pattern"], raw["alpha_pattern"]) == ({"q_proj": 3}, {"o_proj": 9})
    read = load_adapter(folder)
    assert {m.rpartition(".")[2]: round(s * s, 6) for m, s in read.scales.items()} == {
        "q_proj": round(32 * 32 / 3, 6), "v_proj": 256.0, "o_proj": 20.25,
    }  # fmt: skip
    model = load_model(tiny_model, adapter=folder)
    trained = load_model(tiny_model)
    make_trainable(trained, settings(**changes), None)
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == sum(p.requires_grad for p in trained.parameters()) == 6
    assert model is not None
