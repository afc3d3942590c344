"""GGUF files that this engine writes, read back by its own reader and by the `gguf` package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import engine
from cli import main as cli
from engine.errors import CheckpointError, ConfigError
from engine.exporting.gguf_types import FILE_TYPES
from engine.exporting.modelfile import modelfile
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.verbs.models.export import export_gguf
from models.tensor_layout import Layout
from models.tensor_names import graph_tensors
from tests.support.tokenizer_folder import write_byte_tokenizer

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
REFUSED = {
    "qwen2_moe": "Some layers of this mixture are dense",
    "qwen3_5": "llama.cpp takes them to be equal",
    "smollm3": "every fourth",
}


def model(folder: Path, family: str = "qwen3") -> Path:
    """A golden model with a tokenizer that llama.cpp has a counterpart of."""
    shutil.copytree(GOLDEN / family, folder)
    write_byte_tokenizer(folder, open_model_source(str(folder)).config.vocab_size)
    return folder


def parameters(source: ModelSource) -> dict[str, torch.Tensor]:
    """Every parameter of the graph, however the source divides it."""
    layout = Layout.of_names(source.config, source.names())
    shapes = graph_tensors(source.config)
    return {name: layout.assemble(name, shape, source.tensor) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_what_is_written_is_read_back_to_the_same_model(family: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", family)
    result = export_gguf(model=str(folder), output=tmp_path / "m.gguf", type="f32")
    before, after = open_model_source(str(folder)), open_model_source(str(tmp_path / "m.gguf"))
    wanted, got = parameters(before), parameters(after)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        # One is added to norms, and logarithms are taken back.
        assert torch.allclose(got[name].float(), tensor.float(), atol=1e-6, rtol=1e-6), name
    assert result.total_bytes == (tmp_path / "m.gguf").stat().st_size
    # A window is not kept: within it both are the same.
    ids = torch.arange(3, 3 + min(37, before.config.sliding_window or 37)).unsqueeze(0)
    with torch.no_grad():
        logits = [engine.load_model(path)(ids) for path in (folder, tmp_path / "m.gguf")]
    assert float((logits[0] - logits[1]).abs().max()) < 2e-5


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_llama_cpp_would_compute_wrongly_are_refused(
    family: str, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model", family)
    with pytest.raises(ConfigError, match=REFUSED[family]):
        export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_type_is_read_by_the_package_and_here(kind: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    result = export_gguf(model=str(folder), output=tmp_path / "m.gguf", type=kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.tensors) == result.tensors == sum(result.formats.values())
    fields = reader.fields
    assert fields["general.file_type"].contents() == FILE_TYPES[kind].number
    norm = next(t for t in reader.tensors if t.name == "blk.0.attn_norm.weight")
    assert norm.tensor_type.name == "F32"
    counted: dict[str, int] = {}
    for tensor in reader.tensors:
        name = tensor.tensor_type.name.lower()
        counted[name] = counted.get(name, 0) + 1
    assert counted == result.formats
    back = parameters(open_model_source(str(tmp_path / "m.gguf")))
    for name, tensor in parameters(open_model_source(str(folder))).items():
        error = (back[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert float(error) < 0.11, name


def test_the_metadata_is_what_the_model_is(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "llama3")
    export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    config = open_model_source(str(folder)).config
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == config.num_hidden_layers
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>" in fields["tokenizer.chat_template"]
    source = open_model_source(str(tmp_path / "m.gguf"))
    assert source.config.rope_parameters["rope_type"] == "llama3"
    text = modelfile(source, "m.gguf")
    assert text.startswith("FROM ./m.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in text


@pytest.mark.parametrize(
    ("name", "system"),
    [("chatml", "Be brief."), ("qwen3", None), ("llama3", None), ("mistral", None),
     ("qwen2_5", "You help.")],
)  # fmt: skip
def test_a_modelfile_has_the_system_message_that_the_template_writes_by_itself(
    name: str, system: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model(tmp_path / "model")
    text = (TEMPLATES / f"{name}.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text)
    lines = modelfile(open_model_source(str(folder)), "m.gguf").splitlines()
    assert [line for line in lines if line.startswith("SYSTEM")] == (
        [] if system is None else [f'SYSTEM """{system}"""']
    )
    # With it, Ollama's template writes what the model's own does, but for what Llama adds to it.
    assert ("own chat template writes" in caplog.text) == (name == "llama3")


def test_what_ollama_would_write_otherwise_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model(tmp_path / "model")
    text = (TEMPLATES / "chatml.jinja").read_text()
    (folder / "chat_template.jinja").write_text("Today is a day.\n" + text)
    assert "Be brief." in modelfile(open_model_source(str(folder)), "m.gguf")
    assert "own chat template writes 'Today is a day." in caplog.text


def test_a_window_bounds_the_context_that_is_promised(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "mistral")
    export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    config = open_model_source(str(folder)).config
    length = gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents()
    assert config.sliding_window is not None
    assert length == config.sliding_window < config.max_position_embeddings


def test_a_model_is_divided_and_read_from_any_part(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    result = export_gguf(
        model=str(folder), output=tmp_path / "m.gguf", type="f32", max_file_size=60_000
    )
    assert len(result.files) > 2
    assert result.files[0].name == f"m-00001-of-{len(result.files):05d}.gguf"
    wanted = parameters(open_model_source(str(folder)))
    got = parameters(open_model_source(str(result.files[1])))
    assert all(torch.equal(got[name].float(), tensor.float()) for name, tensor in wanted.items())


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "model")

    def broken(*given: Any) -> None:
        raise ValueError("it holds values that are not finite")

    with monkeypatch.context() as patch:
        patch.setattr("engine.exporting.gguf_file.encoded", broken)
        with pytest.raises(CheckpointError, match="not finite"):
            export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match=r"end in \.gguf"):
        export_gguf(model=str(folder), output=tmp_path / "m.bin")


def test_a_tokenizer_without_counterpart_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not cut texts into words"):
        export_gguf(model=str(tiny_model), output=tmp_path / "m.gguf")


def test_a_vocabulary_without_merges_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"] = []
    file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="no merges"):
        export_gguf(model=str(folder), output=tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]


def test_the_command_writes_model_and_modelfile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path / "model")
    words = ["export", "gguf", "--model", str(folder), "--output", str(tmp_path / "out.gguf")]
    assert cli.main([*words, "--type", "Q8_0", "--modelfile"]) == 0
    assert "GGUF saved to" in capsys.readouterr().out
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./out.gguf")
    assert cli.main([*words, "--type", "q3_k"]) == 2
    assert "q4_k_m" in capsys.readouterr().err
