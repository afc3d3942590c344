"""A model run layer by layer gives what the whole model gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration, heads_output
from engine.pruning.reconstruction.layer_stream import HeadMoments, LayerStream
from models.decoder import Decoder
from models.layers.observer import LayerObserver, observe_layers
from tests.support.small_runs import random_examples

Golden = Callable[[str], Path]


def examples() -> list[Example]:
    return random_examples(1, (17, 5, 23))


def wide_stream(folder: Path) -> LayerStream:
    """A stream in float64."""
    stream = LayerStream(open_model_source(folder), examples(), Calibration((), device="cpu"))
    stream.dtype, stream.states = torch.float64, stream.states.double()
    return stream


class _Whole(LayerObserver):
    """What the output projections of a whole model read."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.inputs = model, dict[int, torch.Tensor]()

    def mixer_ran(self, layer: int, saved: Any) -> None:
        mixer = self.model.layers[layer].mixer
        self.inputs[layer] = heads_output(mixer, saved).flatten(1).clone()


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "qwen2_swa", "qwen3_moe", "smollm3", "qwen3_5", "qwen3_next"]
)
def test_states_and_moments_are_those_of_the_whole_model(golden: Golden, family: str) -> None:
    model = load_model(golden(family), dtype=torch.float64)
    whole = _Whole(model)
    with observe_layers(whole):
        states = model.hidden_states(collate(examples()))
    stream = wide_stream(golden(family))
    for index in range(model.config.num_hidden_layers):
        layer = stream.open(index)
        observer = HeadMoments(layer)
        states_after = stream.run(layer, observer)
        halves = stream.finished(layer, stream.mixed(layer))
        assert torch.allclose(halves, states_after, rtol=1e-12, atol=1e-13)
        stream.go_on(states_after)
        z = whole.inputs[index]
        assert torch.allclose(observer.moments.products, z.mT @ z, rtol=1e-9, atol=1e-9)
        assert torch.allclose(observer.moments.means, z.mean(0), rtol=1e-9, atol=1e-10)
    assert torch.allclose(stream.states, states, rtol=1e-9, atol=1e-10)


def test_the_grouping_of_rows_does_not_matter(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = wide_stream(golden("llama"))
    monkeypatch.setattr("engine.pruning.reconstruction.layer_stream.TOKENS_PER_BATCH", 1)
    apart = wide_stream(golden("llama"))
    first, second = (stream.run(stream.open(0)) for stream in (together, apart))
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-12)
