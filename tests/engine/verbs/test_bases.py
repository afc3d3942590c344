"""An adapter says on which base it was trained, and its use on another is a warning."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

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
