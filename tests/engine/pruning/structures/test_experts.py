"""Experts of mixtures: what no token asked for goes, and nothing changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import ConfigError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.report import table
from engine.pruning.structures.experts import routed_mass
from models.layers.context import DEFAULT_SETTINGS
from models.tensor_names import expected_tensors

Golden = Callable[[str], Path]
ROW = [5, 41]
"""Two tokens, each sent to two experts: of six, two at least are not asked for."""


@pytest.fixture
def cut(cutter: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``cut(model, **settings)`` prunes experts by the one row into ``tmp_path / "out"``."""
    run: Callable[..., dict[str, Any]] = cutter("experts", [Example(ROW, [True] * 2, "row")], 1 / 3)
    return run


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_vl"])
def test_experts_that_no_token_asked_for_go_and_its_logits_stay(
    golden: Golden, tmp_path: Path, cut: Callable[..., dict[str, Any]], family: str
) -> None:
    record = cut(golden(family))
    assert record["metric"] == "routed-mass"
    assert [part["error_removed"] for part in record["parts"]] == [0.0, 0.0]
    left = open_model_source(tmp_path / "out")
    assert left.config.num_experts == 4
    shapes = {name: left.shape(name) for name in left.names()}
    assert expected_tensors(left.config).items() <= shapes.items()
    before, after = (
        load_model(path, dtype=torch.float64)(torch.tensor([ROW]))
        for path in (golden(family), tmp_path / "out")
    )
    assert torch.allclose(before, after, rtol=0, atol=1e-12)
    assert "2 of 6 experts" in table(record)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_the_mass_is_what_the_router_gives(golden: Golden, family: str) -> None:
    """Layer by layer, from the states before each mixture, by torch's softmax."""
    generator = np.random.default_rng(3)
    row = generator.integers(3, 60, 40)
    source = open_model_source(golden(family))
    stream = LayerStream(source, [Example(row, [True] * 40, "row")], Calibration((), device="cpu"))
    stream.dtype, stream.states = torch.float64, stream.states.double()
    mass = routed_mass(stream)
    assert list(mass) == [n for n, sparse in enumerate(source.config.sparse_layers) if sparse]
    model = load_model(golden(family), dtype=torch.float64)
    last = max(mass)
    layer: Any = model.layers[last]
    batch = collate([Example(row, [True] * 40, "row")])
    states = model.continued(model.model.embed_tokens(batch.input_ids), batch, range(last))
    context = model._pass(batch, DEFAULT_SETTINGS, None).context
    addend, _ = layer.mixer.forward(states, layer.input_layernorm, context)
    read = layer.post_attention_layernorm(states + addend)
    weights = (read @ layer.mlp.gate.weight.T).softmax(1)
    top, chosen = weights.topk(source.config.num_experts_per_tok, dim=1)
    if source.config.norm_topk_prob:
        top = top / top.sum(1, keepdim=True)
    want = torch.zeros(source.config.num_experts, dtype=torch.float64)
    want.index_add_(0, chosen.flatten(), top.flatten())
    assert torch.allclose(mass[last], want / want.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {}, "no mixture of experts"),
        ("qwen3_moe", {"fraction": 0.9}, "from 1 to 4 can go"),
        ("qwen3_moe", {"protect": (0,)}, "no layer can be protected"),
        ("qwen3_moe", {"metric": "l2-output"}, "does not rank experts"),
    ],
)
def test_what_no_mixture_can_give_up_is_told(
    golden: Golden,
    cut: Callable[..., dict[str, Any]],
    family: str,
    changes: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(ConfigError, match=told):
        cut(golden(family), **changes)
