"""Every kind of adapter that PEFT makes for linear layers, embeddings and heads.

Each is filled with random values, saved by PEFT and loaded by PEFT anew: the logits of that model
are what `load_model(adapter=)` and a merged directory have to give.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from transformers import AutoModelForCausalLM

from engine.errors import CheckpointError
from engine.model_sources.load_model import load_model
from engine.verbs.models.merge import merge

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all projections": {"target_modules": ALL},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ALL},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, dora": {"target_modules": "all-linear", "use_dora": True},
    "one layer": {"layers_to_transform": [1]},
    "one layer by number": {"layers_to_transform": 0},
    "layers by a pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "a pattern of targets": {"target_modules": r".*\.layers\.1\..*(q|up)_proj"},
    "full names": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    },
    "names and endings": {"target_modules": ["model.layers.0.mlp.up_proj", "self_attn.v_proj"]},
    "excluded endings": {"target_modules": ALL, "exclude_modules": ["k_proj", "down_proj"]},
    "an excluded pattern": {"target_modules": ALL, "exclude_modules": r".*layers\.0\..*"},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
    "alphas": {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 16}},
    "ranks, alphas, rslora": {
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {".*v_proj": 1},
        "use_rslora": True,
    },
    "alphas below zero": {"lora_alpha": -4, "alpha_pattern": {"v_proj": -1}},
    "pissa, dora, rslora, ranks": {
        "init_lora_weights": "pissa", "use_dora": True, "use_rslora": True,
        "rank_pattern": {"q_proj": 2}, "target_modules": [*ALL, "lm_head"],
    },
    "olora and dora": {"init_lora_weights": "olora", "use_dora": True, "target_modules": ALL},
    "ranks and dora": {"rank_pattern": {"v_proj": 2}, "use_dora": True},
    "a target that is nowhere": {"target_modules": [*QV, "no_such_proj"]},
    "fan in, fan out": {"fan_in_fan_out": True},
    "trained biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "biases of B": {"lora_bias": True, "target_modules": ALL},
    "biases of B in the attention": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the embedding, rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "the embedding, dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the head, dora": {"target_modules": ["lm_head"], "use_dora": True},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", *QV]},
    "embedding and head of rank 2": {
        "target_modules": ["embed_tokens", "lm_head", "up_proj"],
        "rank_pattern": {"embed_tokens": 2, "lm_head": 3},
        "alpha_pattern": {"lm_head": 2},
    },
    "embedding and head, tied": {
        "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True
    },
    "a copy of the embedding": {"modules_to_save": ["embed_tokens"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    "copies, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "copies of norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a copy of the feed-forward part": {"modules_to_save": ["mlp"]},
    "a copy of a projection": {"modules_to_save": ["layers.0.mlp.up_proj"]},
    "single tokens": {"trainable_token_indices": [1, 5, 60]},
    "single tokens, tied": {"trainable_token_indices": [1, 5], "ensure_weight_tying": True},
    "single tokens of both": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
    "a parameter": {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ALL},
    "pissa and dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa of the head": {"init_lora_weights": "pissa", "target_modules": ["lm_head", "q_proj"]},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "lora-ga": {"init_lora_weights": "lora_ga"},
    "loftq": {
        "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}
    },
    "loftq, three rounds": {
        "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 3}
    },
    "pissa of a shared head": {
        "init_lora_weights": "pissa", "target_modules": ["lm_head", "embed_tokens", "up_proj"]
    },
    "velora": {"velora_config": {"num_groups": 16}},
    "blocks on the diagonal": {
        "use_bdlora": {
            "nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]
        }
    },
    "kasa": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
}  # fmt: skip


def base_model(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def make_adapter(family: str, target: Path, **changes: Any) -> Any:
    """Save an adapter of random values; returns PEFT's own reading of the file."""
    kinds = {"kasa_config": KasaConfig, "velora_config": VeloraConfig, "use_bdlora": BdLoraConfig}
    changes |= {key: kinds[key](**changes[key]) for key in kinds.keys() & changes}
    if changes.get("init_lora_weights") == "eva":
        changes["eva_config"] = EvaConfig()
    given = {"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(base_model(family), LoraConfig(**given))
    torch.manual_seed(5)
    trained = ("lora_", "modules_to_save", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bias = name.endswith(".bias") and given.get("bias", "none") != "none"
            if any(part in name for part in trained) or (bias and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(target)
    return PeftModel.from_pretrained(base_model(family), target).eval()


def is_expressible(case: str, family: str) -> bool:
    """Whether a model of the family can have what the adapter adds in its files."""
    return not (case == "biases of B" and not family.startswith("llama"))


@pytest.mark.usefixtures("loftq_on_a_cpu")
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, family: str, tmp_path: Path) -> None:
    theirs = logits(make_adapter(family, tmp_path / "adapter", **CASES[case]))
    ours = load_model(GOLDEN / family, adapter=tmp_path / "adapter")(IDS)
    assert float((ours - theirs).abs().max()) <= 1e-5
    assert float((theirs - logits(base_model(family))).abs().max()) > 1e-3
    if not is_expressible(case, family):
        with pytest.raises(CheckpointError, match="lora_bias"):
            merge(GOLDEN / family, tmp_path / "adapter", tmp_path / "merged")
        return
    merge(GOLDEN / family, tmp_path / "adapter", tmp_path / "merged")
    assert float((load_model(tmp_path / "merged")(IDS) - theirs).abs().max()) <= 1e-5
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(other) - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3_5"])
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"modules_to_save": ["mlp"]},
    ],
)
def test_mixtures_and_hybrids_have_the_logits_of_peft(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = logits(make_adapter(family, tmp_path / "adapter", **changes))
    ours = load_model(GOLDEN / family, adapter=tmp_path / "adapter")(IDS)
    assert float((ours - theirs).abs().max()) <= 3e-5
    merge(GOLDEN / family, tmp_path / "adapter", tmp_path / "merged")
    assert float((load_model(tmp_path / "merged")(IDS) - theirs).abs().max()) <= 3e-5


def test_there_are_as_many_kinds_as_asked_for() -> None:
    assert len(CASES) >= 34
    assert json.dumps(list(CASES))
