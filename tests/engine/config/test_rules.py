"""One table of rules: every rule can be broken, and everybody reads the same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.rules import RULES, Facts, allows, broken, check
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError

IN_BACKWARD = {"optimizer_in_backward": True, "method": "full", "max_grad_norm": 0.0}
RUN_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, Facts()),
    ({"eval_data": ("e",), "heldout": 0.1}, Facts()),
    ({"eval_every": 5}, Facts()),
    ({"teacher": "t", "method": "full"}, Facts()),
    ({"teacher": "t", "memory_budget": 1 << 30}, Facts()),
    ({"method": "full", "init_adapter": "a"}, Facts()),
    ({"method": "full", "use_dora": True}, Facts()),
    ({"method": "full", "head_precision": "8bit"}, Facts()),
    ({"method": "full", "embedding_on": "host"}, Facts()),
    ({"embedding_on": "host"}, Facts(tied=True)),
    ({"optimizer_in_backward": True, "max_grad_norm": 0.0}, Facts()),
    ({"optimizer_in_backward": True, "method": "full"}, Facts()),
    (
        {"optimizer_in_backward": True, "method": "full", "max_grad_norm": 0.0},
        Facts(dtype="float16"),
    ),
    ({"offload": ("weights",), "method": "lora"}, Facts()),
    ({"keep_decoded": "4", "method": "lora"}, Facts()),
    ({"keep_decoded": "4", "low_memory_decode": True}, Facts()),
    ({"cuda_graphs": True, "method": "full"}, Facts()),
    ({"cuda_graphs": True, "offload": ("checkpoints",)}, Facts()),
    ({"cuda_graphs": True, "memory_budget": 1 << 30}, Facts()),
    ({"cuda_graphs": True}, Facts(device="cpu")),
    ({"cuda_graphs": True}, Facts(device="cuda", recordable=False)),
    ({"resume": "auto"}, Facts()),
    ({"resume": "x", "overwrite": True}, Facts()),
]
EVALUATION_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({"eval_ema": True}, Facts()),
    ({"save_best": "eval_loss", "heldout": 0.1}, Facts()),
    ({"sample_every": 5}, Facts()),
    ({"sample_prompts": "prompts.jsonl"}, Facts()),
]
RECIPE_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({"method": "full", "modules_to_save": ("lm_head",)}, Facts()),
    ({"add_tokens": Path("t"), "modules_to_save": ("lm_head",)}, Facts()),
    ({"add_tokens": Path("t"), "method": "scratch"}, Facts()),
    ({"add_tokens": Path("t"), "init_adapter": Path("a")}, Facts()),
    ({"modules_to_save": ("embed_tokens",), "head_precision": "8bit"}, Facts(tied=True)),
    ({"add_tokens": Path("t"), "embedding_on": "host"}, Facts()),
    ({"modules_to_save": ("lm_head",), "teacher": "t"}, Facts()),
    ({"method": "full", "init_lora_weights": "gaussian"}, Facts()),
    ({"init_adapter": Path("a"), "init_lora_weights": "pissa"}, Facts()),
    ({"use_dora": True, "init_lora_weights": "olora"}, Facts()),
    ({"objective": "dpo", "init_lora_weights": "olora"}, Facts()),
    ({"init_lora_weights": "loftq"}, Facts()),
    ({"loftq_iter": 3}, Facts()),
    ({"method": "full", "layers": "1-2"}, Facts()),
    ({"init_adapter": Path("a"), "rank_pattern": {"q_proj": 2}}, Facts()),
    ({"method": "full", "loraplus_lr_ratio": 16.0}, Facts()),
    ({"teacher": "t", "label_smoothing_factor": 0.1}, Facts()),
    ({"optimizer": "muon"}, Facts()),
    ({"min_lr_ratio": 0.1, "lr_schedule": "constant"}, Facts()),
    ({"lr_power": 2.0}, Facts()),
    ({"lr_num_cycles": 2}, Facts()),
    (
        {"lr_schedule": "warmup_stable_decay", "lr_decay_ratio": 0.1, "lr_decay_steps": 2},
        Facts(),
    ),
    ({"lr_decay_steps": 3}, Facts()),
]
SCRATCH_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({"tokenizer": "char"}, Facts()),
    ({"model": "builtin:scratch"}, Facts()),
    ({"lora_dropout": 0.1, "method": "scratch"}, Facts()),
    ({"hidden_dropout": 0.1}, Facts()),
]
PREFERENCE_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({"objective": "dpo", "teacher": "t"}, Facts()),
    ({"objective": "distill"}, Facts()),
    ({"beta": 0.2}, Facts()),
    ({"objective": "ipo", "label_smoothing": 0.1}, Facts()),
    ({"objective": "simpo", "length_normalization": "on"}, Facts()),
    ({"objective": "kto", "nll_weight": 1.0}, Facts()),
    ({"objective": "dpo", "simpo_gamma": 1.0}, Facts()),
    ({"objective": "dpo", "desirable_weight": 2.0}, Facts()),
    ({"objective": "dpo", "undesirable_weight": 2.0}, Facts()),
    ({"objective": "orpo", "reference": "base"}, Facts()),
    ({"objective": "dpo", "reference": "m", "memory_budget": 1 << 30}, Facts()),
    ({"share_prompt": True}, Facts()),
    ({"objective": "dpo", "share_prompt": True, "cuda_graphs": True}, Facts()),
    ({"objective": "dpo", "share_prompt": True}, Facts(model_type="qwen3_next", hybrid=True)),
    ({"objective": "dpo", "packing": True}, Facts()),
    ({"objective": "kto", "streaming": "on"}, Facts()),
    ({"objective": "dpo", "train_on": "### Answer:"}, Facts()),
]
DIVIDED = {"shard": "weights", "gpus": 2, "method": "full"}
DISTRIBUTED_BREAKS: list[tuple[dict[str, Any], Facts]] = [
    ({**IN_BACKWARD, "gpus": 2}, Facts()),
    ({"cuda_graphs": True}, Facts(processes=2)),
    ({"data": ("-",), "gpus": 2}, Facts()),
    ({"max_restarts": 3}, Facts()),
    ({"gpus": 3, "context_parallel": 2}, Facts()),
    ({"context_parallel": 2}, Facts(processes=1)),
    ({"gpus": 3, "expert_parallel": 2}, Facts()),
    ({"expert_parallel": 2}, Facts(processes=1)),
    ({"expert_parallel": 2, "gpus": 2}, Facts(experts=0)),
    ({"expert_parallel": 2, "gpus": 2}, Facts(experts=5)),
    ({"expert_parallel": 2, "gpus": 2, "method": "full"}, Facts()),
    ({"expert_parallel": 2, "gpus": 2, "mlp_tile_tokens": 64}, Facts()),
    ({"expert_parallel": 2, "gpus": 2, "optimizer": "adafactor"}, Facts()),
    ({"shard": "weights"}, Facts(processes=1)),
    (DIVIDED | {"optimizer": "muon"}, Facts()),
    ({"shard": "weights", "gpus": 2, "keep_decoded": "4"}, Facts()),
    ({"shard": "weights", "gpus": 2, "modules_to_save": ("lm_head",)}, Facts()),
]
BREAKS = [
    *RUN_BREAKS,
    *EVALUATION_BREAKS,
    *RECIPE_BREAKS,
    *SCRATCH_BREAKS,
    *PREFERENCE_BREAKS,
    *DISTRIBUTED_BREAKS,
]
PLAIN = TrainConfig(model="m", data="d")


def test_the_default_settings_break_no_rule() -> None:
    everything = Facts(device="cuda", dtype="bfloat16", tied=False, recordable=True)
    assert broken(PLAIN) == broken(PLAIN, everything) == []


@pytest.mark.parametrize("index", range(len(RULES)))
def test_every_rule_is_broken_by_its_example(index: int) -> None:
    changes, facts = BREAKS[index]
    rule, config = RULES[index], PLAIN.model_copy(update=changes)
    assert rule in broken(config, facts)
    assert not allows(config, facts, **{rule.setting: getattr(config, rule.setting)})
    with pytest.raises(ConfigError):
        check(config, facts)
    if facts == Facts():
        with pytest.raises(ConfigError):
            TrainConfig(**{"model": "m", "data": "d"} | changes)


def test_there_is_an_example_of_every_rule() -> None:
    assert len(BREAKS) == len(RULES)
