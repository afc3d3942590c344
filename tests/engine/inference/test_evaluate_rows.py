"""Losses of rows and of all of them, from one pass through the layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.inference.perplexity import evaluate_examples, evaluate_rows
from engine.model_sources.load_model import load_model
from models.layers.observer import LayerObserver, observe_layers
from tests.support.small_runs import random_examples


class _Passes(LayerObserver):
    """Counts how often layers run."""

    def __init__(self) -> None:
        self.count = 0

    def forward_begins(self, layer: int) -> None:
        self.count += 1


def test_rows_and_their_whole_are_what_evaluation_gives_and_layers_run_once(
    golden: Callable[[str], Path],
) -> None:
    model, examples = load_model(golden("llama")), random_examples(5, (40, 61, 33, 57, 48))
    passes = _Passes()
    with observe_layers(passes):
        result, rows = evaluate_rows(model, examples, tokens_per_batch=100)
    once = _Passes()
    with observe_layers(once):
        expected = evaluate_examples(model, examples, tokens_per_batch=100)
    assert passes.count == once.count > len(model.layers)
    assert (result.loss, result.perplexity) == (expected.loss, expected.perplexity)
    assert (result.tokens, result.rows) == (expected.tokens, expected.rows)
    for example, (loss, tokens) in zip(examples, rows, strict=True):
        alone = evaluate_examples(model, [example])
        assert tokens == alone.tokens
        assert loss / tokens == pytest.approx(alone.loss, rel=1e-5)
    assert sum(loss for loss, _ in rows) / result.tokens == pytest.approx(result.loss, rel=1e-6)
    assert torch.is_grad_enabled()
