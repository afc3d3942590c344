"""Training from scratch, over the whole way: plan, train, resume, evaluate, generate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.model_sources.open import open_model_source
from engine.verbs.models.evaluate import evaluate
from engine.verbs.models.export import export_gguf
from engine.verbs.training.plan import plan
from engine.verbs.training.train import dry_run, train

SHAPE = {
    "model_type": "llama", "vocab_size": 133, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    shape, rows = tmp_path / "shape.json", tmp_path / "rows.jsonl"
    shape.write_text(json.dumps(SHAPE))
    lines = [{"prompt": f"Say {n}", "response": "ab " * (n % 3 + 1)} for n in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "method": "scratch", "model": str(shape), "tokenizer": "char", "data": str(rows),
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "max_length": 64, "batch_size": 4,
        "packing": True, "accumulate": 2, "max_steps": 6, "learning_rate": 1e-2,
        "checkpoint_every": 2, "device": "cpu", "plot": False, "output_dir": tmp_path / "run",
        "heldout": 0.1, "lr_schedule": "constant",
    }  # fmt: skip


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_resumed_run_has_the_same_bits_and_learns(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = train(console=False, **settings)
    whole = weights(tmp_path / "run")
    assert result.metrics["heldout_loss"] < 0.8 * result.metrics["heldout_loss_before"]
    assert result.metrics["trainable_parameters"] == 91_072
    again = settings | {"resume": str(tmp_path / "run" / "checkpoint-4")}
    train(console=False, **again)
    assert weights(tmp_path / "run") == whole
    other = train(
        console=False, **settings | {"hidden_dropout": 0.0, "output_dir": tmp_path / "other"}
    )
    assert other.output_path is not None
    assert weights(tmp_path / "other") != whole
    with pytest.raises(engine.EngineError, match=r"hidden_dropout was 0\.1 and is 0\.2"):
        train(console=False, **again | {"hidden_dropout": 0.2})


def test_what_is_left_evaluates_generates_and_is_exported(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = train(console=False, **settings)
    model = tmp_path / "run" / "model"
    source = open_model_source(model)
    assert source.config.eos_token_id == (2,)
    assert source.generation_config["eos_token_id"] == [2, 99]
    assert {"tokenizer.json", "chat_template.jinja"} <= {p.name for p in model.iterdir()}
    common: dict[str, Any] = {"data": settings["data"], "max_length": 64, "device": "cpu"}
    own = evaluate(model=str(model), heldout=0.1, **common)
    assert own.loss == pytest.approx(result.metrics["heldout_loss"], rel=1e-5)
    export_gguf(model=str(model), output=tmp_path / "m.gguf", type="f32")
    exported = evaluate(model=str(tmp_path / "m.gguf"), heldout=0.1, **common)
    assert exported.loss == pytest.approx(own.loss, rel=1e-5)
    # The run itself names its model, too.
    answer = engine.generate(
        model=str(tmp_path / "run"), prompt="Say 1", max_new_tokens=4, device="cpu"
    )
    assert answer


def test_the_plan_counts_what_dropout_takes(settings: dict[str, Any]) -> None:
    fits = train(console=False, **settings | {"memory_budget": "2GiB", "max_steps": 1}).metrics
    assert fits["planned_limit_bytes"] < fits["memory_budget_bytes"]
    gpu = TrainConfig(**settings | {"device": "cuda", "dtype": "bfloat16", "max_length": 2048})
    with_dropout, without = plan(gpu), plan(gpu.model_copy(update={"attention_dropout": 0.0}))
    assert with_dropout.plan.step.bytes > without.plan.step.bytes
    assert "91,072 trainable" in plan(TrainConfig(**settings)).text()


def test_a_dry_run_shows_the_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    text = dry_run(TrainConfig(**settings))
    assert "method: scratch" in text
    assert "> 'ab" in text
    assert not (tmp_path / "run").exists()


def test_text_without_tokens_is_told(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Path(settings["data"]).open("a") as handle:
        handle.write('{"prompt": "né", "response": "日本"}\n')
    dry_run(TrainConfig(**settings | {"heldout": 0.0}))
    assert "3 tokens in 1 of 25 rows are [UNK] (first in" in caplog.text


def test_any_tokenizer_serves_the_built_in_model(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    changes = {"model": "builtin:scratch", "tokenizer": str(tiny_model)}
    text = dry_run(TrainConfig(**settings | changes))
    assert "tokenizer: " in text
    prepared = plan(TrainConfig(**settings | changes))
    assert prepared.target.model.vocab_size == 84


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "tokenizer char was given with method lora"),
        ({"method": "full", "tokenizer": None, "model": "builtin:scratch"}, "without weights"),
        ({"method": "qlora", "tokenizer": None}, "are for weights that are trained"),
        ({"lora_dropout": 0.1}, "Give --hidden-dropout"),
        ({"teacher": "t"}, "method scratch trains it"),
        ({"init_adapter": "a"}, "and method is scratch"),
        ({"cuda_graphs": True}, "only an adapter's are small enough"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings | changes)


def test_first_weights_follow_from_the_seed(settings: dict[str, Any], tmp_path: Path) -> None:
    few = settings | {"max_steps": 1, "learning_rate": 1e-9, "heldout": 0.0, "weight_decay": 0.0}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(console=False, **few | {"output_dir": tmp_path / name, "seed": seed})
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    model = engine.load_model(tmp_path / "a" / "model")
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert float(up.std()) == pytest.approx(0.02, rel=0.05)
    assert bool(torch.isfinite(model.forward(torch.arange(20)[None])).all())
