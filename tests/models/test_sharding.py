"""Whole steps of models whose vocabulary and weights are divided among ranks."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.load_model import ON_DEVICE, LayerPlacement, build_model
from kernels.loss.cross_entropy import LossTerms
from kernels.runtime.ranks import ONE_RANK
from kernels.vocabulary.shard import own_rows
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.experts import Experts
from models.layers.packed_batch import PackedBatch
from models.memory.sharded_parameters import ShardedParameters
from models.over_ranks import split_context
from models.sharding import idle_pass, shard_vocabulary
from tests.support.processes.rank_threads import ThreadRanks, run_ranks
from tests.support.tiny_model import GOLDEN, RandomSource

FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_5"]
"""The first has a head of its own, the second a tied one."""
SETTINGS = StepSettings(loss_chunk_tokens=9, loss_terms=LossTerms(0.1, 1e-3))
Batch = list[PackedBatch]


class Weights(RandomSource):
    """Weights that are the same whoever reads them."""

    def tensor(self, name: str) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        return torch.randn(shape, generator=draw) * 0.1 + float(len(shape) == 1)


def config_of(family: str) -> ModelConfig:
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    return ModelConfig.from_dict(raw).with_layers(3)


def built(
    family: str,
    layers: LayerPlacement = ON_DEVICE,
    *,
    full: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Decoder:
    """A model with adapters that do something, or of which every weight is trained."""
    source: Any = Weights(config_of(family))
    model = build_model(source, dtype=dtype, layers=layers, **options)
    if full:
        return model.requires_grad_(True)
    add_lora(model, rank=2, seed=3)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            experts = _experts_of(model, name)
            count = len(parameter) if experts is None else experts.share.total
            values = torch.randn(count, *parameter.shape[1:], generator=draw).to(dtype) * 0.1
            parameter.data = values if experts is None else experts.share.of(values).clone()
    return model


def batches_of(rank: int) -> Batch:
    """Rank 1 has one micro-batch more than the others; rank 2 has none."""
    count = {0: 1, 1: 2, 2: 0}.get(rank, 1)
    results = []
    for number in range(count):
        draw = torch.Generator().manual_seed(10 * rank + number)
        ids = torch.randint(0, 60, (1, 20 + 5 * rank), generator=draw)
        labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, -100, ids)
        results.append(PackedBatch.of(ids, labels))
    return results


def accumulated(
    model: Decoder, mine: Batch, passes: int, items: float, *, token: bool = False
) -> dict[str, Tensor]:
    """The loss and gradients of a rank's micro-batches, which keeps step for `passes` of them.

    Without a batch it computes nothing, or one `token`.
    """
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for number in range(passes):
        if number < len(mine) or token:
            batch = mine[number] if number < len(mine) else PackedBatch.idle()
            part = model.batch_loss(batch, SETTINGS, num_items=items)
            part.backward()
            loss += part.detach()
        else:
            idle_pass(model, SETTINGS, num_items=items)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss}


def expected_of(model: Decoder, ranks: int) -> tuple[dict[str, Tensor], float]:
    batches = [batch for rank in range(ranks) for batch in batches_of(rank)]
    items = float(sum(batch.trained_tokens for batch in batches))
    return accumulated(model, batches, len(batches), items), items


def assert_sum(parts: list[dict[str, Tensor]], whole: dict[str, Tensor], bound: float) -> None:
    """Adapters' gradients add up; of rows of the vocabulary each rank has its own."""
    for name, expected in whole.items():
        mine = [part[name] for part in parts if name in part]
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        got = torch.cat(mine) if outer else torch.stack(mine).sum(0)
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got - expected).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_adapters_learn_alike_with_weights_and_vocabulary_divided(family: str, ranks: int) -> None:
    whole, items = expected_of(built(family, quantization="nf4"), ranks)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built(family, LayerPlacement(False, own, own), quantization="nf4")
        rows = own_rows(*_size(family), own)
        assert model.model.embed_tokens.weight.shape[0] == rows.stop - rows.start
        return accumulated(model, batches_of(own.rank), 2, items)

    assert_sum(run_ranks(ranks, work), whole, 1e-12)


def _size(family: str) -> tuple[int, int]:
    config = config_of(family)
    return config.vocab_size, config.hidden_size


@pytest.mark.parametrize("head_8bit", [False, True])
def test_single_precision_and_8_bit_rows(head_8bit: bool) -> None:
    how: dict[str, Any] = {"dtype": torch.float32, "head_8bit": head_8bit}
    whole, items = expected_of(built("qwen3", **how), 2)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built("qwen3", LayerPlacement(vocabulary=own), **how)
        return accumulated(model, batches_of(own.rank), 2, items)

    assert_sum(run_ranks(2, work), whole, 2e-6)


