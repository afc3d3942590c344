"""Prompts are answered while a run trains, also where no process has the whole model."""

from __future__ import annotations

from typing import cast

import pytest

from engine.config.tasks.inference import Sampling
from engine.inference.request import RequestSettings
from engine.model_sources.load_model import LayerPlacement
from engine.tokenization.tokenizer import Tokenizer
from engine.training.evaluation.samples import PromptAnswers, SamplePrompts
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.decoder import Decoder
from tests.models.test_sharding import built
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

PROMPTS = [[5, 9, 2], [7], [11, 3, 4, 8, 1, 6]]


class IdText:
    """Shows ids as their numbers."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def answers(model: Decoder, ranks: Ranks) -> list[str]:
    request = RequestSettings(12, Sampling(temperature=0.8, seed=3))
    prompts = SamplePrompts([{} for _ in PROMPTS], PROMPTS, request)
    ask = PromptAnswers(prompts, model, cast(Tokenizer, IdText()), ranks=ranks)
    assert ask.together == (ranks.size > 1)
    return [f"{answer.text} {answer.completion_tokens}" for answer in ask(0)]


@pytest.mark.parametrize("how", ["weights", "weights and vocabulary", "experts"])
def test_all_processes_answer_as_one_does(how: str) -> None:
    family = "qwen3_moe" if how == "experts" else "llama"
    whole = answers(built(family, LayerPlacement()), ONE_RANK)
    assert len(set(whole)) == 3 and not any(text.startswith(" ") for text in whole)

    def work(ranks: ThreadRanks) -> list[str]:
        if how == "experts":
            placed = LayerPlacement(experts=ranks)
        else:
            placed = LayerPlacement(ranks=ranks, vocabulary=None if how == "weights" else ranks)
        return answers(built(family, placed), ranks)

    assert run_ranks(2, work) == [whole, whole]
