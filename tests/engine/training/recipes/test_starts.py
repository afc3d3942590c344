"""Adapters that start as a part of the weights, in a run: planned, resumed, refused, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import plan
from engine.model_sources.adapter.initial import initial_base, initial_pair
from engine.model_sources.load_model import load_model
from engine.model_sources.open import describe_model
from engine.training.adapters.selection import selection
from engine.training.adapters.starts import check_start
from engine.training.trainable import make_trainable
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from tests.support.small_runs import adapter_bytes, small_run
from tests.support.tiny_model import GOLDEN

IDS = (torch.arange(40) * 7 % 61 + 1).reshape(1, 40)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", **({"method": "lora"} | changes))


@pytest.mark.parametrize("initial", ["pissa", "olora", "loftq"])
def test_a_pair_is_what_its_base_is_without(initial: str) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    rest, a, b = initial_pair(weight, initial, 8, 0.5, {"loftq_iter": 2})
    given = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}
    torch.testing.assert_close(rest, initial_base(weight, initial, 8, 0.5, given))
    whole = rest + 0.5 * b @ a
    if initial == "loftq":
        assert float((weight - whole).norm()) < 0.9 * float((weight - rest).norm())
    else:
        torch.testing.assert_close(whole, weight, rtol=1e-4, atol=1e-5)


def test_a_gaussian_start_draws_a_and_leaves_b_at_zero() -> None:
    from engine.model_sources.open import open_model_source
    from engine.training.adapters.starts import start_pairs, with_start

    config = settings(init_lora_weights="gaussian", lora_rank=32)
    source = with_start(config, open_model_source(GOLDEN / "llama"))
    model = load_model(GOLDEN / "llama")
    make_trainable(model, config, None)
    assert start_pairs(model, config, source) == {}
    named = dict(model.named_parameters())
    drawn = torch.cat([p.detach().flatten() for n, p in named.items() if n.endswith("lora_A")])
    assert float(drawn.std()) == pytest.approx(1 / 32, rel=0.02)
    assert not any(bool(p.any()) for n, p in named.items() if n.endswith("lora_B"))


def test_what_has_no_such_start_is_refused() -> None:
    mixture = describe_model(GOLDEN / "qwen3_moe").config
    config = settings(init_lora_weights="pissa", lora_rank=4)
    with pytest.raises(ConfigError, match="parameters of many"):
        check_start(config, selection(config, mixture))
    llama = describe_model(GOLDEN / "llama").config
    config = settings(init_lora_weights="olora", lora_rank=50)
    with pytest.raises(ConfigError, match="of at most 32"):
        check_start(config, selection(config, llama))


def test_the_plan_counts_the_first_pairs_and_the_decomposition() -> None:
    llama = describe_model(GOLDEN / "llama").config
    plans = [
        plan(
            llama, settings(init_lora_weights=name, gradient_checkpointing="full"),
            gpu=False, dtype=torch.float32,
        )
        for name in ("default", "pissa")
    ]  # fmt: skip
    assert plans[1].load.bytes > plans[0].load.bytes
    assert plans[1].reserve["first pairs"] == 4 * plans[1].trainable


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa", "method": "lora"},
        {"init_lora_weights": "loftq", "double_quant": False},
    ],
    ids=["pissa", "loftq"],
)
def test_a_run_goes_on_to_the_same_bits_and_merges_to_what_it_trained(
    changes: dict[str, Any], tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config = small_run(tiny_model, write_rows(9), output, lora_rank=4, lora_alpha=4, **changes)
    train(config, console=False)
    before = adapter_bytes(output)
    (output / "checkpoint-6" / "MANIFEST.json").unlink()
    train(config.model_copy(update={"resume": "auto"}), console=False)
    assert adapter_bytes(output) == before
    merge(model=str(tiny_model), adapter=output / "adapter", output=tmp_path / "merged")
    merged = load_model(tmp_path / "merged")(IDS)
    applied = load_model(tiny_model, adapter=output / "adapter")(IDS)
    assert torch.allclose(merged, applied, atol=2e-3)
