"""How a step is cut changes nothing, and a value that is not finite reaches no weight."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.training.step import TrainingStep
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit
from tests.support.small_runs import random_examples

LAYERS = 2


def build(dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    raw = {
        "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8,
    }  # fmt: skip
    model = Decoder(ModelConfig.from_dict(raw))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name:
            parameter.data.add_(1.0)
    add_lora(model, rank=4)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


class Caught(AdamW8bit):
    """Keeps the gradients that reach it instead of a step."""

    def step(self, *_: object, **__: object) -> None:  # type: ignore[override]
        self.caught = [
            None if p.grad is None else p.grad.double().clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def measured(batches: Sequence[PackedBatch], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """The loss of a step, and its whole gradient."""
    model = build(dtype)
    optimizer = Caught([p for p in model.parameters() if p.requires_grad])
    loss = TrainingStep(model, optimizer, max_grad_norm=0.0)(batches).loss
    assert all(grad is not None for grad in optimizer.caught)
    return loss, torch.cat([grad.flatten() for grad in optimizer.caught if grad is not None])


def ragged(seed: int) -> list[Example]:
    """Rows of 2 to 60 tokens, of which the last ones are trained."""
    chance = random.Random(seed)
    rows = []
    for row in random_examples(seed, [chance.randint(2, 60) for _ in range(16)]):
        first = chance.randint(0, len(row) - 2)
        rows.append(Example(row.ids, [at > first for at in range(len(row))], row.source))
    return rows


def cuts(rows: list[Example], parts: int, chance: random.Random) -> list[list[Example]]:
    """The rows in another order, cut into so many micro-batches at random."""
    order = chance.sample(rows, len(rows))
    marks = [0, *sorted(chance.sample(range(1, len(order)), parts - 1)), len(order)]
    return [order[a:b] for a, b in itertools.pairwise(marks)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_and_packing_change_neither_loss_nor_gradient(
    seed: int, dtype: torch.dtype, bound: float
) -> None:
    rows, chance = ragged(seed), random.Random(seed)
    loss, gradient = measured([collate(rows)], dtype)  # one packed row
    for parts in (2, 3, 8, 16):
        apart = [collate(part) for part in cuts(rows, parts, chance)]
        assert len(apart) == parts
        other, cut = measured(apart, dtype)
        assert abs(other - loss) <= bound * abs(loss), parts
        assert float((cut - gradient).norm() / gradient.norm()) <= bound, parts


def test_a_mean_of_means_would_be_noticed() -> None:
    rows = ragged(0)
    loss, gradient = measured([collate(rows)], torch.float64)
    each = [measured([collate([row])], torch.float64) for row in rows]
    mean = sum(one for one, _ in each) / len(each)
    average = torch.stack([grad for _, grad in each]).mean(0)
    assert abs(mean - loss) > 1e-3 * loss
    assert float((average - gradient).norm() / gradient.norm()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_another_document_says_changes_nothing_at_all(dtype: torch.dtype) -> None:
    model, rows = build(dtype), ragged(1)
    batch = collate(rows)
    changed = Example((rows[0].ids + 1) % 60, rows[0].mask, rows[0].source)
    other = collate([changed, *rows[1:]])
    with torch.no_grad():
        before, after = (model(b.input_ids[None], b.cu_seqlens)[0] for b in (batch, other))
    first = len(rows[0])
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


def put(tensor: torch.Tensor, value: float) -> None:
    tensor.data.view(-1)[3] = value


def poison(model: Decoder, where: str, value: float) -> None:
    """Put a value into a weight, or into a gradient on its way back."""
    if where == "embedding":  # of every token: which ones are read depends on the rows
        weight = model.model.embed_tokens.weight
        assert isinstance(weight, torch.Tensor)
        weight.data[:, 3] = value
    elif where == "head":
        head = model.head_weight()
        assert isinstance(head, torch.Tensor)
        put(head, value)
    elif where == "gradient":
        adapter = next(p for n, p in model.named_parameters() if "lora_B" in n)
        adapter.register_hook(lambda grad: torch.full_like(grad, value))
    else:
        part, _, layer = where.partition(" ")
        put(dict(model.layers[int(layer)].named_parameters())[part], value)


SITES = (
    "embedding", "head", "gradient",
    *(f"{part} {layer}" for layer in range(LAYERS)
      for part in ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.q_proj.lora_A",
                   "mlp.down_proj.weight", "mlp.down_proj.lora_B")),
)  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", SITES)
def test_a_value_that_is_not_finite_moves_no_weight(where: str, value: float) -> None:
    model = build(torch.float32)
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step = TrainingStep(model, optimizer, max_grad_norm=1.0)
    batches = [collate(ragged(0)[:4]), collate(ragged(0)[4:8])]
    assert not step(batches).skipped
    poison(model, where, value)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    assert step(batches, 1).skipped
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)), name
    after = optimizer.state_tensors()
    assert after.keys() == state.keys() and len(state) > 2
    moved = [name for name, tensor in state.items() if not torch.equal(after[name], tensor)]
    assert moved == ["skipped_steps"]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_whose_square_is_infinite_is_clipped_or_skipped(max_grad_norm: float) -> None:
    model = build(torch.float32)
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step = TrainingStep(model, optimizer, max_grad_norm=max_grad_norm)
    poison(model, "gradient", 1e30)
    result = step([collate(ragged(0)[:4])])
    assert result.skipped == (max_grad_norm == 0.0) == bool(optimizer.skipped_steps)
    state = optimizer.state_tensors().values()
    assert all(bool(t.isfinite().all()) for t in state if t.is_floating_point())
