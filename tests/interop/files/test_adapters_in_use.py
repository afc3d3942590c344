"""Adapters of PEFT under `engine eval` and `--init-adapter`: PEFT's perplexities, PEFT's logits."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import engine
from engine.config.train_config import TrainConfig
from engine.data.dataset import load_rows
from engine.data.examples import build_examples
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.interop

IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"layers_to_transform": [1]},
    "ranks and alphas": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "rslora and dora": {"use_rslora": True, "use_dora": True},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "copies": {"modules_to_save": ["lm_head", "norm"]},
    "single tokens": {"trainable_token_indices": [4, 9]},
    "biases": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen2")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Say {n}", "response": "abc" * (n % 3 + 1)} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def base(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def make_adapter(model: Path, target: Path, **changes: Any) -> Any:
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | changes
    made = get_peft_model(base(model), LoraConfig(**given, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    trained = ("lora_", "modules_to_save", "trainable_tokens_delta", ".bias")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and any(part in name for part in trained):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(target)
    return PeftModel.from_pretrained(base(model), target).eval()


@torch.no_grad()
def perplexity(peft: Any, model: Path, rows: Path) -> float:
    examples, _ = build_examples(
        load_rows(str(rows)), load_tokenizer(open_model_source(model)), 2048
    )
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.ids)
        scores = peft(ids[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if example.trained[position]:
                total -= float(scores[position - 1, ids[position]])
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("case", CASES)
def test_eval_has_the_perplexity_of_peft(
    case: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    peft = make_adapter(model, tmp_path / "adapter", **CASES[case])
    ours = engine.evaluate(model, rows, adapter=tmp_path / "adapter").perplexity
    assert ours == pytest.approx(perplexity(peft, model, rows), rel=1e-5)
    assert ours != pytest.approx(engine.evaluate(model, rows).perplexity, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_the_adapter_as_peft_reads_it(
    case: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    want = make_adapter(model, tmp_path / "adapter", **CASES[case])(IDS).logits
    settings = TrainConfig(
        model=str(model),
        data=str(rows),
        output_dir=tmp_path / "run",
        method="lora",
        init_adapter=tmp_path / "adapter",
        learning_rate=1e-12,
        max_steps=1,
    )
    with torch.enable_grad():
        engine.train(settings, console=False)
    again = PeftModel.from_pretrained(base(model), tmp_path / "run" / "adapter").eval()
    # The last norm of the tiny model is four times as large, and so are its logits.
    assert float((again(IDS).logits - want).abs().max()) <= 4e-5
    assert float((load_model(model, adapter=tmp_path / "run")(IDS) - want).abs().max()) <= 4e-5
