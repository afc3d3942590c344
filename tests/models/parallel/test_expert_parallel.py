"""Expert parallelism: experts on several ranks give the loss and gradients of one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.load_model import LayerPlacement, build_model
from engine.model_sources.open import open_model_source
from kernels.moe.expert_share import share_of
from kernels.moe.grouped_matmul import planar_experts
from kernels.nf4 import NF4Weight, dequantize_rows, quantize
from kernels.nf4.planar import PlanarNF4Weight, from_planar
from models.adapters import adapter_tensors, add_lora, attach_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.experts import ExpertAdapter, Experts
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from models.over_ranks import (
    divide_experts,
    expert_parameters,
    expert_ranks,
    gathered_adapter,
    split_context,
)
from models.parallel.traffic import exchanged_rows
from tests.support.processes.rank_threads import Meeting, ThreadRanks, run_ranks

Golden = Callable[[str], Path]
MIXTURES = ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_vl"]
COUNTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}


def random_model(directory: Path, **changes: Any) -> Decoder:
    """A model of random weights in float64 that trains all of them, and adapters too."""
    raw = json.loads((directory / "config.json").read_text())
    raw.get("text_config", raw).update(COUNTS | changes)
    model = Decoder(ModelConfig.from_dict(raw).with_layers(2))
    add_lora(model, rank=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * 0.2 + (1.0 if "norm" in name else 0.0)
        parameter.requires_grad_("experts.gate_up_proj" not in name)  # an adapter takes it apart
    return model.train()


def dropping(model: Decoder) -> Decoder:
    """Give every adapter dropout."""
    for module in model.modules():
        if isinstance(module, Linear | ExpertAdapter):
            module.dropout = 0.25
    return model


def documents(count: int) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (1, 9 + 3 * n), generator=generator) for n in range(count)]
    return [PackedBatch.of(row, row) for row in rows]


def joined(batches: Sequence[PackedBatch]) -> PackedBatch:
    ids = torch.cat([batch.input_ids for batch in batches])
    edges = torch.tensor([0, *(batch.tokens for batch in batches)]).cumsum(0)
    return PackedBatch.of(ids, ids, edges)


Results = dict[str, Tensor]


def step(model: Decoder, batch: PackedBatch, items: float, settings: StepSettings) -> Results:
    """The loss and every gradient, of experts by their number."""
    model.zero_grad()
    loss = model.batch_loss(batch, settings, num_items=items)
    loss.backward()
    results = {"loss": loss.detach()}
    divided = {id(p) for p in expert_parameters(model)}
    first = {
        id(p): module.share.first
        for module in model.modules()
        if isinstance(module, Experts)
        for p in module.parameters()
    }
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        if id(p) in divided:
            results |= {f"{name} {first[id(p)] + n}": each for n, each in enumerate(p.grad)}
        elif id(p) in first:
            results |= {f"{name} {n}": each for n, each in enumerate(p.grad)}
        else:
            results[name] = p.grad
    return results


def together(parts: Sequence[Results]) -> Results:
    """Sums over ranks, but for experts, which one rank has."""
    total: Results = {}
    for part in parts:
        for name, value in part.items():
            if ".experts." in name:
                assert name not in total
            total[name] = total[name] + value if name in total else value
    return total


def assert_equal(got: Results, want: Results, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    assert farthest(got, want) <= tolerance


def farthest(got: Results, want: Results) -> float:
    """The largest difference of a tensor, in its own largest value."""
    return max(
        float((got[name] - value).abs().max()) / max(float(value.abs().max()), 1e-3)
        for name, value in want.items()
    )


def on_ranks(
    model: Decoder, batches: Sequence[PackedBatch], settings: StepSettings
) -> tuple[list[Results], list[int]]:
    """What each rank computes of its batch with its experts, and the bytes it sends."""
    items = sum(batch.items for batch in batches)

    def work(ranks: ThreadRanks) -> tuple[Results, int]:
        own = copy.deepcopy(model)
        divide_experts(own, ranks)
        first = sum(batch.tokens for batch in batches[: ranks.rank])
        part = step(own, batches[ranks.rank], items, replace(settings, first_row=first))
        return part, ranks.sent["all_to_all"]

    results = run_ranks(len(batches), work)
    return [part for part, _ in results], [sent for _, sent in results]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_ranks_with_their_experts_compute_what_one_does(
    family: str, policy: str, golden: Golden
) -> None:
    """One of four has no row, and does its part for the others all the same."""
    model, settings = random_model(golden(family)), StepSettings(checkpointing=policy)
    batches = [*documents(3), PackedBatch.idle()]
    parts, _ = on_ranks(model, batches, settings)
    whole = joined(batches[:3])
    assert_equal(together(parts), step(model, whole, whole.items, settings))


def test_masks_are_those_of_one_rank_where_documents_follow_each_other(golden: Golden) -> None:
    model, batches = dropping(random_model(golden("qwen2_moe"))), documents(3)
    model.layers[1].mlp.top_k = 3  # type: ignore[attr-defined]
    batches = [*batches, batches[0]]
    settings = StepSettings(dropout_seed=5, hidden_dropout=0.25)
    parts, _ = on_ranks(model, batches, settings)
    whole = joined(batches)
    assert_equal(together(parts), step(model, whole, whole.items, settings))


def test_single_precision(golden: Golden) -> None:
    model = random_model(golden("qwen2_moe")).float()
    parts, _ = on_ranks(model, documents(2), StepSettings())
    whole = joined(documents(2))
    want = step(model, whole, whole.items, StepSettings())
    # On some processors sums of this mixture in fp32 are 4e-6 from those of fp64: ours may be twice
    # as far from them.
    exact = step(copy.deepcopy(model).double(), whole, whole.items, StepSettings())
    assert_equal(together(parts), want, max(1e-6, 2 * farthest(want, exact)))


def test_experts_without_a_token_have_no_gradient(golden: Golden) -> None:
    """A router without an opinion sends all tokens to the same experts, which one rank has."""
    model = random_model(golden("qwen3_moe"))
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()
    parts, _ = on_ranks(model, documents(2), StepSettings())
    whole = joined(documents(2))
    assert_equal(together(parts), step(model, whole, whole.items, StepSettings()))
    idle = [all(not v.any() for n, v in part.items() if ".experts." in n) for part in parts]
    assert sorted(idle) == [False, True]


def test_a_rank_sends_what_is_planned(golden: Golden) -> None:
    model, batches = random_model(golden("qwen3_moe")), documents(2)
    _, sent = on_ranks(model, batches, StepSettings())
    every = sum(2 * batch.tokens for batch in batches)
    for own, bytes_sent in zip(batches, sent, strict=True):
        least, most = (exchanged_rows(model.config, own.tokens, rows) for rows in (0, every))
        assert 2 * least.bytes(8) < bytes_sent < 2 * most.bytes(8)
    each = [exchanged_rows(model.config, batch.tokens, 2 * batch.tokens) for batch in batches]
    planned = 2 * sum(layer.bytes(8) for layer in each)
    assert sum(sent) == planned


def test_slices_of_tokens_and_shares_of_experts_go_together(golden: Golden) -> None:
    """On one group of four, dropout included: rows of experts are numbered as on one rank."""
    model, batch = random_model(golden("qwen3_5_moe_vl")), joined(documents(3))
    dropping(model)
    settings = StepSettings(
        router_loss=0.1, dropout_seed=5, hidden_dropout=0.25, attention_dropout=0.25, first_row=6
    )

    def work(ranks: ThreadRanks) -> Results:
        own = copy.deepcopy(model)
        divide_experts(own, ranks)
        split_context(own, ranks)
        return step(own, batch, batch.items, settings)

    assert_equal(together(run_ranks(4, work)), step(model, batch, batch.items, settings))


def test_a_grid_of_context_and_experts(golden: Golden) -> None:
    """Ranks 0, 1 and 2, 3 share a batch's tokens; 0, 2 and 1, 3 have the experts between them."""
    model, batches = random_model(golden("qwen2_moe")), documents(2)
    items = sum(batch.items for batch in batches)
    contexts, groups = [Meeting(2), Meeting(2)], [Meeting(2), Meeting(2)]

    def work(ranks: ThreadRanks) -> Results:
        row, column = divmod(ranks.rank, 2)
        own = copy.deepcopy(model)
        split_context(own, ThreadRanks(contexts[row], column))
        divide_experts(own, ThreadRanks(groups[column], row))
        return step(own, batches[row], items, StepSettings())

    parts = run_ranks(4, work)
    whole = joined(batches)
    want = step(model, whole, whole.items, StepSettings())
    # Experts of the same numbers are on two ranks, for different tokens.
    first, second = together(parts[0::2]), together(parts[1::2])
    assert_equal({name: first[name] + second[name] for name in first}, want)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next"])
