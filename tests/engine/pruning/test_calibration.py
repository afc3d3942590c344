"""Measured scores against finite differences and plain subtraction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.errors import DataError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning import calibration
from engine.pruning.calibration import (
    Calibration,
    activations,
    calibration_examples,
    gradients,
    measured_scores,
)
from engine.pruning.scores import prunable_heads
from engine.verbs.models.prune import prune
from models.decoder import Decoder
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]
Rows = Callable[..., Path]


def examples() -> list[Example]:
    return random_examples(1, (17, 5, 23))


def outputs(model: Decoder) -> dict[int, Linear]:
    """Layer -> o_proj, of the layers that have attention."""
    attentions = {index: layer.self_attn for index, layer in enumerate(model.layers)}
    return {
        index: attention.o_proj for index, attention in attentions.items() if attention is not None
    }


def losses(model: Decoder) -> torch.Tensor:
    """The loss of every row, summed over its tokens."""
    rows = []
    for example in examples():
        ids = torch.tensor([example.input_ids])
        rows.append(model.loss(ids, ids, num_items=1))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2_swa", "qwen3", "qwen3_5", "qwen3_moe"])
def test_gradient_is_the_slope_of_the_loss_in_the_size_of_the_head(
    golden: Golden, family: str
) -> None:
    model = load_model(golden(family), dtype=torch.float64)
    dim, step = model.config.head_dim, 1e-6
    layers = outputs(model)
    measured = gradients(model, list(layers), examples())
    tokens = sum(len(example) - 1 for example in examples())
    for scores, linear in zip(measured, layers.values(), strict=True):
        for head in range(4):
            slopes = torch.zeros(3, dtype=torch.float64)
            with torch.no_grad():
                assert isinstance(linear.weight, torch.Tensor)
                block = linear.weight[:, head * dim : head * dim + dim]
                before = block.clone()
                for sign in (1, -1):
                    block.copy_(before * (1 + sign * step))
                    slopes += sign * losses(model) / (2 * step)
                block.copy_(before)
            want = float(slopes.abs().sum()) / tokens
            assert float(scores[head]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5", "qwen3_next"])
def test_activation_is_the_mean_length_of_what_a_head_adds(golden: Golden, family: str) -> None:
    """What a head of one layer adds is the output with it less the output without it."""
    model = load_model(golden(family), dtype=torch.float64)
    layer = next(iter(outputs(model)))
    (measured,) = activations(model, [layer], examples())
    attention, dim = model.layers[layer].self_attn, model.config.head_dim
    assert attention is not None and isinstance(attention.o_proj.weight, torch.Tensor)
    caught: list[torch.Tensor] = []
    run = attention.forward

    def listen(*arguments: Any) -> Any:
        result = run(*arguments)
        caught.append(result[0])
        return result

    def outcome() -> torch.Tensor:
        caught.clear()
        for example in examples():
            ids = torch.tensor(example.input_ids)
            model.hidden_states(PackedBatch.of(ids))
        return torch.cat(caught)

    attention.forward = listen  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        whole = outcome()
        for head in range(4):
            block = attention.o_proj.weight[:, head * dim : head * dim + dim]
            before = block.clone()
            block.zero_()
            want = (whole - outcome()).norm(dim=1).mean()
            block.copy_(before)
            assert float(measured[head]) == pytest.approx(float(want), rel=1e-5)


def test_activation_does_not_depend_on_how_rows_are_grouped(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(golden("mistral"))
    together = activations(model, [0, 1], examples())
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", 1)
    for one, other in zip(together, activations(model, [0, 1], examples()), strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


def test_listening_leaves_no_trace(golden: Golden) -> None:
    model = load_model(golden("llama"))
    activations(model, [0, 1], examples())
    assert all("forward" not in vars(layer.self_attn) for layer in model.layers)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("metric", ["activation", "gradient"])
def test_a_model_is_pruned_by_what_rows_show(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, metric: Any, quantize: Any
) -> None:
    settings = PruneSettings(
        fraction=0.25, metric=metric, data=(str(write_rows(12)),), calibration_rows=6,
        quantize=quantize, device="cpu",
    )  # fmt: skip
    record = prune(tiny_model, tmp_path / "out", settings).record
    assert record["units"]["removed"] == 2
    assert record["calibration_rows"] == 6
    for layer in record["layers"]:
        assert all(score > 0 for score in layer["scores"])
        if metric == "activation":
            assert sum(layer["scores"]) == pytest.approx(4)
    again = prune(tmp_path / "out", None, settings.model_copy(update={"fraction": 0.5})).record
    assert again["units"] == {"before": 6, "asked": 3, "removed": 3}
    pruned = [
        (layer["layer"], head) for layer in again["layers"] for head in layer["pruned_before"]
    ]
    assert sorted(pruned) == sorted(
        (layer["layer"], head) for layer in record["layers"] for head in layer["pruned"]
    )
    assert all(again["layers"][layer]["scores"][head] == 0 for layer, head in pruned)


def test_only_the_asked_number_of_rows_is_run(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    checkpoint = open_model_source(tiny_model)
    layers = prunable_heads(checkpoint, "attention")

    def values(data: Path, rows: int) -> torch.Tensor:
        how = Calibration((str(data),), rows=rows, device="cpu")
        measured = measured_scores(
            checkpoint, layers, "l2-output", calibration_examples(checkpoint, how), how
        )
        return torch.stack([scores.values for scores in measured])

    three, nine = write_rows(3, "three.jsonl"), write_rows(9, "nine.jsonl")
    assert torch.equal(values(three, 64), values(nine, 3))
    assert not torch.equal(values(nine, 3), values(nine, 9))


def test_missing_rows_are_an_error_of_one_paragraph(tiny_model: Path, tmp_path: Path) -> None:
    settings = PruneSettings(fraction=0.25, metric="gradient", data=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        prune(tiny_model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
