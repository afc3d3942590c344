"""Log-likelihoods of continuations, beside those of the whole logits of each text alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine
from engine.config.tasks.inference import EvalSettings
from engine.errors import ConfigError
from engine.harness.scoring import Pair, score_pairs
from models.decoder import Decoder


@pytest.fixture(params=["llama", "qwen3_moe", "qwen3_next"])
def model(request: pytest.FixtureRequest, golden: Callable[[str], Path]) -> Decoder:
    return engine.load_model(golden(request.param))


def alone(model: Decoder, pair: Pair, window: int) -> tuple[float, bool]:
    """By the logits of the one text, in float64."""
    context, continuation = pair
    text = [*context, *continuation][-(window + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([text[:-1]]))[0].double()[-len(continuation) :]
    target = torch.tensor(continuation)
    likely = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(likely), bool((logits.argmax(-1) == target).all())


def pairs_of(vocabulary: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(4)

    def some(count: int) -> list[int]:
        ids: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return ids

    shared = some(11)
    choices = [(shared, some(1)) for _ in range(4)]
    return [
        (some(1), some(3)),
        *choices,
        (some(30), some(8)),
        (some(5), some(5)),
        (some(2), some(1)),
    ]


@pytest.mark.parametrize(("window", "tokens"), [(512, 2048), (512, 16), (9, 2048)])
def test_scores_are_those_of_each_text_alone(model: Decoder, window: int, tokens: int) -> None:
    pairs = pairs_of(model.config.vocab_size)
    scores = score_pairs(model, pairs, window, tokens)
    for pair, (likely, greedy) in zip(pairs, scores, strict=True):
        wanted, likeliest = alone(model, pair, window)
        assert likely == pytest.approx(wanted, abs=1e-3)
        assert greedy == likeliest


def test_the_likeliest_tokens_are_said_to_be(golden: Callable[[str], Path]) -> None:
    model, text = engine.load_model(golden("llama")), [5, 9, 2]
    with torch.no_grad():
        best = int(model(torch.tensor([text]))[0, -1].argmax())
    (_, first), (_, second) = score_pairs(model, [(text, [best]), (text, [best - 1])], 64)
    assert (first, second) == (True, False)


def test_equal_inputs_are_read_once(
    golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = engine.load_model(golden("llama")), list[int]()
    before = model.hidden_states

    def count(batch: object, *args: object) -> torch.Tensor:
        read.append(batch.tokens)  # type: ignore[attr-defined]
        return before(batch, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden_states", count)
    score_pairs(model, [([1, 2, 3], [choice]) for choice in range(4)], 64)
    assert read == [3]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 9)])
def test_pairs_without_an_answer_are_refused(golden: Callable[[str], Path], pair: Pair) -> None:
    with pytest.raises(ValueError, match="expected at least one each"):
        score_pairs(engine.load_model(golden("llama")), [pair], 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either `data`"),
        ({"data": "a.jsonl", "tasks": "x"}, "give either `data`"),
        ({"tasks": "x", "heldout": 0.1}, "heldout: no setting of an evaluation by `tasks`"),
        ({"data": "a.jsonl", "limit": 3}, "limit: no setting of an evaluation by `data`"),
    ],
)
def test_rows_and_tasks_have_settings_of_their_own(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalSettings(model="m", **settings)  # type: ignore[arg-type]
    assert EvalSettings(model="m", tasks="a, b").tasks == ("a", "b")  # type: ignore[arg-type]
