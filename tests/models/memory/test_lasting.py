"""Decoded weights that stay: the same bits with fewer decodes, and in the planned number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.benchmark.cases.random_weights import random_decoder
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.decoded import resolve_decoded
from engine.memory.estimate import MemoryPlan, plan
from engine.memory.model_shapes import preset_config
from engine.memory.search import changed, choose
from engine.training.step import TrainingStep
from kernels.linear import decode as decode_module
from models.config.model_config import ModelConfig
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.memory.lasting import keep_decoded, lasting_matrices
from optim import AdamW8bit

GIB = 2**30


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that are decoded from now on."""
    shapes: list[tuple[int, ...]] = []
    decode_weight = decode_module.decode_weight

    def counting(weight: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return decode_weight(weight, dtype, out)

    monkeypatch.setattr(decode_module, "decode_weight", counting)
    return shapes


def trained(
    directory: Path, policy: str, dtype: torch.dtype, layers: int, decodes: list[Any]
) -> tuple[list[float], list[torch.nn.Parameter], int]:
    """Losses and adapters of two steps of two micro-batches, and how many weights were decoded."""
    raw = json.loads((directory / "config.json").read_text())
    torch.manual_seed(0)
    model = random_decoder(
        ModelConfig.from_dict(raw).with_layers(4), torch.device("cpu"), dtype, rank=4
    )
    keep_decoded(model.layers[4 - layers :], dtype)
    decodes.clear()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    batches = [PackedBatch.of(row[None], labels=row[None]) for row in ids]
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = TrainingStep(
        model, AdamW8bit(trainable, lr=1e-3), StepSettings(checkpointing=policy), seed=7
    )
    losses = [step(batches, number).loss for number in range(2)]
    return losses, trainable, len(decodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "qwen3_next"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_stays_decoded_changes_no_bit(
    policy: str,
    family: str,
    dtype: torch.dtype,
    golden: Callable[[str], Path],
    decodes: list[Any],
) -> None:
    none, one, every = (
        trained(golden(family), policy, dtype, layers, decodes) for layers in (0, 1, 4)
    )
    for other in (one, every):
        assert other[0] == none[0]
        assert all(torch.equal(a, b) for a, b in zip(none[1], other[1], strict=True))
    assert every[2] < one[2] < none[2]
    if family == "llama":
        # The first layer needs no gradient of its input, so the last is more than a quarter.
        assert every[2] == 0 and none[2] - one[2] >= none[2] / 4


def test_a_new_weight_or_device_drops_what_was_decoded(golden: Callable[[str], Path]) -> None:
    raw = json.loads((golden("llama") / "config.json").read_text())
    model = random_decoder(ModelConfig.from_dict(raw), torch.device("cpu"), torch.float32)
    keep_decoded(model.layers[-1:], torch.float32)
    assert len(lasting_matrices(model)) == 4  # q k v, o, gate up, down
    attention = model.layers[-1].self_attn
    assert attention is not None
    attention.o_proj.set_weight(torch.zeros(attention.o_proj.weight.shape))
    assert len(lasting_matrices(model)) == 3
    model.to("meta")
    assert lasting_matrices(model) == []


def settings(**changes: Any) -> TrainConfig:
    given = {"model": "m", "data": "d", "batch_size": 1, "gradient_checkpointing": "none"}
    return TrainConfig.model_validate(given | changes)


def planned(config: TrainConfig) -> MemoryPlan:
    model = preset_config("qwen2.5-0.5b")
    assert model is not None
    bare = config if config.keep_decoded != "auto" else changed(config, keep_decoded="none")
    return plan(model, bare, gpu=True, dtype=torch.bfloat16)


def test_auto_takes_as_many_layers_as_fit_and_no_more() -> None:
    config, layers = settings(max_length=512), 24
    bare, every = (planned(changed(config, keep_decoded=n)).total for n in ("none", "24"))
    for share in (0.3, 0.8):
        limit = int(bare + share * (every - bare))
        keep, made = resolve_decoded(config, layers, limit, planned)
        assert 0 < int(keep) < layers
        assert made is not None and made.total <= limit
        assert planned(changed(config, keep_decoded=str(int(keep) + 1))).total > limit
    assert resolve_decoded(config, layers, bare, planned)[0] == "none"
    assert resolve_decoded(config, layers, 2 * every, planned)[0] == "24"
    assert resolve_decoded(config, layers, None, planned)[0] == "none"


def test_a_budget_is_spent_on_recompute_first_and_then_on_decoded_weights() -> None:
    config = settings(max_length=512, gradient_checkpointing="auto")
    least = planned(changed(config, gradient_checkpointing="none")).total
    large = choose(config, 64 * GIB, planned).plan
    assert (large.config.gradient_checkpointing, large.config.keep_decoded) == ("none", "24")
    tight = choose(config, least, planned).plan
    assert (tight.config.gradient_checkpointing, tight.config.keep_decoded) == ("none", "none")
    assert tight.total <= least


@pytest.mark.parametrize(
    "changes", [{"method": "lora"}, {"low_memory_decode": True}, {"offload": ("weights",)}]
)
def test_what_has_no_decoded_weights_to_keep_is_refused(changes: dict[str, Any]) -> None:
    settings(keep_decoded="none", **changes)
    with pytest.raises(ConfigError, match="keep_decoded"):
        settings(keep_decoded="2", **changes)
