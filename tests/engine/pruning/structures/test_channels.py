"""Channels of feed-forward parts: numpy's fit, the same function, and what cannot be asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.tasks.pruning import PruneSettings
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.report import table
from engine.pruning.structures.channels import ChannelPruning, channels
from engine.verbs.models.prune import prune
from models.layers.observer import LayerObserver, observe_layers
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]
Logits = Callable[..., torch.Tensor]
RIDGE = 1e-3


def examples() -> list[Example]:
    return random_examples(5, (40, 61, 33, 57, 48))


@pytest.fixture
def cut(cutter: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``cut(model, name, **settings)`` prunes channels into ``tmp_path / name``."""
    run: Callable[..., dict[str, Any]] = cutter("mlp", examples())
    return run


class _DownInputs(LayerObserver):
    """What down_proj of a layer reads."""

    def __init__(self, layer: int) -> None:
        self.layer, self.a = layer, torch.empty(0)

    def mlp_ran(self, layer: int, saved: Any) -> None:
        if layer == self.layer:
            self.a = channels(saved).clone()


@torch.no_grad()
@pytest.mark.parametrize("ridge", [RIDGE, 0.0])
def test_each_down_proj_is_numpys_fit_after_the_repaired_layers_before_it(
    golden: Golden, ridge: float
) -> None:
    source = open_model_source(golden("llama"))
    stream = LayerStream(source, examples(), Calibration((), device="cpu"))
    stream.dtype, stream.states = torch.float64, stream.states.double()
    work = ChannelPruning(stream, "l2-reconstruction", ridge, torch.float64)
    work.run(24)
    model = load_model(golden("llama"), dtype=torch.float64)
    for layer, staying in work.staying.items():
        down: Any = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
        observer = _DownInputs(layer)
        with observe_layers(observer):
            model.hidden_states(collate(examples()))
        a, weight = observer.a.numpy(), down.weight.numpy().copy()
        wide = np.concatenate([a, np.sqrt(ridge * (a**2).mean() * len(a)) * np.eye(a.shape[1])])
        expected = np.linalg.lstsq(wide[:, staying], wide @ weight.T, rcond=None)[0].T
        ours = work.changes[f"model.layers.{layer}.mlp.down_proj.weight"].values.numpy()
        assert np.abs(ours[:, staying] - expected).max() < 1e-8
        assert len(staying) == weight.shape[1] - 24
        down.weight.copy_(torch.from_numpy(ours))
        assert bool((ours[:, [n for n in range(96) if n not in staying.tolist()]] == 0).all())


@pytest.mark.parametrize("metric", ["l2-reconstruction", "l2-output", "l2-weights", "random"])
@pytest.mark.parametrize("family", ["llama", "qwen3_5_vl"])
def test_the_smaller_model_is_the_one_with_zeros_in_place_of_channels(
    golden: Golden,
    tmp_path: Path,
    logits: Logits,
    cut: Callable[..., dict[str, Any]],
    family: str,
    metric: str,
) -> None:
    record = cut(golden(family), metric=metric, repair="none")
    (width,) = {part["channels"] for part in record["parts"]}
    assert all(len(part["pruned"]) == record["units"]["removed"] for part in record["parts"])
    assert abs(record["units"]["removed"] - width / 4) <= 4
    hand = tmp_path / "hand"
    hand.mkdir()
    (hand / "config.json").write_bytes((golden(family) / "config.json").read_bytes())
    tensors = load_file(golden(family) / "model.safetensors")
    for part in record["parts"]:
        (name,) = (n for n in tensors if n.endswith(f"layers.{part['layer']}.mlp.down_proj.weight"))
        tensors[name][:, part["pruned"]] = 0
    save_file(tensors, hand / "model.safetensors", {"format": "pt"})
    assert torch.allclose(logits(tmp_path / "out"), logits(hand), rtol=0, atol=1e-10)
    assert record["parameters"]["after"] < record["parameters"]["before"]
    assert f"{record['parameters']['after']:,} of" in table(record)


def test_a_repair_brings_the_output_back(
    golden: Golden, cut: Callable[..., dict[str, Any]]
) -> None:
    record = cut(golden("qwen2"), fraction=0.5)
    assert record["repair"]["method"] == "least-squares"
    for part in record["parts"]:
        assert part["error_repaired"] < 0.6 * part["error_removed"]


def test_a_channel_that_copies_another_is_the_first_to_go(
    golden: Golden, tmp_path: Path, logits: Logits, cut: Callable[..., dict[str, Any]]
) -> None:
    """Its loss is made up for to the last digit, however large it is."""
    model = tmp_path / "twins"
    model.mkdir()
    (model / "config.json").write_bytes((golden("llama") / "config.json").read_bytes())
    tensors = load_file(golden("llama") / "model.safetensors")
    for layer in range(2):
        for leaf in ("gate_proj", "up_proj"):
            weight = tensors[f"model.layers.{layer}.mlp.{leaf}.weight"]
            weight[8:16] = weight[:8]
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, :16] *= 3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    record = cut(model, fraction=8 / 96, repair_ridge=1e-9)
    for part in record["parts"]:
        assert {channel % 8 for channel in part["pruned"]} == set(range(8))
        assert max(part["pruned"]) < 16
    assert torch.allclose(logits(tmp_path / "out"), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen3_moe", {}, "mixtures of experts"),
        ("llama", {"fraction": 0.01}, "Give at least 0.0833"),
        ("llama", {"protect": (0,)}, "no layer can be protected"),
        ("llama", {"mode": "zero"}, "leave out --mode zero"),
        ("llama", {"metric": "ov"}, "--metric ov does not rank mlp"),
    ],
)
def test_what_cannot_be_asked_is_told(
    golden: Golden,
    tmp_path: Path,
    cut: Callable[..., dict[str, Any]],
    family: str,
    changes: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(ConfigError, match=told):
        cut(golden(family), **changes)
    assert not (tmp_path / "out").exists()
    settings = PruneSettings(fraction=0.5, what="mlp")
    with pytest.raises(ConfigError, match="calibration rows"):
        prune(golden("llama"), None, settings)
