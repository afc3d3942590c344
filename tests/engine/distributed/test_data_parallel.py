"""A step of several ranks is that of one: losses, gradients, norms and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.distributed.data_parallel import DataParallel, JoinedParallel
from engine.distributed.deal import PassLimits, RowCost, deal_by_cost, deal_in_order
from engine.distributed.mesh import Mesh
from engine.training.processes.ownership import own_pieces
from engine.training.processes.together import Optimization
from engine.training.step import StepResult, TrainingStep
from engine.training.trainable import backward_units
from kernels.runtime.ranks import Ranks
from models.adapters import adapter_tensors, add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from optim import Adafactor, AdamW8bit, Lion8bit, Muon, StepOptimizer
from optim.param_groups import piece_groups
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

LENGTHS = (5, 17, 9, 30, 12, 3, 21, 8)
COST = RowCost(100.0, 1.0)
Weights = dict[str, Tensor]


class WideAdamW(StepOptimizer):
    """torch's AdamW in the parameters' own type, which may be fp64."""

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        super().__init__(params, {})
        # A larger eps: gradients that are all rounding must not move a weight by lr.
        self._inner = torch.optim.AdamW(params, lr=lr, eps=1e-4, foreach=False)

    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        only: tuple[int, ...] | None = None,
    ) -> None:
        for param in self.ordered_params():
            assert param.grad is not None
            param.grad.mul_(grad_scale)
        self._inner.step()


OPTIMIZERS: dict[str, Callable[[list[Any]], StepOptimizer]] = {
    "wide": lambda own: WideAdamW(own, 1e-2),
    "adamw8bit": lambda own: AdamW8bit(own, lr=1e-2),
    "lion8bit": lambda own: Lion8bit(own, 1e-3),
    "adafactor": lambda own: Adafactor(own, 1e-2),
    "muon": lambda own: Muon(
        [
            {"params": members, "muon": muon}
            for muon in (True, False)
            if (members := [p for p in own if (p.ndim > 1) is muon])
        ],
        1e-2,
    ),
}


def build(dtype: torch.dtype, dropout: float, full: bool) -> Decoder:
    raw = {
        "model_type": "qwen3",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    model = Decoder(ModelConfig.from_dict(raw))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)
        if "norm" in name:
            parameter.data.add_(1.0)
        parameter.requires_grad_(full)
    if not full:
        add_lora(model, rank=4, dropout=dropout)
        for _, b in adapter_tensors(model).values():
            torch.nn.init.normal_(b, std=0.1, generator=draw)
    return model.to(dtype)


def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    return [
        Example(
            torch.randint(0, 97, (length,), generator=draw).tolist(),
            [index > length // 3 for index in range(length)],
            f"row:{length}",
        )
        for length in LENGTHS
    ]


def shares(
    step: Sequence[Sequence[int]], ranks: Ranks, in_order: bool, most: int
) -> list[PackedBatch]:
    """The batches of one rank of a step."""
    rows = examples()
    length = LENGTHS.__getitem__
    if in_order:
        dealt = deal_in_order(step, length, COST, ranks.size)
    else:
        dealt = deal_by_cost(step, length, COST, ranks.size, PassLimits(most))
    return [
        collate([rows[index] for index in piece.rows]).part_of(piece.micro, piece.first_token)
        for piece in dealt[ranks.rank]
    ]


def train(
    ranks: Ranks,
    dtype: torch.dtype,
    dropout: float = 0.0,
    full: bool = False,
    kind: str = "wide",
    clip: float = 0.05,
    steps: Sequence[Sequence[Sequence[int]]] = (((0, 1, 2), (3, 4, 5)), ((6, 7, 0), (2,))),
) -> tuple[list[StepResult], Weights]:
    """Some steps of a fresh model; the results and all trained weights."""
    model = build(dtype, dropout, full)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = kind in ("adafactor", "muon")
    parallel = DataParallel(ranks, backward_units(model), elements=3000, whole=whole)
    pieces = own_pieces(model, JoinedParallel(parallel), Mesh(ranks))
    own: list[Any] = [piece.parameter for piece in pieces]
    if kind in ("adamw8bit", "lion8bit"):
        own = piece_groups(pieces, min_8bit_size=256)
    optimizer = OPTIMIZERS[kind](own)
    settings = StepSettings(hidden_dropout=dropout, attention_dropout=dropout)
    step = TrainingStep(model, optimizer, settings, clip, seed=3, parallel=parallel)
    results = [
        step(shares(rows, ranks, in_order=dropout > 0.0, most=3), number)
        for number, rows in enumerate(steps)
    ]
    return results, {name: p.detach().clone() for name, p in named.items()}


def assert_alike(
    ours: tuple[list[StepResult], Weights], theirs: tuple[list[StepResult], Weights], eps: float
) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=eps, abs=0)
        # The norm is fp32, and its squares are added in another order.
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=max(eps, 3e-7), abs=0)
        assert (mine.tokens, mine.trained_tokens) == (other.tokens, other.trained_tokens)
    for name, tensor in theirs[1].items():
        torch.testing.assert_close(ours[1][name], tensor, rtol=0.0, atol=eps, msg=name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ranks_train_as_one_does(size: int, dropout: float) -> None:
    (alone,) = run_ranks(1, lambda ranks: train(ranks, torch.float64, dropout))
    together = run_ranks(size, lambda ranks: train(ranks, torch.float64, dropout))
    for one in together:
        assert_alike(one, alone, 1e-12)


@pytest.mark.parametrize("size", [3, 50])
@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit", "adafactor", "muon"])
def test_owners_update_to_the_bits_of_one_rank(kind: str, size: int) -> None:
    """A step of one row has the same sums everywhere, so nothing is left that could differ.

    Of 50 ranks some own nothing, of 42 tensors or of a bucket's blocks.
    """
    steps = (((3,),), ((1,),), ((4,),))

    def work(ranks: Ranks) -> tuple[list[StepResult], Weights]:
        return train(ranks, torch.float32, kind=kind, clip=0.0, steps=steps)

    (alone,) = run_ranks(1, work)
    for one in run_ranks(size, work):
        assert_alike(one, alone, 0.0)


@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit"])
def test_the_state_of_a_cut_parameter_is_that_of_one_rank(kind: str) -> None:
    """Of parameters that are no whole blocks too; others take it again, with the number of steps.

    The embedding's 6,208 elements end in the middle of a block.
    """
    config = TrainConfig(model="m", data="d", method="full", optimizer=kind, learning_rate=1e-2)

    def made(ranks: Ranks) -> tuple[Decoder, Optimization]:
        model = build(torch.float32, 0.0, full=True)
        return model, Optimization.of(model, config, Mesh(ranks, ranks))

    def work(ranks: Ranks) -> tuple[Weights, Weights]:
        model, first = made(ranks)
        step = TrainingStep(model, first.optimizer, max_grad_norm=0.0, parallel=first.parallel)
        for number, row in enumerate((3, 1)):
            step(shares(((row,),), ranks, in_order=False, most=3), number)
        saved = {name: tensor.clone() for name, tensor in first.state.state_tensors().items()}
        _, second = made(ranks)
        second.state.load_state_tensors(saved)
        return saved, second.state.state_tensors()

    ((alone, _),) = run_ranks(1, work)
    for saved, taken in run_ranks(3, work):
        assert saved.keys() == alone.keys() == taken.keys()
        for name, tensor in alone.items():
            assert torch.equal(taken[name], saved[name]), name
            # Sums of gradients are rounded otherwise, by which a code is the next one at most.
            rel, near = (0.0, 1.0) if tensor.dtype == torch.uint8 else (1e-5, 1e-7)
            torch.testing.assert_close(saved[name], tensor, rtol=rel, atol=near, msg=name)


def test_every_weight_is_trained_as_one_rank_does() -> None:
    (alone,) = run_ranks(1, lambda ranks: train(ranks, torch.float64, full=True))
    for one in run_ranks(3, lambda ranks: train(ranks, torch.float64, full=True)):
        assert_alike(one, alone, 1e-12)


def test_ranks_train_alike_in_single_precision() -> None:
    (alone,) = run_ranks(1, lambda ranks: train(ranks, torch.float32))
    for one in run_ranks(2, lambda ranks: train(ranks, torch.float32)):
        assert_alike(one, alone, 1e-6)


def test_ranks_without_a_row_take_part() -> None:
    steps = (((3,),), ((1, 2),))
    (alone,) = run_ranks(1, lambda ranks: train(ranks, torch.float64, steps=steps))
    for one in run_ranks(4, lambda ranks: train(ranks, torch.float64, steps=steps)):
        assert_alike(one, alone, 1e-12)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all() -> None:
    def work(ranks: Ranks) -> tuple[list[bool], bool, list[Tensor]]:
        model = build(torch.float32, 0.0, full=False)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        parallel = DataParallel(ranks, backward_units(model), elements=3000)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW8bit([owned for _, owned in parallel.own], lr=1e-2)
        step = TrainingStep(model, optimizer, max_grad_norm=1.0, parallel=parallel)
        batches = shares(((0, 1, 2, 3),), ranks, in_order=False, most=4)
        with torch.no_grad():
            if ranks.rank == 1:
                trained[-1].fill_(float("nan"))
        result = step(batches, 0)
        return (
            [result.skipped, result.torn],
            parallel.own != [],
            [p.detach() - b for p, b in zip(trained, before, strict=True)],
        )

    for told, owns, moved in run_ranks(3, work):
        assert told == [True, False] and owns
        assert all(not bool(m.nan_to_num().any()) for m in moved)


def test_what_a_step_sends_is_what_was_said() -> None:
    def work(ranks: ThreadRanks) -> tuple[dict[str, int], dict[str, int]]:
        model = build(torch.float32, 0.0, full=False)
        parallel = DataParallel(ranks, backward_units(model))
        trained = [owned for _, owned in parallel.own]
        step = TrainingStep(model, AdamW8bit(trained, lr=1e-2), parallel=parallel)
        step(shares(((0, 1, 2, 3),), ranks, in_order=False, most=4))
        return dict(ranks.sent), parallel.bytes_per_step()

    for sent, said in run_ranks(2, work):
        assert {kind: sent[kind] for kind in said} == said
        assert sent["all_reduce"] < 200  # losses, norms and counts


def test_a_parameter_is_in_one_unit() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="two units"):
        run_ranks(1, lambda ranks: DataParallel(ranks, [[p], [p]]))


def loads(parallel: DataParallel, ranks: Ranks) -> list[int]:
    """How many elements each rank updates."""
    return [sum(p.count for p in parallel.pieces_of(rank)) for rank in range(ranks.size)]


def test_ranks_own_as_much_of_every_bucket_but_for_a_block() -> None:
    """Also where one tensor is larger than all others, and where there are more ranks than any."""

    def work(ranks: Ranks) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
        sizes = ((7000, 60), (256, 300, 5), (3,))
        units = [[torch.nn.Parameter(torch.zeros(n)) for n in unit] for unit in sizes]
        parallel = DataParallel(ranks, units, elements=512)
        order = {id(p): n for n, p in enumerate(p for unit in units for p in unit)}
        pieces = [p for rank in range(ranks.size) for p in parallel.pieces_of(rank)]
        told = [(order[id(p.parameter)], p.begin, p.count) for p in pieces]
        return loads(parallel, ranks), [b.gradient_bytes // 4 for b in parallel.buckets], told

    for amounts, buckets, pieces in run_ranks(3, work):
        assert sum(amounts) == 7624 and max(amounts) == 2560 + 512 + 3
        assert buckets == [7680, 1536, 768]  # in blocks of 256, as many for each rank
        for number, size in enumerate((7000, 60, 256, 300, 5, 3)):
            own = [(begin, count) for index, begin, count in pieces if index == number]
            assert all(begin % 256 == 0 for begin, _ in own)
            assert sorted(own)[0][0] == 0 and sum(count for _, count in own) == size


def test_whole_tensors_are_owned_evenly_over_all_buckets() -> None:
    """Each bucket has four tensors for six ranks: those that got none before come first."""

    def work(ranks: Ranks) -> tuple[list[int], int]:
        units = [[torch.nn.Parameter(torch.zeros(256)) for _ in range(4)] for _ in range(3)]
        parallel = DataParallel(ranks, units, elements=1, whole=True)
        assert all(piece.count == piece.numel == 256 for piece, _ in parallel.own)
        return loads(parallel, ranks), len(parallel.buckets)

    for amounts, buckets in run_ranks(6, work):
        assert amounts == [512] * 6 and buckets == 2


def test_buckets_of_whole_tensors_take_more_layers_for_many_ranks() -> None:
    units = [[torch.nn.Parameter(torch.zeros(256)) for _ in range(4)] for _ in range(8)]

    def sizes(ranks: Ranks) -> list[int]:
        parallel = DataParallel(ranks, units, elements=64, whole=True)
        return [bucket.gradient_bytes // 4 for bucket in parallel.buckets]

    assert run_ranks(1, sizes) == [[1024] * 8]
    assert run_ranks(8, sizes) == [[2048] * 4] * 8
