"""What is not there is said before a model is loaded, for every option that names a path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import EngineError
from engine.verbs.models.export import export_gguf
from tests.support.tiny_model import write_tiny_model

MISSING = "nowhere/at/all.jsonl"
CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "eval --data": lambda m, t: engine.evaluate(str(m), MISSING),
    "eval --adapter": lambda m, t: engine.evaluate(str(m), str(t / "rows.jsonl"), MISSING),
    "generate --adapter": lambda m, t: engine.generate(str(m), "hi", MISSING),
    "merge --adapter": lambda m, t: engine.merge(str(m), MISSING, t / "out"),
    "merge --check": lambda m, t: engine.merge(str(m), t / "adapter", t / "out", check=[MISSING]),
    "quantize --adapter": lambda m, t: engine.quantize(str(m), t / "out", bits=4, adapter=MISSING),
    "quantize --data": lambda m, t: engine.quantize(str(m), t / "out", bits=4, data=[MISSING]),
    "export gguf --adapter": lambda m, t: export_gguf(
        model=str(m), adapter=MISSING, output=t / "out"
    ),
    "export gguf --calibration": lambda m, t: export_gguf(
        model=str(m), calibration=[MISSING], output=t / "out", type="q4_k_m"
    ),
    "judge --adapter": lambda m, t: engine.judge(
        str(m), str(t / "rows.jsonl"), MISSING, gates={"parse_rate": None, "coverage": None}
    ),
    "prune --data": lambda m, t: engine.prune(
        str(m), t / "out", fraction=0.5, metric="activation", data=[MISSING]
    ),
    "forge --data": lambda m, t: engine.forge(
        model=str(m), data=[MISSING], output_dir=t / "out", cycles=1, fraction=0.5
    ),
}


@pytest.fixture
def torn_model(tmp_path: Path) -> Path:
    """A model whose weights would end in an error as soon as they are opened."""
    model = write_tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "adapter").mkdir()
    return model


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_path_is_named_before_the_weights_are_opened(
    call: str, torn_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="nowhere/at/all"):
        CALLS[call](torn_model, tmp_path)
    assert not (tmp_path / "out").exists()
