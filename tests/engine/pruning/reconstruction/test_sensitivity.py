"""How far a model strays, against whole runs and torch's softmax; curves and their hulls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.choices import RepairMethod
from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.pruning.reconstruction import sensitivity
from engine.pruning.reconstruction.layer_stream import output_of
from engine.pruning.reconstruction.sensitivity import (
    PrefixDivergence,
    growth_of_units,
    measured_counts,
    set_aside,
)
from engine.verbs.models.prune import prune
from models.head_slices import layer_heads

Golden = Callable[[str], Path]


def examples() -> list[Example]:
    generator = np.random.default_rng(1)
    rows = [generator.integers(3, 60, length) for length in (17, 5, 23)]
    return [Example(row, [index % 3 > 0 for index in range(len(row))], "row") for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_5", "qwen3_moe"])
def test_straying_is_the_divergence_of_whole_runs(golden: Golden, family: str) -> None:
    whole = load_model(golden(family), dtype=torch.float64)
    divergence = PrefixDivergence(whole, examples())
    for layer in range(len(whole.layers)):
        changed = load_model(golden(family), dtype=torch.float64)
        linear = output_of(changed, layer_heads(changed.config, layer))
        assert isinstance(linear.weight, torch.Tensor)
        linear.weight[:, :20] = 0
        total, count = 0.0, 0
        for example in examples():
            ids = torch.tensor([example.input_ids])
            first, second = (model(ids)[0].log_softmax(1) for model in (whole, changed))
            trained = [n - 1 for n, marked in enumerate(example.trained) if marked]
            difference = (first.exp() * (first - second)).sum(1)
            total, count = total + float(difference[trained].sum()), count + len(trained)
        own = output_of(whole, layer_heads(whole.config, layer))
        before = own.weight
        assert isinstance(before, torch.Tensor)
        strayed = divergence.without(own, linear.weight, torch.zeros(64))
        assert strayed == pytest.approx(total / count, rel=1e-5)
        assert isinstance(own.weight, torch.Tensor)
        assert own.weight.data_ptr() == before.data_ptr()
        assert divergence.without(own, before, torch.zeros(64)) == pytest.approx(0, abs=1e-9)
        divergence.go_on()


def test_few_tokens_are_enough(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SENSITIVITY_TOKENS", 23)
    model = load_model(golden("llama"))
    assert PrefixDivergence(model, examples())._batch.tokens == 22
    monkeypatch.setattr(sensitivity, "SENSITIVITY_TOKENS", 1)
    assert PrefixDivergence(model, examples())._batch.tokens == 17


def test_rows_that_measure_a_repair_are_not_those_it_is_fitted_to() -> None:
    rows = examples() * 4
    measured, fitted = set_aside(rows)
    assert measured + fitted == rows
    assert 0 < sum(map(len, measured)) <= sum(map(len, rows)) // 4
    assert set_aside(rows[:1]) == (rows[:1], rows[:1])


def test_measured_counts_are_powers_of_two_and_all_but_one() -> None:
    assert [measured_counts(n) for n in (1, 2, 3, 9, 32)] == [
        [1], [1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 16, 31],
    ]  # fmt: skip


def test_growth_is_the_lower_convex_hull_of_what_was_measured() -> None:
    errors = [1.0, 1.0, 2.0, 4.0, 8.0]
    straight = growth_of_units(errors, {1: 2.0, 5: 32.0})
    assert straight == pytest.approx([2.0, 2.0, 4.0, 8.0, 16.0])
    # A hump is bridged: what stands behind it can only be had together.
    bridged = growth_of_units(errors, {1: 3.0, 2: 4.0, 3: 5.0, 4: 20.0, 5: 30.0})
    assert bridged == pytest.approx([5 / 3, 5 / 3, 5 / 3, 12.5, 12.5])
    gain = growth_of_units(errors, {1: -1.0, 2: 0.5, 4: 5.0, 5: 6.0})
    assert gain[0] == -1.0
    assert gain == sorted(gain)


@pytest.mark.parametrize("seed", range(5))
def test_no_point_lies_below_the_hull(seed: int) -> None:
    generator = np.random.default_rng(seed)
    measured = {n: float(generator.random() * n) for n in range(1, 9)}
    steps = growth_of_units([1.0] * 8, measured)
    assert steps == sorted(steps)
    totals = np.cumsum(steps)
    assert totals[-1] == pytest.approx(measured[8])
    for count, value in measured.items():
        assert totals[count - 1] <= value + 1e-9


def test_a_layer_that_the_model_hardly_hears_gives_up_most(
    write_model: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer 1's heads whisper: as shares of its own output they are no less than another's."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(
        "engine.pruning.reconstruction.from_settings.calibration_examples",
        lambda *_: examples() * 4,
    )
    model = write_model(layers=3)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e-3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    def record(**changes: Any) -> dict[str, Any]:
        settings = PruneSettings(fraction=0.5, data=(str(write_rows(2)),), device="cpu", **changes)
        return prune(model, None, settings).record

    measured, ranked = record(), record(scope="global")
    assert (measured["scope"], ranked["scope"]) == ("sensitivity", "global")
    left = [layer["left"] for layer in measured["layers"]]
    assert left[1] == 1 < ranked["layers"][1]["left"]
    guarded = record(protect_first=1, protect_last=1, allow_shortfall=True)
    assert [layer["left"] for layer in guarded["layers"]] == [6, 1, 6]
    assert guarded["protected"] == [0, 2]


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_layers_are_measured_as_they_will_be_written(
    write_model: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repair: RepairMethod,
) -> None:
    """Without its first head a layer strays as far as the model that is written."""
    monkeypatch.setattr(
        "engine.pruning.reconstruction.from_settings.calibration_examples",
        lambda *_: examples() * 4,
    )
    curve: dict[int, float] = {}

    def growth(errors: Sequence[float], measured: Mapping[int, float]) -> list[float]:
        curve.update(measured)
        return growth_of_units(errors, measured)

    monkeypatch.setattr("engine.pruning.reconstruction.importance.growth_of_units", growth)
    model = write_model(layers=1)
    settings = PruneSettings(
        fraction=1 / 6, repair=repair, data=(str(write_rows(2)),), device="cpu", mode="zero"
    )
    prune(model, tmp_path / "pruned", settings)
    whole, left = load_model(model), load_model(tmp_path / "pruned")
    divergence = PrefixDivergence(whole, examples() * 4)
    linear, written = (output_of(one, layer_heads(one.config, 0)) for one in (whole, left))
    assert isinstance(written.weight, torch.Tensor)
    strayed = divergence.without(linear, written.weight, torch.zeros(len(written.weight)))
    assert curve[1] == pytest.approx(strayed, rel=1e-3)


def test_a_layer_is_measured_for_reconstruction_alone(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="--scope global or layer"):
        prune(tiny_model, None, PruneSettings(fraction=0.5, scope="sensitivity", metric="ov"))
