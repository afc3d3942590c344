"""Greedy text with a cache is that without one, token by token, for every family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.inference.generation import generate_ids
from engine.model_sources.load_model import load_model

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


def random_ids(count: int) -> list[int]:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_needs_no_cache(family: str) -> None:
    model = load_model(GOLDEN / family)
    # One token; a chunk of DeltaNet and its edges; more than any window here, and one chunk.
    for length in (1, 64, 65, 100):
        prompt = random_ids(length)
        made = list(generate_ids(model, prompt, max_new_tokens=6))
        # Tokens before the last are the same rows of one pass without a cache.
        logits = model(torch.tensor([prompt + made]))[0]
        assert made == logits[length - 1 : -1].argmax(-1).tolist(), length


def test_a_prompt_that_is_not_of_the_vocabulary_is_refused() -> None:
    model = load_model(GOLDEN / "qwen3_moe")
    with pytest.raises(ConfigError, match="token id 64, and the model's vocabulary ends at 63"):
        next(generate_ids(model, [3, 64, 5], max_new_tokens=1))
    with pytest.raises(ConfigError, match="no tokens"):
        next(generate_ids(model, [], max_new_tokens=1))


def test_a_text_that_outgrows_its_dynamic_scaling_is_refused() -> None:
    model = load_model(GOLDEN / "llama")
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    rope = scaled | {"original_max_position_embeddings": 32}
    model.config = replace(model.config, rope_parameters=rope)
    assert len(list(generate_ids(model, random_ids(28), max_new_tokens=4))) == 4
    with pytest.raises(ConfigError, match="may have 33 tokens, and past 32"):
        next(generate_ids(model, random_ids(28), max_new_tokens=5))
