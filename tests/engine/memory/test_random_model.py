"""Random weights in the shape of a model are written by every verb that writes models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.config.tasks.inference import ExportGGUFSettings
from engine.errors import ConfigError
from engine.memory.model_shapes import PARAMETERS
from engine.memory.random_model import RandomModel, open_base
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.verbs.models.export import export_gguf
from tests.support.small_runs import small_run

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A folder with a config.json and nothing else."""
    (tmp_path / "shape").mkdir()
    raw = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    (tmp_path / "shape" / "config.json").write_text(json.dumps(raw))
    return str(tmp_path / "shape")


def test_a_size_by_name_has_its_published_parameters() -> None:
    source = open_base("Qwen/Qwen3-8B", True)
    sizes = [torch.Size(source.shape(name)).numel() for name in source.names()]
    assert sum(sizes) == PARAMETERS["qwen3-8b"]


def test_a_tensor_is_the_same_every_time(shape: str) -> None:
    source = open_base(shape, True)
    assert isinstance(source, RandomModel)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.tensor(name), open_base(shape, True).tensor(name))
    assert not torch.equal(source.tensor(name), source.tensor(name.replace("up", "gate")))
    for each in source.names():
        assert source.tensor(each).shape == source.shape(each)


def test_it_is_quantised_and_exported(shape: str, tmp_path: Path) -> None:
    source = open_base(shape, True)
    ids = torch.arange(8)[None]
    result = engine.quantize(shape, tmp_path / "eight", bits=8, random_weights=True)
    assert result.quantised == 14
    assert torch.isfinite(load_model(tmp_path / "eight")(ids)).all()
    assert "random" in (tmp_path / "eight" / "README.md").read_text()
    export_gguf(model=shape, output=tmp_path / "m.gguf", type="f32", random_weights=True)
    written = open_model_source(tmp_path / "m.gguf")
    for name in source.names():
        assert torch.equal(written.tensor(name).float(), source.tensor(name).float()), name


def test_an_adapter_is_merged_into_it(shape: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say", "response": "ab"}) + "\n")
    run = small_run(tiny_model, rows, tmp_path / "run", max_steps=1)
    adapter = engine.train(run, console=False).adapter_path
    assert adapter is not None
    merged = engine.merge(shape, adapter, tmp_path / "merged", random_weights=True)
    assert merged.merged == 14
    assert merged.logit_difference is not None


def test_what_needs_a_tokenizer_is_refused(shape: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    given: dict[str, Any] = {"random_weights": True, "output": tmp_path / "out.gguf"}
    data = str(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="--data"):
        engine.quantize(shape, tmp_path / "out", data=data, random_weights=True)
    with pytest.raises(ConfigError, match="--calibration"):
        export_gguf(ExportGGUFSettings(model=shape, calibration=(data,), type="q4_0", **given))
    with pytest.raises(ConfigError, match="no model directory"):
        open_base("no-such-size", True)
