"""Weights of rows and of messages: from the row to the loss, and through the cache of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import collate
from engine.data.examples import Example, build_examples
from engine.data.rendering import Learning
from engine.data.rows import parse_row
from engine.data.rows.fields import RowFault
from engine.data.token_cache import read_tokens, write_tokens
from engine.errors import DataError
from engine.inference.perplexity import evaluate_examples
from engine.model_sources.load_model import load_model
from engine.model_sources.open import describe_model
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.trainable import make_trainable, step_settings
from kernels.loss.cross_entropy import LossTerms
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(describe_model(tiny_model), None)


def talk(*weights: float | None, **row: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        messages.append({"role": "user", "content": f"Word {number}?"})
        answer = {"role": "assistant", "content": f"abc{number}."}
        messages.append(answer if weight is None else answer | {"weight": weight})
    return {"messages": messages, **row}


def example(raw: dict[str, Any], tokenizer: Tokenizer, train_on: str = "all") -> Example:
    row = parse_row(raw, "f", 1)
    (made,), _ = build_examples([row], tokenizer, 512, learning=Learning(train_on))
    return made


def trained_weights(made: Example) -> list[float]:
    """The weights of the trained tokens, without repetitions beside each other."""
    assert made.weights is not None
    values = made.weights[made.mask].tolist()
    return [v for i, v in enumerate(values) if i == 0 or v != values[i - 1]]


def test_rows_and_messages_have_weights_that_multiply(tokenizer: Tokenizer) -> None:
    assert example(talk(None, None), tokenizer).weights is None
    assert example(talk(1, 1), tokenizer).weights is None
    assert trained_weights(example(talk(None, None, weight=2.5), tokenizer)) == [2.5]
    assert trained_weights(example(talk(0.5, None, 3), tokenizer)) == [0.5, 1.0, 3.0]
    assert trained_weights(example(talk(0.5, 3, weight=2), tokenizer)) == [1.0, 6.0]
    assert trained_weights(example(talk(0.5, 3), tokenizer, "last")) == [3.0]
    silent = example(talk(0, 3), tokenizer)
    assert trained_weights(silent) == [3.0]
    plain = example(talk(0.5, 3), tokenizer)
    assert plain.trained_tokens > silent.trained_tokens
    assert np.array_equal(plain.mask, example(talk(None, None), tokenizer).mask)


def test_documents_have_the_weight_of_their_row(tokenizer: Tokenizer) -> None:
    pieces, _ = build_examples(
        [parse_row({"text": "Word 1? abc. " * 20, "weight": 0.25}, "f", 1)], tokenizer, 32
    )
    assert len(pieces) > 1
    assert all(
        set(piece.weights.tolist()) == {0.25} for piece in pieces if piece.weights is not None
    )
    assert all(piece.weights is not None for piece in pieces)


@pytest.mark.parametrize("weight", [0, -1, "2", 5000, [1]])
def test_a_row_is_not_weighted_with_what_is_no_factor(weight: Any) -> None:
    with pytest.raises(RowFault, match="'weight' is"):
        parse_row(talk(None, weight=weight), "f", 1)


def test_a_message_is_not_weighted_with_what_is_no_factor(tokenizer: Tokenizer) -> None:
    with pytest.raises(RowFault, match="a number from 0 to 1000"):
        parse_row(talk(-0.5), "f", 1)
    with pytest.raises(DataError, match="whatever message it is in"):
        example(talk(0.5), tokenizer, "assistant")


def test_the_cache_of_tokens_keeps_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [parse_row(talk(w), "f", n) for n, w in enumerate((None, 2, 0.5))]
    made = build_examples(rows, tokenizer, 512)
    write_tokens(tmp_path, "k", made)
    read = read_tokens(tmp_path, "k")
    assert read is not None
    assert read[0] == made[0]


def test_a_row_of_weight_two_counts_as_if_it_were_there_twice(
    tokenizer: Tokenizer, tiny_model: Path
) -> None:
    config = TrainConfig(model="m", data="d", method="lora", gradient_checkpointing="none")
    model = load_model(tiny_model)
    make_trainable(model, config, None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.train()
    one, two = (example(talk(None, weight=w), tokenizer) for w in (1, 2))
    other = example(talk(None, None), tokenizer)
    losses, gradients = [], []
    for batch in (collate([two, other], weighted=True), collate([one, one, other], weighted=True)):
        model.zero_grad()
        loss = model.batch_loss(batch, step_settings(config))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_evaluation_counts_every_token_once(tokenizer: Tokenizer, tiny_model: Path) -> None:
    model = load_model(tiny_model)
    weighted, plain = example(talk(0.5, 3), tokenizer), example(talk(None, None), tokenizer)
    terms = StepSettings(loss_terms=LossTerms(0.2, 1e-2))
    assert evaluate_examples(model, [weighted], settings=terms).loss == (
        evaluate_examples(model, [plain]).loss
    )


def test_a_weighted_batch_travels_in_one_copy() -> None:
    weights = torch.rand(2, 7)
    ids = torch.arange(14).reshape(2, 7)
    batch = PackedBatch.of(ids, torch.where(ids % 2 == 0, ids, -100), weights=weights)
    assert batch.weights is not None
    chosen = [w for t, w in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True)]
    assert chosen == [weights.flatten()[t].item() for t in batch.targets.tolist()]
    assert batch.items == pytest.approx(sum(chosen))
    for with_ids in (True, False):
        again = batch.divided(batch.joined(with_ids), with_ids)
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), again.tensors(), strict=True))
        assert again.items == batch.items
