"""Every sampling setting leaves the scores that transformers' processor of that name leaves."""

from typing import Any

import pytest
import torch

from engine.config.tasks.inference import Sampling
from engine.inference.processors import corrected, shaped

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

VOCABULARY, STOPS = 97, (5, 11)
DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p")
CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 40},
    {"bad_words_ids": ((3,), (4, 8), (1, 2, 3), (5,))},
    {"min_new_tokens": 9},
    {"min_new_tokens": 30},
    {"logit_bias": {4: 2.5, 90: -100.0, 0: 1.0}},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 13},
    {"top_k": 500},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": ((7,), (4, 8)),
        "min_new_tokens": 20,
        "logit_bias": {6: 1.5},
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
    },
]


def transformers_scores(
    settings: dict[str, Any], ids: list[int], made: int, scores: torch.Tensor
) -> torch.Tensor:
    """What transformers draws by, with the processors that its own generate makes."""
    given = {key: value for key, value in settings.items() if key != "logit_bias"}
    if "logit_bias" in settings:
        given["sequence_bias"] = [[[key], value] for key, value in settings["logit_bias"].items()]
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [list(word) for word in given["bad_words_ids"]]
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    draws = any(name in settings for name in DRAWN)
    generation = transformers.GenerationConfig(
        do_sample=draws, eos_token_id=list(STOPS), **{**(neutral if draws else {}), **given}
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    model._prepare_special_tokens(generation, device="cpu")
    processors = model._get_logits_processor(
        generation_config=generation,
        input_ids_seq_length=len(ids) - made,
        device="cpu",
    )
    result: torch.Tensor = processors(torch.tensor([ids]), scores[None].clone())[0]
    return result


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_scores_are_those_of_transformers(settings: dict[str, Any]) -> None:
    excluded = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(VOCABULARY, generator=generator) * 4
        # Few different ids, so that runs repeat.
        ids = torch.randint(0, 9, (24,), generator=generator).tolist()
        made = 10
        ours = corrected(scores.clone(), ids[:-made], ids[-made:], Sampling(**settings), STOPS)
        if any(name in settings for name in DRAWN):
            ours = shaped(ours, Sampling(**{"temperature": 1.0, **settings}))
        theirs = transformers_scores(settings, ids, made, scores)
        assert torch.equal(ours.isinf(), theirs.isinf()), seed
        assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6), seed
        excluded += int(theirs.isinf().sum())
    changes_only = {"repetition_penalty", "logit_bias", "temperature"}
    never = settings.get("no_repeat_ngram_size") == 40 or settings.get("top_k") == 500
    if not settings.keys() <= changes_only and not never and settings != {"min_new_tokens": 9}:
        assert excluded > 0
