"""Every sampling setting that is allowed gives an id, and extremes give the one they mean."""

import itertools
import math
from typing import Any

import pytest
import torch

from engine.config.tasks.inference import Sampling
from engine.errors import CheckpointError, ConfigError
from engine.inference.next_token import next_token

LOGITS = torch.tensor([0.5, 3.0, -2.0, 2.9, 0.0])
TINY, HUGE = 5e-324, 1.7e308


def draw(seen: tuple[int, ...] = (0, 3), logits: torch.Tensor = LOGITS, **settings: Any) -> int:
    return next_token(logits, seen, Sampling(**settings), torch.Generator().manual_seed(1))


def test_extremes_of_all_settings_give_an_id() -> None:
    temperatures = (0.0, TINY, 1e-320, 1e-40, 1e-5, 1.0, 1e30, HUGE)
    masses, counts = (TINY, 1e-320, 1e-9, 0.5, 1.0), (0, 1, 4, 5, 10**30)
    penalties = (TINY, 1e-45, 1.0, 1e45, HUGE)
    for t, p, k, r in itertools.product(temperatures, masses, counts, penalties):
        token = draw(temperature=t, top_p=p, top_k=k, repetition_penalty=r)
        assert 0 <= token < 5, (t, p, k, r)


@pytest.mark.parametrize("temperature", [TINY, 1e-320, 1e-45, 1e-38, 1e-10])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    assert draw(temperature=temperature) == 1
    assert draw(temperature=temperature, top_p=TINY, logits=LOGITS * 1e30) == 1


def test_a_huge_temperature_forgets_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = Sampling(temperature=HUGE)
    drawn = {next_token(LOGITS, (), settings, generator) for _ in range(200)}
    assert drawn == {0, 1, 2, 3, 4}


def test_a_huge_penalty_never_repeats_and_a_tiny_one_does() -> None:
    assert draw(seen=(1, 3), repetition_penalty=HUGE) == 0
    assert draw(seen=(2, 0), repetition_penalty=1e-30) == 0


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_allowed_seed_is_a_seed(seed: int) -> None:
    torch.Generator().manual_seed(Sampling(seed=seed).seed)
    for outside in (-(2**63) - 1, 2**64):
        with pytest.raises(ConfigError, match="seed"):
            Sampling(seed=outside)


def test_logits_that_are_no_numbers_are_named() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        draw(logits=torch.tensor([1.0, math.nan]))
