"""Which objectives and methods processes refuse, and no others; docs/distributed.md lists them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.choices import ObjectiveName
from engine.config.rules import Facts, broken
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError

MODES: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "shard": {"shard": "weights"},
    "context": {"context_parallel": 2},
    "experts": {"expert_parallel": 2},
    "all": {"shard": "weights", "context_parallel": 2, "expert_parallel": 2},
}
OBJECTIVES: tuple[ObjectiveName, ...] = (
    "sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "distill",
)  # fmt: skip


def refused(mode: str, method: str, objective: ObjectiveName) -> bool:
    """Whether such a run of two processes is refused."""
    more = {"teacher": "t"} if objective == "distill" else {}
    try:
        config = TrainConfig(
            model="m", data="d", gpus=2, objective=objective, method=method, **MODES[mode], **more
        )
    except ConfigError:
        return True
    return bool(broken(config, Facts(experts=8, processes=2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_is_refused_is_what_is_listed(mode: str, method: str) -> None:
    got = {objective for objective in OBJECTIVES if refused(mode, method, objective)}
    if method != "full":
        assert got == set()
    elif mode in ("experts", "all"):
        assert got == set(OBJECTIVES)
    else:
        assert got == {"distill"}  # which one process refuses too
