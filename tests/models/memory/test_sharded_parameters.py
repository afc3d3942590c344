"""Full fine-tuning with parameters divided among ranks, against an optimizer of whole ones."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.distributed.piece_states import piece_states, restore_pieces
from engine.model_sources.export import export_hf_directory
from engine.model_sources.gathered_source import GatheredSource
from engine.model_sources.load_model import ON_DEVICE, LayerPlacement, build_model
from engine.model_sources.open import open_model_source
from kernels.runtime.ranks import ONE_RANK
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.memory.absent import Absent
from models.sharding import (
    WholeParameters,
    finish_gradients,
    idle_pass,
    shard_parameters,
    sharded_parameters,
    trained_pieces,
)
from optim import AdamW8bit, Lion8bit, param_groups
from optim.clip import clip_coefficient, global_norm, norm_over_ranks
from optim.param_groups import piece_groups
from tests.support.processes.rank_threads import ThreadRanks, run_ranks
from tests.support.tiny_model import GOLDEN

FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_5"]
SETTINGS = StepSettings(checkpointing="selective", loss_chunk_tokens=9, router_loss=0.0)
STEPS, MOST_NORM = 3, 0.5
Batches = list[PackedBatch]


def built(family: str, layers: LayerPlacement = ON_DEVICE, dtype: Any = torch.float64) -> Decoder:
    source = open_model_source(str(GOLDEN / family))
    return build_model(source, dtype=dtype, layers=layers)


def batches_of(step: int, rank: int) -> Batches:
    """Rank 1 has two micro-batches, rank 2 none, the others one."""
    results = []
    for number in range({1: 2, 2: 0}.get(rank, 1)):
        draw = torch.Generator().manual_seed(100 * step + 10 * rank + number)
        ids = torch.randint(0, 60, (1, 18 + rank), generator=draw)
        results.append(PackedBatch.of(ids, torch.where(ids < 20, -100, ids)))
    return results


def items_of(step: int, ranks: int) -> float:
    return sum(b.trained_tokens for rank in range(ranks) for b in batches_of(step, rank))


class Descent(torch.optim.SGD):
    """Gradient descent in float64."""

    def step(self, *, grad_scale: Tensor) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(grad_scale.double())
        super().step()


def optimizer_of(kind: str, groups: list[dict[str, Any]]) -> Any:
    """With a larger eps Adam's step does not magnify the last bits of small gradients."""
    if kind == "adamw":
        return AdamW8bit(groups, 2e-4, eps=1e-2)
    return Descent(groups, 1e-3) if kind == "descent" else Lion8bit(groups, 1e-3)


