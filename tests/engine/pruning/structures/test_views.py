"""Models of fewer layers or channels as sources: names, shapes, codes, and what cannot be said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.model_sources.interface.view import ModelSourceView
from engine.model_sources.open import open_model_source
from engine.pruning.structures.views import NarrowSource, ShallowSource
from engine.verbs.models.quantize import quantize
from models.tensor_names import expected_tensors

Golden = Callable[[str], Path]


@pytest.mark.parametrize("family", ["qwen3_5_vl", "qwen3_next", "smollm3"])
def test_layers_that_stay_are_numbered_anew_and_are_the_same_tensors(
    golden: Golden, family: str
) -> None:
    base = open_model_source(golden(family))
    staying = list(range(1, base.config.num_hidden_layers))
    left = ShallowSource(base, staying)
    assert len(left.names()) < len(base.names())
    for name in left.names():
        old = name
        for new, layer in reversed(list(enumerate(staying))):
            old = old.replace(f".layers.{new}.", f".layers.{layer}.") if old == name else old
        if not name.startswith(("model.layers.", "model.language_model.layers.")):
            old = name
        assert torch.equal(left.tensor(name), base.tensor(old))
        assert (left.shape(name), left.dtype(name)) == (base.shape(old), base.dtype(old))


def test_channels_are_cut_from_rows_and_columns(golden: Golden) -> None:
    base = open_model_source(golden("llama"))
    left = NarrowSource(base, {layer: torch.tensor([2, 5, 7]) for layer in range(2)})
    assert left.config.intermediate_size == 3
    expected = expected_tensors(left.config)
    assert {name: left.shape(name) for name in left.names()} == expected
    for name in left.names():
        assert tuple(left.tensor(name).shape) == left.shape(name)
    gate, down = (f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("gate", "down"))
    assert torch.equal(left.tensor(gate), base.tensor(gate)[[2, 5, 7]])
    assert torch.equal(left.tensor(down), base.tensor(down)[:, [2, 5, 7]])


def test_codes_are_passed_on_where_nothing_is_cut(golden: Golden, tmp_path: Path) -> None:
    quantize(golden("llama"), tmp_path / "nf4", bits=4)
    base = open_model_source(tmp_path / "nf4")
    assert ShallowSource(base, [1]).codes("model.layers.0.mlp.up_proj.weight") is not None
    narrow = NarrowSource(base, {layer: torch.arange(8) for layer in range(2)})
    assert narrow.codes("model.layers.0.mlp.up_proj.weight") is None
    assert narrow.codes("model.layers.0.self_attn.q_proj.weight") is not None


def test_layers_that_no_configuration_describes_are_refused(golden: Golden) -> None:
    base = ModelSourceView(open_model_source(golden("llama")))
    base.config = replace(base.config, rope_layers=(False, True))
    with pytest.raises(ConfigError, match=r"rope_layers would be read as.*--protect"):
        ShallowSource(base, [0])
