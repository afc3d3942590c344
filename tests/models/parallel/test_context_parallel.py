"""Context parallelism: slices of a batch's tokens give the loss and gradients of the whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch, Sequences
from models.over_ranks import split_context
from models.parallel.head_exchange import HeadExchange, copies_of
from models.parallel.token_slices import TokenSlices
from models.parallel.traffic import exchanged_heads
from models.sequences import batch_log_probs
from models.sharding import shard_vocabulary
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

BOUNDS = (0, 5, 6, 33, 47)
"""No slice of 47 tokens for 2 or 4 ranks begins where a document does."""

Build = Callable[..., Decoder]


@pytest.fixture
def build(golden: Callable[[str], Path]) -> Build:
    """``build(family, dtype, **changes)`` is a model of random weights that trains all of them."""

    def make(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
        raw = json.loads((golden(family) / "config.json").read_text())
        raw.get("text_config", raw).update(changes)
        model = Decoder(ModelConfig.from_dict(raw).with_layers(2)).to(dtype)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (values * 0.2 + (1.0 if "norm" in name else 0.0)).to(dtype)
        return model.train()

    return make


def batch_for(model: Decoder, *, bounds: tuple[int, ...] = BOUNDS, weighted: bool = False) -> Any:
    """Documents of which the second quarter of the tokens is not trained."""
    generator = torch.Generator().manual_seed(1)
    tokens = bounds[-1]
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
    labels = ids.clone()
    labels[:, tokens // 4 - 1 : tokens // 2 + 1] = -100
    weights = torch.rand(1, tokens, generator=generator) if weighted else None
    return PackedBatch.of(ids, labels, torch.tensor(bounds), weights)


@dataclass
class Outcome:
    """The loss and every gradient of a step."""

    loss: Tensor
    grads: dict[str, Tensor]

    @classmethod
    def of(cls, model: Decoder, batch: PackedBatch, settings: StepSettings) -> Outcome:
        model.zero_grad()
        loss = model.batch_loss(batch, settings, num_items=batch.items)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return cls(loss.detach(), grads)


def summed(parts: list[Outcome]) -> Outcome:
    """What the ranks' parts add up to."""
    names = {name for part in parts for name in part.grads}
    assert all(part.grads.keys() == names for part in parts)
    grads = {name: torch.stack([part.grads[name] for part in parts]).sum(0) for name in names}
    return Outcome(torch.stack([part.loss for part in parts]).sum(), grads)


def split_step(
    model: Decoder, batch: PackedBatch, settings: StepSettings, size: int
) -> list[Outcome]:
    def work(ranks: ThreadRanks) -> Outcome:
        own = copy.deepcopy(model)
        split_context(own, ranks)
        return Outcome.of(own, batch, settings)

    return run_ranks(size, work)


def assert_equal(got: Outcome, want: Outcome, tolerance: float, floor: float = 1e-15) -> None:
    assert abs(float(got.loss - want.loss)) <= tolerance * abs(float(want.loss))
    assert got.grads.keys() == want.grads.keys()
    for name, gradient in want.grads.items():
        worst = (got.grads[name] - gradient).abs().max()
        assert worst <= tolerance * float(gradient.abs().max()) + floor, name


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2_swa": {},
    "qwen3_5": {},
    "qwen3_next": {"linear_num_value_heads": 8, "output_router_logits": True},
}
"""Few key/value heads; a sliding window; DeltaNet, gate and normed heads; joint projections."""