def trained_whole(model: Decoder, kind: str, ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    """The parameters after some steps of the whole model, and the norms of its gradients."""
    model.requires_grad_(True).train()
    optimizer, norms = optimizer_of(kind, param_groups(model)), []
    for step in range(STEPS):
        for rank in range(ranks):
            for batch in batches_of(step, rank):
                model.batch_loss(batch, SETTINGS, num_items=items_of(step, ranks)).backward()
        norm = global_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append(float(norm))
        optimizer.step(grad_scale=clip_coefficient(norm, MOST_NORM))
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def trained_divided(
    own: ThreadRanks, model: Decoder, kind: str
) -> tuple[dict[str, Tensor], list[float]]:
    """The same with parameters divided: this rank's pieces gathered, and the norms."""
    model.train()
    optimizer, norms = optimizer_of(kind, piece_groups(trained_pieces(model))), []
    for step in range(STEPS):
        mine, items = batches_of(step, own.rank), items_of(step, own.size)
        for number in range(2 if own.size > 1 else 1):
            if number < len(mine):
                model.batch_loss(mine[number], SETTINGS, num_items=items).backward()
            else:
                idle_pass(model, SETTINGS, num_items=items)
        norm = norm_over_ranks(*finish_gradients(model), own)
        norms.append(float(norm))
        optimizer.step(grad_scale=clip_coefficient(norm, MOST_NORM))
        optimizer.zero_grad()
    whole = WholeParameters(model)
    return {name: whole.parameter(name).clone() for name in whole.shapes}, norms


def assert_near(mine: dict[str, Tensor], plain: dict[str, Tensor], bound: float) -> None:
    assert mine.keys() == plain.keys()
    for name, expected in plain.items():
        assert mine[name].shape == expected.shape
        assert float((mine[name] - expected).abs().max()) <= bound, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_move_parameters_as_an_optimizer_of_whole_ones_does(family: str, ranks: int) -> None:
    expected, norms = trained_whole(built(family), "descent", ranks)

    def work(own: ThreadRanks) -> None:
        model = built(family, LayerPlacement(ranks=own, trained=True))
        assert all(isinstance(p, Absent) for layer in model.layers for p in layer.parameters())
        parameters, measured = trained_divided(own, model, "descent")
        assert_near(parameters, expected, 1e-12)
        assert measured == pytest.approx(norms, rel=1e-6)
        assert max(norms) > MOST_NORM

    run_ranks(ranks, work)


EIGHT_BIT = [
    ("adamw", 1, "llama"),
    ("adamw", 4, "qwen3_moe"),
    ("adamw", 2, "qwen3_5"),
    ("lion", 4, "qwen3"),
]


@pytest.mark.parametrize(("kind", "ranks", "family"), EIGHT_BIT)
def test_8_bit_states_of_shares_give_the_steps_of_whole_ones(
    kind: str, ranks: int, family: str
) -> None:
    expected, _ = trained_whole(built(family, dtype=torch.float32), kind, ranks)

    def work(own: ThreadRanks) -> None:
        model = built(family, dtype=torch.float32)
        shard_parameters(model, own)
        parameters, _ = trained_divided(own, model, kind)
        assert_near(parameters, expected, 1e-6)

    run_ranks(ranks, work)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_equal_gradients_give_equal_bits(kind: str) -> None:
    def filled(parameter: Tensor, name: str) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 10.0 ** -torch.randint(0, 9, parameter.shape, generator=draw)
        return torch.randn(parameter.shape, generator=draw) * scale

    def moved(optimizer: Any) -> None:
        for _ in range(3):
            optimizer.step()

    whole = built("qwen3_moe", dtype=torch.float32).requires_grad_(True)
    gradients = {name: filled(p, name) for name, p in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        parameter.grad = gradients[name]
    kinds: Any = {"adamw": AdamW8bit, "lion": Lion8bit}
    moved(kinds[kind](param_groups(whole)))

    def work(own: ThreadRanks) -> None:
        model = built("qwen3_moe", dtype=torch.float32)
        shard_parameters(model, own)
        for piece in trained_pieces(model):
            part = gradients[piece.name].reshape(-1)[piece.begin :]
            parameter = piece.parameter
            parameter.grad = part[: parameter.numel()].view(parameter.shape).clone()
        moved(kinds[kind](piece_groups(trained_pieces(model))))
        parts = WholeParameters(model)
        for name, parameter in whole.named_parameters():
            assert torch.equal(parts.parameter(name), parameter.detach()), name

    run_ranks(3, work)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_element_is_on_one_rank_in_whole_blocks(ranks: int) -> None:
    whole = built("qwen3_moe")

    def work(own: ThreadRanks) -> list[tuple[str, int, Tensor]]:
        model = built("qwen3_moe")
        shard_parameters(model, own)
        pieces = trained_pieces(model)
        assert pieces[-1].name == "model.norm.weight"
        return [(p.name, p.begin, p.parameter.detach()) for p in pieces[:-1]]

    parts = [piece for pieces in run_ranks(ranks, work) for piece in pieces]
    for name, parameter in whole.named_parameters():
        mine = [(begin, part) for other, begin, part in parts if other == name]
        if name == "model.norm.weight":
            continue
        assert all(begin % 256 == 0 for begin, _ in mine)
        assert [begin for begin, _ in mine] == [
            sum(part.numel() for _, part in mine[:number]) for number in range(len(mine))
        ]
        joined = torch.cat([part.reshape(-1) for _, part in mine])
        assert torch.equal(joined, parameter.detach().view(-1))


def test_states_and_memory_are_a_share_and_bytes_sent_follow_their_formula() -> None:
    size = sum(p.numel() for p in built("llama").parameters())

    def work(own: ThreadRanks) -> int:
        model = built("llama", LayerPlacement(ranks=own, trained=True))
        weights = sharded_parameters(model)
        for _ in range(2):
            own.sent.clear()
            weights.idle_forward()
            weights.idle_backward()
            assert own.sent == weights.bytes_per_pass()
        own.sent.clear()
        weights.idle_forward()
        assert own.sent == weights.bytes_per_pass(backward=False)
        layers = [p for pieces in weights.pieces for p in pieces]
        assert sum(weights.shares) >= sum(p.parameter.nbytes for p in layers)
        optimizer = AdamW8bit(piece_groups(trained_pieces(model)))
        codes = optimizer.state_tensors()["exp_avg.codes"]
        return codes.numel()

    states = run_ranks(4, work)
    assert max(states) <= size / 4 * 1.2 + 4096


def test_the_whole_model_is_written_a_tensor_at_a_time_and_loads_elsewhere(tmp_path: Path) -> None:
    family = "qwen3_moe"
    expected, _ = trained_whole(built(family, dtype=torch.float32), "adamw", 2)

    def work(own: ThreadRanks) -> None:
        model = built(family, LayerPlacement(ranks=own, trained=True), torch.float32)
        trained_divided(own, model, "adamw")
        source = GatheredSource(open_model_source(str(GOLDEN / family)), model)
        if own.rank == 0:
            export_hf_directory(source, tmp_path / "model")
        else:
            source.follow()

    run_ranks(2, work)
    loaded = build_model(open_model_source(str(tmp_path / "model")), dtype=torch.float32)
    assert_near({n: p.detach() for n, p in loaded.named_parameters()}, expected, 1e-6)


def test_a_run_goes_on_from_its_shares_to_the_same_bits() -> None:
    def work(own: ThreadRanks) -> None:
        results = []
        for stops in (False, True):
            model = built("llama", LayerPlacement(ranks=own, trained=True), torch.float32)
            optimizer = AdamW8bit(piece_groups(trained_pieces(model)), 1e-3)
            for step in range(2):
                items = items_of(step, own.size)
                batch = batches_of(step, own.rank)[0]
                model.batch_loss(batch, SETTINGS, num_items=items).backward()
                finish_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
                if stops:
                    saved = [p.parameter.detach().clone() for p in trained_pieces(model)]
                    states = {n: x.clone() for n, x in optimizer.state_tensors().items()}
                    model = built("llama", LayerPlacement(ranks=own, trained=True), torch.float32)
                    for piece, value in zip(trained_pieces(model), saved, strict=True):
                        piece.parameter.data.copy_(value)
                    optimizer = AdamW8bit(piece_groups(trained_pieces(model)), 1e-3)
                    optimizer.load_state_tensors(states)
            results.append([p.parameter.detach() for p in trained_pieces(model)])
        assert all(map(torch.equal, *results))

    run_ranks(2, work)


def test_evaluation_and_a_process_alone() -> None:
    model = built("qwen3_5")
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        expected = model(ids)
        shard_parameters(model, ONE_RANK)
        assert float((model(ids) - expected).abs().max()) <= 1e-12


def test_a_gradient_that_is_not_finite_makes_the_norm_so_on_all_ranks() -> None:
    def work(own: ThreadRanks) -> float:
        model = built("llama", LayerPlacement(ranks=own, trained=True))
        for piece in trained_pieces(model)[:-1]:
            piece.parameter.grad = torch.full_like(piece.parameter, float(own.rank == 1) * math.inf)
        return float(norm_over_ranks(*finish_gradients(model), own))

    assert not any(map(math.isfinite, run_ranks(2, work)))


def test_layers_that_cannot_be_divided_are_refused() -> None:
    model = built("llama")
    model.layers[0].input_layernorm.weight.data = torch.ones(1)
    with pytest.raises(ValueError, match="parameters of several dtypes"):
        shard_parameters(model, ONE_RANK)
    with pytest.raises(ValueError, match="are not divided among ranks"):
        trained_pieces(built("llama"))
    with pytest.raises(ValueError, match="nothing to optimise"):
        piece_groups([])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_another_number_of_ranks_goes_on_from_the_same_states(
    kind: str, before: int, after: int
) -> None:
    def step(own: ThreadRanks, model: Decoder, optimizer: Any, number: int) -> None:
        if own.rank == 0:
            model.batch_loss(batches_of(number, 0)[0], SETTINGS, num_items=9).backward()
        else:
            idle_pass(model, SETTINGS, num_items=9)
        finish_gradients(model)
        optimizer.step()
        optimizer.zero_grad()

    def all_of(model: Decoder) -> dict[str, Tensor]:
        whole = WholeParameters(model)
        return {name: whole.parameter(name).clone() for name in whole.shapes}

    def first(own: ThreadRanks) -> Any:
        model = built("llama", LayerPlacement(ranks=own, trained=True), torch.float32)
        optimizer = optimizer_of(kind, piece_groups(trained_pieces(model)))
        step(own, model, optimizer, 0)
        pieces = trained_pieces(model)
        saved = {piece.name: piece.parameter.detach().clone() for piece in pieces}
        states = {name: x.clone() for name, x in piece_states(optimizer, pieces).items()}
        step(own, model, optimizer, 1)
        return saved, states, all_of(model)

    results = run_ranks(before, first)
    saved, states = [result[0] for result in results], [result[1] for result in results]

    def second(own: ThreadRanks) -> None:
        model = built("llama", LayerPlacement(ranks=own, trained=True), torch.float32)
        pieces = trained_pieces(model)
        optimizer = optimizer_of(kind, piece_groups(pieces))
        with pytest.raises(ValueError, match="no rank saved model"):
            restore_pieces(optimizer, pieces, [{}], states)
        with pytest.raises(ValueError, match=r"elements of torch.float32; .* are expected"):
            restore_pieces(optimizer, pieces, [_halved(x) for x in saved], states)
        restore_pieces(optimizer, pieces, saved, states)
        step(own, model, optimizer, 1)
        assert_near(all_of(model), results[0][2], 1e-6)

    run_ranks(after, second)


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.reshape(-1)[: x.numel() // 2] for name, x in tensors.items()}
