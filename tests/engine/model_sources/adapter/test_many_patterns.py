"""Patterns of ranks and rounds of LoftQ: as many as adapters have, in little time."""

import re
import time
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.model_sources.adapter.config import by_pattern, from_json
from engine.model_sources.adapter.initial import initial_base

MODULE = "model.layers.11.self_attn.q_proj"


def read(**keys: Any) -> Any:
    return from_json({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **keys}, "a.json")


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "self_attn.q_proj", "self.attn.q_proj", "11.self_attn.q_proj", "proj", "q_projx",
     "v_proj", MODULE, "odel.layers.11.self_attn.q_proj", "q.proj", "model", "..proj", "q_proj.",
     ".*", ".*q_proj", "layers.(1|11).self_attn.q_proj", "q_pro[j]", "q_proj|v_proj"],
)  # fmt: skip
def test_a_pattern_means_what_its_expression_means(pattern: str) -> None:
    matches = re.match(rf"(.*\.)?({pattern})$", MODULE) is not None
    assert by_pattern({pattern: 3}, MODULE, 8) == (3 if matches else 8)


def test_every_module_may_have_a_rank_of_its_own() -> None:
    """The least time of three: others may work on this machine too."""
    modules = [f"model.layers.{n}.mlp.experts.{m}.up_proj" for n in range(10) for m in range(200)]
    ranks = {module: 1 + number % 7 for number, module in enumerate(modules)}
    times = []
    for _ in range(3):
        begun = time.process_time()
        adapter = read(rank_pattern=ranks)
        assert all(adapter.rank(f"model.layers.3.self_attn.{n}_proj") == 8 for n in "qkvo")
        assert adapter.rank(modules[1500]) == ranks[modules[1500]]
        times.append(time.process_time() - begun)
    assert min(times) < 0.5


def test_thousands_of_expressions_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"alpha_pattern has 1500 patterns"):
        read(alpha_pattern={f"(q|k){n}": 4 for n in range(1500)})


@pytest.mark.parametrize("rounds", [0, -1, 101, 2**63, 10**200, 1.5, "4", None])
def test_rounds_of_loftq_come_to_an_end(rounds: Any) -> None:
    weight = torch.randn(64, 64)
    with pytest.raises(CheckpointError, match="loftq_iter"):
        initial_base(weight, "loftq", 4, 1.0, {"loftq_config": {"loftq_iter": rounds}})