@pytest.mark.parametrize(
    ("size", "policy"), [(2, "selective"), (4, "none"), (4, "selective"), (4, "full")]
)
@pytest.mark.parametrize("family", MODELS)
def test_slices_add_up_to_one_ranks_loss_and_gradients(
    family: str, size: int, policy: str, build: Build
) -> None:
    model = build(family, **MODELS[family])
    assert model.config.kv_heads(1) == 2
    batch, settings = batch_for(model), StepSettings(checkpointing=policy)
    parts = split_step(model, batch, settings, size)
    assert any(float(part.loss) == 0.0 for part in parts) == (size == 4 and "next" not in family)
    assert_equal(summed(parts), Outcome.of(model, batch, settings), 1e-12)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3_5", {"num_attention_heads": 8}),
        # Twelve heads that read six: three to a rank, which is no whole number of pairs.
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16}),
    ],
)
def test_masks_are_those_of_the_whole_batch(
    family: str, changes: dict[str, Any], build: Build
) -> None:
    """Dropout of embedding, blocks, attention's weights and adapters; tokens have weights."""
    model = build(family, **changes)
    add_lora(model, rank=2, dropout=0.25)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
        parameter.requires_grad_(True)
        parameter.data = parameter.data.double()
    settings = StepSettings(
        dropout_seed=9, hidden_dropout=0.25, attention_dropout=0.25, first_row=13, mlp_tile_tokens=7
    )
    batch = batch_for(model, weighted=True)
    want = Outcome.of(model, batch, settings)
    assert_equal(summed(split_step(model, batch, settings, 4)), want, 1e-12)
    other = Outcome.of(model, batch, replace(settings, first_row=12))
    assert abs(float(other.loss - want.loss)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_slices_add_up_in_single_precision(family: str, build: Build) -> None:
    model = build(family, torch.float32)
    batch, settings = batch_for(model), StepSettings(low_memory_decode=True)
    want = Outcome.of(model, batch, settings)
    assert_equal(summed(split_step(model, batch, settings, 2)), want, 1e-6, floor=1e-6)


def test_fewer_tokens_than_ranks_leave_some_without_any(build: Build) -> None:
    model = build("qwen3_5")
    batch = batch_for(model, bounds=(0, 1, 3))
    want = Outcome.of(model, batch, StepSettings())
    # Of so few keys the gradient of keys is nothing: what is left of sums of numbers about 1.
    assert_equal(summed(split_step(model, batch, StepSettings(), 4)), want, 1e-12, 1e-14)


def test_a_teachers_distribution_is_learnt_where_its_context_is_split_too(build: Build) -> None:
    model, teacher = build("llama"), build("llama", num_hidden_layers=2)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.flip(0)
    assert model.lm_head is not None
    model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    batch = batch_for(model)

    def step(student: Decoder, teacher: Decoder) -> Outcome:
        loss = student.batch_loss(batch, num_items=batch.items, teacher=teacher)
        loss.backward()
        grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        return Outcome(loss.detach(), grads)

    def work(ranks: ThreadRanks) -> Outcome:
        own, theirs = copy.deepcopy(model), copy.deepcopy(teacher)
        split_context(own, ranks)
        with pytest.raises(ValueError, match="computes slice 0 of 1"):
            own.batch_loss(batch, teacher=theirs)
        split_context(theirs, ranks)
        return step(own, theirs)

    assert_equal(summed(run_ranks(2, work)), step(copy.deepcopy(model), teacher), 1e-12)


@pytest.mark.parametrize("factor", [None, 0.1])
def test_log_probabilities_of_sequences_are_those_of_all_their_tokens(
    factor: float | None, build: Build
) -> None:
    """Two answers share a prompt that is stored once, and cross the slices."""
    model = build("qwen2_moe")
    ids = torch.randint(0, 64, (1, 50), generator=torch.Generator().manual_seed(2))
    ids[0, 30:41] = ids[0, :11]
    labels = ids.clone()
    labels[0, :12] = labels[0, 30:42] = -100
    batch = PackedBatch.of(ids, labels, torch.tensor([0, 30, 50]))
    sequences = Sequences.of((18, 8), (0, 0))
    batch = replace(batch, sequences=sequences).with_shared([11])
    settings = StepSettings(router_loss=factor)

    def step(model: Decoder) -> Outcome:
        sums, balance = batch_log_probs(model, batch, settings)
        loss = (sums[0] - 2 * sums[1]).sin() / model.context_ranks.size
        loss = loss if balance is None else loss + balance / model.context_ranks.size
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return Outcome(loss.detach(), grads)

    def work(ranks: ThreadRanks) -> Outcome:
        own = copy.deepcopy(model)
        split_context(own, ranks)
        return step(own)

    assert_equal(summed(run_ranks(4, work)), step(model), 1e-12)


def test_tokens_layers_and_vocabulary_are_divided_at_once(build: Build) -> None:
    """Slices of a batch, on ranks that gather each other's frozen layers and vocabulary."""
    model = build("qwen3_5", tie_word_embeddings=False)
    add_lora(model, rank=2)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    batch = batch_for(model)

    def work(ranks: ThreadRanks) -> Outcome:
        own = copy.deepcopy(model)
        own.shard_weights(ranks)
        shard_vocabulary(own, ranks)
        split_context(own, ranks)
        return Outcome.of(own, batch, StepSettings())

    want = Outcome.of(model, batch, StepSettings())
    assert_equal(summed(run_ranks(4, work)), want, 1e-12)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_rank_has_its_share_and_sends_what_is_planned(
    family: str, policy: str, build: Build
) -> None:
    model = build(family, torch.float32)
    size, tokens = 4, 1026
    batch = batch_for(model, bounds=(0, 1000, tokens))
    settings = StepSettings(checkpointing=policy, loss_chunk_tokens=64)

    def largest(model: Decoder) -> int:
        seen = LargestTensor()
        with seen:
            Outcome.of(model, batch, settings)
        return seen.elements

    def work(ranks: ThreadRanks) -> tuple[int, int, TokenSlices]:
        own = copy.deepcopy(model)
        split_context(own, ranks)
        return largest(own), ranks.sent["all_to_all"], TokenSlices.of(tokens, ranks.rank, size)

    alone = largest(model)
    for seen, sent, slices in run_ranks(size, work):
        assert seen <= alone / size * 1.02
        layers = [exchanged_heads(model.config, layer, slices, policy) for layer in range(2)]
        assert sent == sum(layer.bytes(4) for layer in layers)


def test_heads_come_back_as_they_went() -> None:
    """Of each tensor a rank has the heads that its queries read, of every token."""
    tokens, size = 11, 4
    q = torch.randn(tokens, 8, 3, generator=torch.Generator().manual_seed(1))
    k = torch.randn(tokens, 2, 3, generator=torch.Generator().manual_seed(2))
    copies = copies_of(8, 2, size)
    assert copies == 2

    def work(ranks: ThreadRanks) -> None:
        slices = TokenSlices.of(tokens, ranks.rank, size)
        exchange = HeadExchange(ranks, slices)
        mine = exchange.to_heads((slices.own(q), slices.own(k)), (1, copies))
        assert torch.equal(mine[0], q[:, 2 * ranks.rank :][:, :2])
        assert torch.equal(mine[1], k[:, ranks.rank // 2][:, None])
        back = torch.empty_like(slices.own(q)), torch.empty_like(slices.own(k))
        exchange.to_tokens(torch.cat([x.flatten(1) for x in mine], 1), back, (1, copies))
        assert torch.equal(back[0], slices.own(q)) and torch.equal(back[1], 2 * slices.own(k))

    run_ranks(size, work)


def test_heads_that_cannot_be_shared_are_refused(build: Build) -> None:
    def work(ranks: ThreadRanks) -> None:
        with pytest.raises(ValueError, match="4 heads cannot be shared equally by 3 processes"):
            split_context(build("llama"), ranks)

    run_ranks(3, work)


def test_whole_batches_are_computed_alone(build: Build) -> None:
    """Logits, and what reads hidden states of a whole batch, need no other rank."""
    model = build("llama")
    ids = torch.arange(12).view(1, 12)
    want = model(ids)

    def work(ranks: ThreadRanks) -> None:
        own = copy.deepcopy(model)
        split_context(own, ranks)
        assert torch.equal(own(ids), want)
        assert not ranks.sent

    run_ranks(2, work)
