"""The list of memory options, what a search does with it, and a run that uses them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import MemoryPlan, plan
from engine.memory.model_shapes import preset_config
from engine.memory.options import apply_options, memory_options
from engine.memory.search import changed, choose, context_table, row_lengths, smallest
from engine.verbs.training.plan import told
from engine.verbs.training.train import train
from models.layers.context import layer_policies

GB = 10**9


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", **{"gradient_checkpointing": "selective"} | changes)


@cache
def _planned(name: str, text: str) -> MemoryPlan:
    model = preset_config(name)
    assert model is not None
    config = TrainConfig.model_validate_json(text)
    return plan(model, config, gpu=True, dtype=torch.bfloat16)


def planner(name: str) -> Callable[[TrainConfig], MemoryPlan]:
    return lambda config: _planned(name, config.model_dump_json())


def offered(config: TrainConfig, gpu: bool = True, tied: bool = False) -> list[tuple[str, object]]:
    return [(option.setting, option.value) for option in memory_options(config, gpu, tied)]


def test_the_list_of_options_is_as_long_as_the_run_allows() -> None:
    every = offered(settings())
    assert every[0] == ("embedding_on", "host") and every[-1] == ("offload", "weights")
    assert ("embedding_on", "host") not in offered(settings(), tied=True)
    names = {name for name, _ in offered(settings(), gpu=False)}
    assert names == {"mlp_tile_tokens", "loss_chunk_tokens", "head_precision", "low_memory_decode"}
    full = offered(settings(method="full"))
    assert ("head_precision", "8bit") not in full and ("offload", "weights") not in full
    assert ("offload", "weights") not in offered(settings(method="lora"))
    given = settings(mlp_tile_tokens=256, offload=("checkpoints",), low_memory_decode=True)
    names = {name for name, _ in offered(given)}
    assert names == {"embedding_on", "offload", "loss_chunk_tokens", "head_precision"}


def test_memory_options_add_up() -> None:
    config = apply_options(settings(), memory_options(settings(), True, False))
    assert config.offload == ("checkpoints", "weights")
    assert (config.mlp_tile_tokens, config.head_precision) == (512, "8bit")
    assert apply_options(settings(), []) == settings()


def test_a_search_pulls_what_is_cheap_before_it_recomputes() -> None:
    make = planner("llama-3.2-1b")
    asked = settings(batch_size=1, max_length=4096)
    none = changed(asked, gradient_checkpointing="none")
    offloaded = make(changed(none, offload=("checkpoints",))).total
    assert offloaded < make(none).total
    choice = choose(asked, offloaded, make)
    config = choice.plan.config
    assert (config.gradient_checkpointing, config.offload) == ("none", ("checkpoints",))
    assert not config.low_memory_decode and config.head_precision == "16bit"


def test_layers_share_what_is_left_of_a_budget() -> None:
    make = planner("llama-3.2-1b")
    least = smallest(settings(batch_size=1, max_length=4096), make)
    resident = changed(least, offload=("checkpoints",))
    full = make(resident).total
    selective = make(changed(resident, gradient_checkpointing="selective")).total
    budget = (full + selective) // 2
    choice = choose(resident, budget, make)
    levels = layer_policies(choice.plan.config.gradient_checkpointing, choice.plan.layers)
    assert choice.plan.total <= budget
    assert {"full", "selective"} == set(levels)
    assert list(levels) == sorted(levels)  # full first: their memory is needed the longest
    more = levels.count("full") - 1
    spec = f"full:{more},selective" if more else "selective"
    assert make(changed(choice.plan.config, gradient_checkpointing=spec)).total > budget


def test_eight_billion_parameters_train_in_what_their_layout_allows() -> None:
    make = planner("llama-3.1-8b")
    short = settings(
        batch_size=1,
        max_length=2048,
        gradient_checkpointing="full",
        embedding_on="host",
        offload=("checkpoints",),
        mlp_tile_tokens=512,
        low_memory_decode=True,
    )
    small = changed(short, head_precision="8bit")
    assert make(short).allocated <= 5.4 * GB
    assert make(small).allocated <= 4.9 * GB
    long = changed(small, max_length=2048 + 16384)
    assert make(long).allocated - make(small).allocated <= 110_000 * 16384
    assert make(changed(small, max_length=20_000)).total <= 8 * GB
    assert make(changed(small, max_length=160_000)).total <= 24 * GB
    assert make(changed(small, max_length=600_000)).total <= 80 * GB


def test_seventy_billion_parameters_train_on_a_gpu_of_24_gb() -> None:
    make = planner("llama-3.3-70b")
    streamed = settings(
        batch_size=1, max_length=2048, offload=("checkpoints", "weights"), embedding_on="host"
    )
    planned = make(streamed)
    assert planned.total <= 24 * GB
    assert planned.host > 35 * GB  # where the weights are
    assert make(changed(streamed, offload=("checkpoints",))).total > 24 * GB


def test_experts_are_streamed_and_a_search_takes_their_tokens_in_tiles() -> None:
    whole = preset_config("qwen3-30b-a3b")
    assert whole is not None
    model, made = whole.with_layers(4), {}

    def make(config: TrainConfig) -> MemoryPlan:
        text = config.model_dump_json()
        if text not in made:
            made[text] = plan(model, config, gpu=True, dtype=torch.bfloat16)
        return made[text]

    resident = settings(
        batch_size=1,
        max_length=16_384,
        target_modules="attn",
        gradient_checkpointing="full",
        embedding_on="host",
        offload=("checkpoints",),
        head_precision="8bit",
        low_memory_decode=True,
        loss_chunk_tokens=64,
    )
    streamed = changed(resident, offload=("checkpoints", "weights"))
    tiled = changed(streamed, mlp_tile_tokens=2048)
    plans = [make(config) for config in (resident, streamed, tiled)]
    base = [planned.step.owners["NF4 base"] for planned in plans]
    assert base[1] == base[0] // 2  # two layers of four
    assert plans[1].host - plans[0].host == pytest.approx(base[0], rel=0.001)
    assert base[0] > 1.28 * GB  # 604 million weights of experts a layer, half a byte each
    work = [planned.step.owners["block working set"] for planned in plans]
    assert work[2] < 0.7 * work[1]
    choice = choose(streamed, plans[2].total, make)
    assert choice.plan.config.mlp_tile_tokens == 2048
    assert choice.plan.total <= plans[2].total < plans[1].total


def test_more_memory_never_holds_a_shorter_row() -> None:
    """Neither with all weights on the GPU, nor with weights streamed, nor with the better."""
    config = settings(batch_size=1, gradient_checkpointing="full")
    sizes = [2 + 0.37 * i for i in range(9)]
    table = context_table(config, planner("qwen2.5-3b"), 60_000, sizes)
    assert table[0].resident is None and table[0].streamed
    assert table[-1].resident
    for field in ("resident", "streamed", "tokens"):
        tokens = [getattr(row, field) or 0 for row in table]
        assert tokens == sorted(tokens), field
    assert all((row.tokens or 0) >= (row.resident or 0) for row in table)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-0.5b"])
def test_a_longer_row_never_needs_less(name: str) -> None:
    """With all memory options on, around the lengths where tiles end and heads are divided."""
    plan = planner(name)
    least = smallest(settings(batch_size=1), plan)
    lengths = [64, 128, 512, 576, 640, 1024, 2048, 4096, 8192, 8256, 16_384, 32_832, 32_896, 33_024]
    needed = [plan(changed(least, max_length=tokens)).total for tokens in lengths]
    assert needed == sorted(needed)


def test_row_lengths_do_not_depend_on_a_budget() -> None:
    assert row_lengths(300, 0.0) == [64, 128, 192, 256, 300]
    wide = row_lengths(1 << 20, 1 / 128)
    assert wide == sorted(set(wide)) and wide[-1] == 1 << 20
    assert all(b - a <= max(64, a / 128) for a, b in itertools.pairwise(wide))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "head_precision": "8bit"}, "frozen head"),
        ({"method": "full", "embedding_on": "host"}, "frozen head"),
        ({"method": "lora", "offload": "weights"}, "NF4 weights"),
        ({"use_dora": True, "offload": "checkpoints,weights"}, "NF4 weights"),
        ({"offload": "everything"}, "offload"),
        ({"gradient_checkpointing": "full,none"}, "gradient_checkpointing"),
        ({"mlp_tile_tokens": 0}, "mlp_tile_tokens"),
    ],
)
def test_memory_options_that_do_not_go_with_the_run_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_memory_options_are_read_as_people_write_them() -> None:
    config = settings(
        offload="checkpoints, weights",
        head_precision="int8",
        embedding_on="cpu",
        gradient_checkpointing=["full:2", "none"],
    )
    assert config.offload == ("checkpoints", "weights")
    assert (config.head_precision, config.embedding_on) == ("8bit", "host")
    assert config.gradient_checkpointing == "full:2,none"


def run(model: Path, data: Path, output: Path, **changes: Any) -> bytes:
    config = TrainConfig(
        model=str(model), data=str(data), output_dir=output, max_steps=2, batch_size=2,
        max_length=64, device="cpu", plot=False, **changes,
    )  # fmt: skip
    train(config, console=False)
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_with_memory_options_learns_what_one_without_does(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(6)
    plain = run(tiny_model, rows, tmp_path / "a", gradient_checkpointing="none")
    saving = run(
        tiny_model,
        rows,
        tmp_path / "b",
        gradient_checkpointing="full:1,none",
        offload="checkpoints,weights",
    )
    assert saving == plain
    rounded = run(
        tiny_model,
        rows,
        tmp_path / "c",
        gradient_checkpointing="none",
        head_precision="8bit",
        mlp_tile_tokens=16,
        low_memory_decode=True,
    )
    assert rounded != plain and len(rounded) == len(plain)


def test_policies_for_another_number_of_layers_are_refused_before_weights_are_read(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.verbs.training.run_setup.build_for", pytest.fail)
    with pytest.raises(ConfigError, match="for 5 layers; there are 2"):
        run(
            tiny_model,
            write_rows(4),
            tmp_path / "run",
            gradient_checkpointing="full:4,none:1",
        )


def test_a_search_says_how_many_plans_it_has_made() -> None:
    made: list[int] = []
    config = settings(batch_size=1, max_length=512)
    choice = choose(config, 4 * GB, told(planner("qwen2.5-0.5b"), made.append))
    assert made == list(range(1, choice.tried + 1))