def test_a_token_that_is_not_trained_keeps_step_too() -> None:
    whole, items = expected_of(built("qwen3_moe", quantization="nf4"), 3)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built("qwen3_moe", LayerPlacement(False, own, own), quantization="nf4")
        mine = batches_of(own.rank)
        return accumulated(model, mine, 2, items, token=own.rank == 0)

    assert_sum(run_ranks(3, work), whole, 1e-12)


def test_experts_that_are_divided_stay_where_they_are() -> None:
    whole, items = expected_of(built("qwen3_moe", quantization="nf4"), 2)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        placed = LayerPlacement(ranks=own, vocabulary=own, experts=own)
        model = built("qwen3_moe", placed, quantization="nf4")
        with pytest.raises(ValueError, match="divided over ranks already"):
            ShardedParameters(own, model.device).take(model.layers[0])
        gradients = accumulated(model, batches_of(own.rank), 2, items, token=True)
        return {name: _spread(model, name, x) for name, x in gradients.items()}

    assert_sum(run_ranks(2, work), whole, 1e-12)


def _spread(model: Decoder, name: str, gradient: Tensor) -> Tensor:
    """An expert's gradient where it stands among those of all, and zeros elsewhere."""
    experts = _experts_of(model, name)
    if experts is None:
        return gradient
    out = gradient.new_zeros(experts.share.total, *gradient.shape[1:])
    out[experts.share.first : experts.share.first + experts.share.count] = gradient
    return out


def _experts_of(model: Decoder, name: str) -> Experts | None:
    """The experts that a parameter is of, if any."""
    path, separator, _ = name.partition(".experts.")
    experts = model.get_submodule(f"{path}.experts") if separator else None
    assert experts is None or isinstance(experts, Experts)
    return experts


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_ranks_share_the_tokens_of_a_batch_too(family: str) -> None:
    whole, items = expected_of(built(family, quantization="nf4"), 2)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built(family, LayerPlacement(False, own, own), quantization="nf4")
        split_context(model, own)
        batches = [batch for rank in range(2) for batch in batches_of(rank)]
        return accumulated(model, batches, len(batches), items)

    assert_sum(run_ranks(2, work), whole, 1e-12)


def test_a_teacher_keeps_step_with_its_student() -> None:
    """The teacher's base and the student's are divided, their vocabulary is whole."""
    batch, items = batches_of(0)[0], 7.0
    plain = built("qwen3", quantization="nf4")
    teacher = built("qwen3")
    plain.batch_loss(batch, SETTINGS, num_items=items, teacher=teacher).backward()
    whole = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built("qwen3", LayerPlacement(ranks=own), quantization="nf4")
        told = built("qwen3")
        told.shard_weights(own)
        if own.rank == 1:
            idle_pass(model, SETTINGS, num_items=items, teacher=told)
            return {}
        model.batch_loss(batch, SETTINGS, num_items=items, teacher=told).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_sum(run_ranks(2, work), whole, 1e-12)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_rows_that_are_trained_get_the_gradient_of_all_ranks_tokens(family: str) -> None:
    whole, items = expected_of(built(family, full=True), 3)

    def work(own: ThreadRanks) -> dict[str, Tensor]:
        model = built(family, full=True)
        shard_vocabulary(model, own)
        return accumulated(model, batches_of(own.rank), 2, items)

    assert_sum(run_ranks(3, work), whole, 1e-12)


def test_the_families_differ_in_whether_the_head_is_tied() -> None:
    assert [config_of(family).tie_word_embeddings for family in FAMILIES[:2]] == [False, True]


def test_evaluation_runs_on_all_ranks() -> None:
    plain = built("qwen3_5")
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        expected = plain(ids)
        loss = plain.loss(ids, ids)

    def work(own: ThreadRanks) -> None:
        model = built("qwen3_5", LayerPlacement(ranks=own, vocabulary=own))
        with torch.no_grad():
            assert float((model(ids) - expected).abs().max()) <= 1e-12
            if own.rank == 0:
                idle_pass(model)
            else:
                assert abs(float(model.loss(ids, ids) - loss)) <= 1e-12

    run_ranks(2, work)


def test_what_needs_a_whole_head_or_another_place_is_refused_by_name() -> None:
    model = built("qwen3")
    shard_vocabulary(model, ONE_RANK)
    with pytest.raises(ValueError, match="output head is divided among ranks"):
        model.head_weight()
    ids = torch.arange(8).view(1, -1)
    with pytest.raises(ValueError, match="output head is divided among ranks"):
        model.loss(ids, ids, teacher=built("qwen3"))
    with pytest.raises(ValueError, match="divided already"):
        shard_vocabulary(model, ONE_RANK)
    hosted = built(FAMILIES[0], embedding_on_host=True)
    with pytest.raises(ValueError, match="embedding on the host"):
        shard_vocabulary(hosted, ONE_RANK)
    with pytest.raises(ConfigError, match="exclude each other"):
        built(FAMILIES[0], LayerPlacement(vocabulary=ONE_RANK), embedding_on_host=True)