def test_a_loaded_rank_has_its_experts_codes_and_pairs_alone(
    family: str, golden: Golden, tmp_path: Path
) -> None:
    """What ranks save together is read by one that has all experts, and gives the same loss."""
    source, (batch,) = open_model_source(golden(family)), documents(1)

    def load(layers: LayerPlacement) -> Decoder:
        model = build_model(source, quantization="nf4", layers=layers)
        add_lora(model, rank=2, seed=4)
        return model

    alone = load(LayerPlacement())
    total = sum(p.numel() for p in alone.parameters())

    def work(ranks: ThreadRanks) -> float:
        model = load(LayerPlacement(experts=ranks))
        assert expert_ranks(model) is ranks
        assert sum(p.numel() for p in model.parameters()) < total
        own = {id(p) for p in expert_parameters(model)}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in own) == (".experts." in name)
        for mine, theirs in zip(model.modules(), alone.modules(), strict=True):
            if isinstance(mine, Experts) and isinstance(theirs, Experts):
                share = mine.share
                for name, whole in theirs.stored.items():
                    part = mine.stored[name]
                    assert isinstance(whole, NF4Weight) and isinstance(part, NF4Weight)
                    assert part.packed.numel() * 2 == whole.packed.numel()
                    rows = dequantize_rows(whole, share.first, share.first + share.count)
                    assert torch.equal(dequantize_rows(part, 0, share.count), rows)
        gathered, known = gathered_adapter(model), adapter_tensors(alone)
        assert gathered.keys() == known.keys()
        for path, pair in known.items():
            assert all(torch.equal(a, b) for a, b in zip(gathered[path], pair, strict=True))
        generator = torch.Generator().manual_seed(6)
        for pair in gathered.values():
            pair[1].normal_(std=0.3, generator=generator)
        attach_lora(model, gathered, dict.fromkeys(gathered, 2.0))
        with torch.no_grad():
            loss = float(model.batch_loss(batch))
        saved = gathered_adapter(model)
        if ranks.rank == 0:
            names = sorted({path.rpartition(".")[2] for path in saved})
            save_adapter(tmp_path, AdapterConfig(2, 4.0, names), saved)
        return loss

    losses = run_ranks(2, work)
    assert losses[0] == losses[1]
    saved = load_adapter(tmp_path)
    attach_lora(alone, saved.pairs, saved.scales)
    with torch.no_grad():
        assert float(alone.batch_loss(batch)) == pytest.approx(losses[0], rel=1e-6)


