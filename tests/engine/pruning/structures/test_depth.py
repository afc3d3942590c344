"""Whole layers: which cost least, by trying them all, and the repair across a gap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.sensitivity import PrefixDivergence
from engine.pruning.report import table
from engine.pruning.structures.channels import channels
from engine.pruning.structures.depth import GapRepair, layers_by_loss
from models.decoder import Decoder
from models.layers.observer import LayerObserver, observe_layers
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]
Logits = Callable[..., torch.Tensor]


def examples() -> list[Example]:
    return random_examples(7, (40, 61, 33, 57))


@pytest.fixture
def cut(cutter: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``cut(model, name, **settings)`` prunes layers into ``tmp_path / name``."""
    run: Callable[..., dict[str, Any]] = cutter("layers", examples())
    return run


def cost(model: Decoder, layers: list[int]) -> tuple[float, float]:
    """What the loss grows by, and nats a token from the whole model, by plain softmax."""
    batch = collate(examples())
    start = model.model.embed_tokens(batch.input_ids)

    def predicted(layers: list[int]) -> torch.Tensor:
        states = model.continued(start, batch, layers).index_select(0, batch.trained)
        return model.logits(states).log_softmax(1)

    whole, fewer = predicted(list(range(len(model.layers)))), predicted(layers)
    grown = (whole - fewer).gather(1, batch.targets[:, None]).mean()
    return max(float(grown), 0.0), float((whole.exp() * (whole - fewer)).sum(1).mean())


@torch.no_grad()
def test_the_layer_that_costs_least_goes_first_and_the_next_is_tried_without_it(
    write_model: Callable[..., Path],
) -> None:
    model = load_model(write_model(layers=6), dtype=torch.float64)
    order = layers_by_loss(PrefixDivergence(model, examples()), 6, 3, frozenset({2}))
    left = list(range(6))
    for layer, nats in order:
        costs = {n: cost(model, [m for m in left if m != n]) for n in left if n != 2}
        assert layer == min(costs, key=costs.__getitem__)
        assert nats == pytest.approx(costs[layer][0], rel=1e-6, abs=1e-12)
        left.remove(layer)


@pytest.mark.parametrize("metric", [None, "cosine"])
def test_a_layer_that_does_nothing_goes_and_nothing_changes(
    write_model: Callable[..., Path],
    tmp_path: Path,
    logits: Logits,
    cut: Callable[..., dict[str, Any]],
    metric: str | None,
) -> None:
    model = write_model(layers=4)
    tensors = load_file(model / "model.safetensors")
    for leaf in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{leaf}.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    record = cut(model, metric=metric)
    assert record["pruned_layers"] == [2]
    assert torch.allclose(logits(tmp_path / "out"), logits(model), rtol=0, atol=1e-6)
    assert open_model_source(tmp_path / "out").config.num_hidden_layers == 3
    assert "layer   2 goes" in table(record)


class _GapInputs(LayerObserver):
    """What down_proj of a layer reads."""

    def __init__(self, layer: int) -> None:
        self.layer, self.a = layer, torch.empty(0)

    def mlp_ran(self, layer: int, saved: Any) -> None:
        if layer == self.layer:
            self.a = channels(saved).clone()


@torch.no_grad()
def test_the_layer_before_a_gap_is_numpys_fit_to_what_the_gap_would_have_made(
    write_model: Callable[..., Path],
) -> None:
    source = open_model_source(write_model(layers=4))
    stream = LayerStream(source, examples(), Calibration((), device="cpu"))
    stream.dtype, stream.states = torch.float64, stream.states.double()
    ridge = 1e-2
    repair = GapRepair(stream, ridge, torch.float64)
    repair.run(4, [1, 2])
    model = load_model(source.path, dtype=torch.float64)
    batch, observer = collate(examples()), _GapInputs(0)
    start = model.model.embed_tokens(batch.input_ids)
    with observe_layers(observer):
        y = model.continued(start, batch, [0])
    missing = (model.continued(y, batch, [1, 2]) - y).numpy()
    a = observer.a.numpy()
    wide = np.concatenate([a, np.sqrt(ridge * (a**2).mean() * len(a)) * np.eye(a.shape[1])])
    wanted = np.concatenate([missing, np.zeros((a.shape[1], missing.shape[1]))])
    update = np.linalg.lstsq(wide, wanted, rcond=None)[0].T
    (name,) = repair.changes
    assert name == "model.layers.0.mlp.down_proj.weight"
    expected = source.tensor(name).double().numpy() + update
    assert np.abs(repair.changes[name].values.numpy() - expected).max() < 1e-8
    assert repair.told[0]["error_repaired"] < repair.told[0]["error_removed"]


@pytest.mark.parametrize("family", ["qwen3_5", "smollm3", "qwen3_moe", "qwen2_swa", "qwen3_5_vl"])
def test_what_is_left_keeps_its_kinds_of_layers(
    golden: Golden,
    tmp_path: Path,
    logits: Logits,
    cut: Callable[..., dict[str, Any]],
    family: str,
) -> None:
    before = open_model_source(golden(family)).config
    layers = before.num_hidden_layers
    record = cut(golden(family), fraction=1 / layers, repair="none")
    staying = [n for n in range(layers) if n not in record["pruned_layers"]]
    after = open_model_source(tmp_path / "out").config
    for field in ("layer_types", "rope_layers", "sparse_layers"):
        values = getattr(before, field)
        assert getattr(after, field) == tuple(values[n] for n in staying if values)
    assert logits(tmp_path / "out").isfinite().all()
    assert not torch.allclose(logits(tmp_path / "out"), logits(golden(family)), atol=1e-3)


@pytest.mark.parametrize("metric", [None, "cosine", "random"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe_vl", "qwen3_next"])
def test_a_layer_of_attention_stays_in_a_hybrid(
    golden: Golden, tmp_path: Path, cut: Callable[..., dict[str, Any]], family: str, metric: Any
) -> None:
    """transformers runs no model of linear attention alone. Seeds 0 and 3 would take either."""
    for seed in (0, 3) if metric == "random" else (0,):
        name = f"out-{seed}"
        cut(golden(family), name, fraction=0.5, metric=metric, seed=seed, repair="none")
        assert open_model_source(tmp_path / name).config.layer_types == ("full_attention",)
    kinds = open_model_source(golden(family)).config.layer_types
    linear = tuple(n for n, kind in enumerate(kinds) if kind == "linear_attention")
    with pytest.raises(ConfigError, match="with attention where the model has both kinds"):
        cut(golden(family), "none", fraction=0.5, metric=metric, protect=linear)


def test_a_fraction_of_no_layer_or_of_all_is_refused(
    golden: Golden, tmp_path: Path, cut: Callable[..., dict[str, Any]]
) -> None:
    for changes in ({"fraction": 0.1}, {"fraction": 0.9}, {"fraction": 0.5, "protect": (0, 1)}):
        with pytest.raises(ConfigError, match="at least one"):
            cut(golden("llama"), **changes)
    assert not (tmp_path / "out").exists()
