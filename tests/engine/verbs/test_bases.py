"""An adapter says on which base it was trained, and its use on another is a warning."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import engine
from engine.config.train_config import TrainConfig
from engine.verbs.models.merge import merge

Rows = Callable[[int], Path]


@pytest.fixture
def run(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> Path:
    """The directory of a run that trained on NF4 weights with plain scales."""
    config = TrainConfig(
        model=str(tiny_model),
        data=str(write_rows(8)),
        output_dir=tmp_path / "run",
        method="qlora",
        double_quant=False,
        learning_rate=1e-2,
        max_steps=3,
    )
    engine.train(config, console=False)
    return tmp_path / "run"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
def test_a_run_is_its_adapter_and_says_what_it_was_trained_on(
    run: Path, tiny_model: Path, write_rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((run / "adapter" / "base.json").read_text())
    assert (record["quantization"], record["double_quant"], record["dtype"]) == (
        "nf4", False, "float32",
    )  # fmt: skip
    data = write_rows(6)
    caplog.clear()
    as_trained = engine.evaluate(
        tiny_model, data, adapter=run, quantize="nf4", double_quant=False
    ).perplexity
    assert not warnings_of(caplog)
    on_original = engine.evaluate(tiny_model, data, adapter=run / "adapter").perplexity
    assert on_original != as_trained
    (said,) = warnings_of(caplog)
    assert "was trained on NF4 weights with plain scales and is used on the original" in said

    caplog.clear()
    result = merge(tiny_model, run, tmp_path / "a", onto="dequantised", check=[data])
    assert not warnings_of(caplog)
    assert result.check["perplexity_trained"] == pytest.approx(as_trained, rel=1e-9)
    assert result.check["perplexity_merged"] == pytest.approx(as_trained, rel=1e-4)
    result = merge(tiny_model, run, tmp_path / "b", check=[data])
    assert result.check["perplexity_merged"] == pytest.approx(on_original, rel=1e-4)
    assert "--check DATA measures" in warnings_of(caplog)[0]


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["weights", "config", "nothing"])
def test_an_adapter_on_another_model_of_the_same_shapes_is_a_warning(
    changed: str, tiny_model: Path, write_rows: Rows, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = TrainConfig(
        model=str(tiny_model), data=str(write_rows(4)), output_dir=tmp_path / "run", method="lora",
        max_steps=1,
    )  # fmt: skip
    engine.train(config, console=False)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    if changed == "weights":
        weights = load_file(other / "model.safetensors")
        weights["model.norm.weight"] *= 1.5
        save_file(weights, other / "model.safetensors", {"format": "pt"})
    elif changed == "config":
        raw = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-3}))
    calls: list[Callable[[], Any]] = [
        lambda: engine.evaluate(other, write_rows(2), adapter=tmp_path / "run"),
        lambda: engine.generate(other, "hi", tmp_path / "run", max_new_tokens=1),
        lambda: merge(other, tmp_path / "run", tmp_path / "merged"),
    ]
    for call in calls:
        caplog.clear()
        call()
        said = [text for text in warnings_of(caplog) if "a base with other files" in text]
        assert len(said) == (changed != "nothing")