def test_blocks_of_scales_are_cut_between_experts() -> None:
    """Codes stay; scales that share a block with another expert's are decoded."""
    weight = quantize(torch.randn(6, 64, 64 * 40 // 8, generator=torch.Generator().manual_seed(1)))
    assert weight.nested_absmax is not None
    for first, count in ((0, 2), (2, 2), (4, 2), (3, 3)):
        want = dequantize_rows(weight, first, first + count)
        part = share_of(weight, first, count)
        assert isinstance(part, NF4Weight)
        assert torch.equal(dequantize_rows(part, 0, count), want)
        planar = share_of(planar_experts(weight), first, count)
        assert isinstance(planar, PlanarNF4Weight)
        flat = from_planar(replace(planar, shape=(count * 64, 320)))
        assert torch.equal(dequantize_rows(replace(flat, shape=planar.shape), 0, count), want)
    odd = quantize(torch.randn(4, 8, 12))
    with pytest.raises(ValueError, match="blocks hold elements of two experts"):
        share_of(odd, 0, 2)


def test_what_cannot_be_divided_is_refused(golden: Golden) -> None:
    source = open_model_source(golden("qwen2_moe"))

    def work(ranks: ThreadRanks) -> None:
        with pytest.raises(ConfigError, match="6 experts cannot be divided equally over 4"):
            build_model(source, layers=LayerPlacement(experts=ranks))
        with pytest.raises(ConfigError, match="leave one of the two out"):
            build_model(source, layers=LayerPlacement(ranks=ranks, experts=ranks, trained=True))
        dense = open_model_source(golden("llama"))
        with pytest.raises(ConfigError, match="no experts to divide"):
            build_model(dense, layers=LayerPlacement(experts=ranks))
        model = random_model(golden("qwen2_moe"))
        divide_experts(model, ranks)
        (batch,) = documents(1)
        with pytest.raises(ValueError, match="mlp_tile_tokens"):
            model.batch_loss(batch, StepSettings(mlp_tile_tokens=8))
        with pytest.raises(ValueError, match="already divided"):
            divide_experts(model, ranks)

    run_ranks(4, work)
