"""One budget for several parts: met, as cheap as any other, and of what is left."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.tasks.pruning import PruneSettings
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning.budgets.costs import Costs, Counts, milliseconds_on, parameters_of
from engine.pruning.budgets.options import counts_of, interpolated, joined, options_of
from engine.pruning.report import table
from engine.verbs.models.prune import prune
from models.config.model_config import ModelConfig
from models.tensor_names import parameter_count
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]
Prune = Callable[..., dict[str, Any]]


@pytest.fixture
def to_target(
    tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Prune:
    """``to_target(model, target, what)`` gives the record of what is in ``tmp_path / "out"``."""
    examples = random_examples(5, (40, 61, 33, 57, 48))
    for module in ("budgets.mixed", "structures.prune_structures"):
        monkeypatch.setattr(f"engine.pruning.{module}.calibration_examples", lambda *_: examples)

    def run(model: Path, target: str, what: str, **changes: Any) -> dict[str, Any]:
        settings = PruneSettings(
            target=target, what=what, data=(str(write_rows(2)),), device="cpu", **changes
        )
        return prune(model, tmp_path / "out", settings).record

    return run


@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", "heads,mlp,layers"), ("qwen2", "kv-groups,mlp"), ("qwen3_moe", "experts,heads")],
)
def test_parameters_fit_the_budget_and_no_other_choice_loses_less(
    golden: Golden, tmp_path: Path, to_target: Prune, family: str, what: str
) -> None:
    record = to_target(golden(family), "params=0.75", what)
    config, left = (open_model_source(path).config for path in (golden(family), tmp_path / "out"))
    budget, counts = record["budget"], record["counts"]
    assert budget["before"] == parameter_count(config)
    assert budget["after"] == parameter_count(left) <= budget["asked"] == 0.75 * budget["before"]
    assert left.num_hidden_layers == config.num_hidden_layers - counts.get("layers", 0)
    assert left.intermediate_size == config.intermediate_size - counts.get("mlp", 0)
    assert left.num_experts == config.num_experts - counts.get("experts", 0)
    lost = config.num_attention_heads - left.num_attention_heads
    assert lost == counts.get("heads", 0) * config.num_key_value_heads + 2 * counts.get(
        "kv-groups", 0
    )
    assert sum(map(bool, counts.values())) == len(record["stages"])
    losses = {
        part: {int(n): loss for n, loss in one.items()} for part, one in record["losses"].items()
    }
    assert {*losses} == {*what.split(",")}
    costs, parts = Costs(config, parameters_of), list(losses)
    order = [1, 0]
    within = [
        sum(interpolated(losses[part], n) for part, n in zip(parts, given, strict=True))
        for given in product(*(options_of(config, part) for part in parts))
        if costs.of(
            joined([counts_of(config, p, n, order) for p, n in zip(parts, given, strict=True)])
        )
        <= budget["asked"]
    ]
    ours = sum(interpolated(losses[part], n) for part, n in counts.items())
    assert ours == pytest.approx(min(within), abs=1e-12)
    logits = load_model(tmp_path / "out")(torch.tensor([[5, 41, 7]]))
    assert bool(torch.isfinite(logits).all())
    assert f"{budget['after']:,.0f} parameters are left of" in table(record)


def test_costs_in_parameters_are_those_of_the_graph(golden: Golden) -> None:
    for family, given in (
        ("llama", Counts(layers=(1,), heads=2, channels=40)),
        ("qwen3_next", Counts(heads=2, kv_heads=1, experts=2)),
        ("qwen2", Counts(channels=95)),
    ):
        config = open_model_source(golden(family)).config
        left = given.left(config)
        expected = parameter_count(left)
        if given.layers:
            expected = parameter_count(left.with_layers(config.num_hidden_layers - 1))
        assert Costs(config, parameters_of).of(given) == pytest.approx(expected, abs=1e-6)


def test_milliseconds_are_measured_and_fit(
    golden: Golden, to_target: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.pruning.budgets.costs._SECONDS", 0.002)
    record = to_target(golden("llama"), "latency=0.95", "mlp,layers")
    budget = record["budget"]
    assert budget["kind"] == "latency"
    assert 0 < budget["after"] <= budget["asked"] == 0.95 * budget["before"]
    assert "ms are left" in table(record)
    timed = budget["timed"]
    assert min(timed.values()) > 0
    share = 100 * timed["after"] / timed["before"]
    assert f"and takes {timed['after']:.3f} ms, {share:.1f} %" in table(record)


def test_each_kind_of_layer_is_timed_once(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def timed(call: Callable[[], object], *_: object, **__: object) -> Any:
        calls.append(call())
        return type("Timing", (), {"median": 0.001})

    monkeypatch.setattr("engine.pruning.budgets.costs.measure", timed)
    parts_of = milliseconds_on(torch.device("cpu"), torch.float32)
    config: ModelConfig = open_model_source(golden("qwen3_5")).config
    parts = parts_of(config)
    assert len(parts.mixers) == len(parts.feed_forwards) == config.num_hidden_layers
    assert len(calls) == len({*zip(config.layer_types, config.rope_layers, strict=True)}) + 2
    before = len(calls)
    parts_of(Counts(channels=8).left(config))
    assert len(calls) == before + 1


def test_what_cannot_be_asked_is_told(golden: Golden, to_target: Prune) -> None:
    with pytest.raises(ConfigError, match="of the whole is left at the least"):
        to_target(golden("llama"), "params=0.05", "mlp")
    with pytest.raises(ConfigError, match="experts: this model has no mixture of experts"):
        to_target(golden("llama"), "params=0.9", "experts,mlp")
    with pytest.raises(ConfigError, match="feed-forward parts of this model are mixtures"):
        to_target(golden("qwen3_moe"), "params=0.9", "mlp")
    for wrong, told in (
        ({"target": "params=0.5", "fraction": 0.5}, "one of them"),
        ({}, "one of them"),
        ({"target": "bytes=0.5"}, "expected params=SHARE"),
        ({"target": "params=0.5", "mode": "zero"}, "leave out"),
        ({"fraction": 0.5, "what": "heads,mlp"}, "shares one budget"),
        ({"fraction": 0.5, "what": "heads,tails"}, "one or several of"),
        ({"target": "params=0.5", "what": "heads,kv-groups"}, "heads too"),
        ({"target": "params=0.5", "heads": "delta"}, "heads of attention"),
        ({"target": "params=0.5", "what": "heads,mlp", "metric": "ov"}, "does not rank mlp"),
    ):
        with pytest.raises(ConfigError, match=told):
            PruneSettings(**wrong)
    with pytest.raises(ConfigError, match="runs the model on calibration rows"):
        prune(golden("llama"), None, target="params=0.5")
