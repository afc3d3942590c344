"""Settings that transformers has no processor for, and how all of them reach an answer."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.tasks.inference import GenerateSettings, Sampling
from engine.errors import CheckpointError, ConfigError
from engine.inference.generation import generate_ids
from engine.inference.next_token import next_token
from engine.inference.processors import corrected
from engine.inference.sampling import resolve_sampling
from engine.model_sources.load_model import load_model

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
PROMPT = [3, 9, 27, 17]


def made(**settings: Any) -> list[int]:
    stops = settings.pop("stop_ids", frozenset())
    model, sampling = load_model(GOLDEN / "qwen3"), Sampling(**settings)
    return list(generate_ids(model, PROMPT, max_new_tokens=24, stop_ids=stops, sampling=sampling))


def test_presence_and_frequency_count_the_answer_alone() -> None:
    scores = torch.zeros(6)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    after = corrected(scores, [0, 1, 1], [2, 3, 3, 3], sampling)
    assert after.tolist() == [0, 0, -0.75, -1.25, 0, 0]


def test_settings_reach_the_answer() -> None:
    plain = made()
    assert len(set(made(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    once = PROMPT + made(no_repeat_ngram_size=2)
    pairs = list(itertools.pairwise(once))
    assert len(set(pairs)) == len(pairs)
    assert plain[0] not in made(bad_words_ids=[[plain[0]]])
    assert made(logit_bias={"40": 1000.0}) == [40] * 24
    stops = frozenset({plain[0]})
    assert made(stop_ids=stops) == plain[:1]
    later = made(stop_ids=stops, min_new_tokens=7)
    assert len(later) > 7
    assert plain[0] not in later[:7]


def test_a_setting_that_leaves_no_token_is_named() -> None:
    words = tuple((token,) for token in range(5))
    with pytest.raises(CheckpointError, match="exclude every token"):
        next_token(torch.zeros(5), [], Sampling(bad_words_ids=words), torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": '{"a": 1}'}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"bad_words_ids": "[[]]"}, "bad_words_ids"),
        ({"bad_words_ids": "[3]"}, "bad_words_ids"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_generation_config_brings_what_transformers_would_do() -> None:
    file = {"no_repeat_ngram_size": 3, "bad_words_ids": [[7]], "typical_p": 0.5, "num_beams": 2}
    result, line = resolve_sampling(GenerateSettings(model="m", prompt="p"), file, "m")
    assert (result.no_repeat_ngram_size, result.bad_words_ids) == (3, ((7,),))
    assert result.typical_p == 1.0  # nothing is drawn
    assert line == (
        "As generation_config.json says: no repeat ngram size 3, bad words ids ((7,),); "
        "not done here of generation_config.json: num_beams 2."
    )
