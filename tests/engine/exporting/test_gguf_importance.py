"""Importance of inputs: what is measured, and what quantising with it comes to."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.data.examples import Example
from engine.errors import ConfigError
from engine.exporting.gguf_file import write_gguf
from engine.exporting.gguf_importance import importance_of
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.verbs.models.export import export_gguf
from models.decoder import Decoder
from models.tensor_layout import Layout
from models.tensor_names import graph_tensors
from tests.support.tokenizer_folder import write_byte_tokenizer

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = ("llama", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_vl")


def loaded(family: str) -> Decoder:
    return build_model(open_model_source(str(GOLDEN / family)), dtype=torch.float32)


def some_examples(vocabulary: int, count: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(vocabulary, (20 + 9 * n,), generator=generator) for n in range(count)]
    return [Example(one.tolist(), [True] * len(one), "x:1") for one in ids]


def matrices(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Every matrix that reads activations: all of two dimensions or more but table and filters."""
    tied = model.config.tie_word_embeddings
    return {
        name: shape
        for name, shape in graph_tensors(model.config).items()
        if len(shape) > 1 and "conv1d" not in name and (tied or "embed_tokens" not in name)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_measured_once_per_token(family: str) -> None:
    model = loaded(family)
    measured = importance_of(model, some_examples(model.config.vocab_size))
    wanted = matrices(model)
    assert measured.keys() == wanted.keys()
    for name, shape in wanted.items():
        columns = (shape[0], shape[2]) if len(shape) == 3 else (shape[1],)
        assert measured[name].shape == columns, name
        assert bool(torch.isfinite(measured[name]).all()) and float(measured[name].sum()) > 0
    # How the rows are divided into batches changes nothing.
    one_by_one = [importance_of(model, [e]) for e in some_examples(model.config.vocab_size)]
    lengths = torch.tensor([len(e) for e in some_examples(model.config.vocab_size)])
    name = next(name for name in wanted if name.endswith("o_proj.weight"))
    mean = sum(n * one[name] for n, one in zip(lengths, one_by_one, strict=True)) / lengths.sum()
    assert torch.allclose(measured[name], torch.as_tensor(mean), rtol=1e-4)


def test_what_is_measured_is_the_mean_square_of_the_input() -> None:
    model = loaded("llama")
    (example,) = some_examples(model.config.vocab_size, 1)
    measured = importance_of(model, [example])
    layer, table = model.layers[0], model.model.embed_tokens.weight
    assert isinstance(table, torch.Tensor)
    table = table.detach().double()
    x = table[torch.tensor(example.input_ids)]
    rms = x.square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).rsqrt()
    h = x * rms * layer.input_layernorm.weight.detach().double()
    for name in ("q_proj", "k_proj", "v_proj"):
        got = measured[f"model.layers.0.self_attn.{name}.weight"].double()
        assert torch.allclose(got, h.square().mean(0), rtol=1e-4)


def weighted_error(before: Path, after: Path, importance: dict[str, torch.Tensor]) -> float:
    """Mean square of the error that inputs of these mean squares make, summed over matrices."""
    total = 0.0
    first, second = open_model_source(str(before)), open_model_source(str(after))
    for name, weights in importance.items():
        tensors = []
        for source in (first, second):
            layout = Layout.of_names(source.config, source.names())
            shape = graph_tensors(source.config)[name]
            tensors.append(layout.assemble(name, shape, source.tensor).double())
        error = (tensors[0] - tensors[1]).square()
        columns = weights.double().unsqueeze(-2) if weights.dim() == 2 else weights.double()
        total += float((error * columns).sum())
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
def test_importance_lowers_the_error_that_counts(family: str, kind: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / family, tmp_path / "m")
    source, model = open_model_source(str(tmp_path / "m")), loaded(family)
    generator = torch.Generator().manual_seed(2)
    # As real activations have them, a few columns stand out; where they do differs by matrix, so
    # that columns in another order than the weight's would lose.
    importance = {
        name: torch.rand(one.shape, generator=generator).pow(6).add(1e-4)
        for name, one in importance_of(model, some_examples(model.config.vocab_size)).items()
    }
    write_gguf(source, tmp_path / "plain.gguf", kind)
    write_gguf(source, tmp_path / "weighted.gguf", kind, importance=importance)
    plain = weighted_error(tmp_path / "m", tmp_path / "plain.gguf", importance)
    weighted = weighted_error(tmp_path / "m", tmp_path / "weighted.gguf", importance)
    assert weighted < 0.85 * plain


def test_experts_without_tokens_have_the_importance_of_all() -> None:
    model = loaded("qwen3_moe")
    (example,) = some_examples(model.config.vocab_size, 1)
    short = Example(example.input_ids[:1], [True], "x:1")  # one token reaches few experts
    measured = importance_of(model, [short])
    name = next(name for name in measured if name.endswith("experts.down_proj"))
    assert bool((measured[name].sum(-1) > 0).all())


def test_calibration_changes_the_file_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "qwen3", folder)
    write_byte_tokenizer(folder, open_model_source(str(folder)).config.vocab_size)
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "ab ba abba", "response": "baab"})
    rows.write_text(f"{row}\n{row}\n")
    plain = export_gguf(model=str(folder), output=tmp_path / "a.gguf", type="q4_0")
    weighted = export_gguf(
        model=str(folder), output=tmp_path / "b.gguf", type="q4_0", calibration=str(rows),
        calibration_rows=1,
    )  # fmt: skip
    (tmp_path / "same").mkdir()
    with closing(sqlite3.connect(tmp_path / "app.db")) as base, base:
        base.execute("create table asked (question text, answer text)")
        base.execute("insert into asked values ('ab ba abba', 'baab')")
    export_gguf(
        model=str(folder), output=tmp_path / "same" / "b.gguf", type="q4_0",
        calibration=f"sqlite:///{tmp_path}/app.db", query="select question, answer from asked",
    )  # fmt: skip
    assert (tmp_path / "same" / "b.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert plain.formats == weighted.formats
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()
    for kind in ("f16", "q8_0"):
        with pytest.raises(ConfigError, match=f"no use for --type {kind}"):
            export_gguf(
                model=str(folder), output=tmp_path / "c.gguf", type=kind, calibration=str(rows)
            )
    with pytest.raises(ConfigError, match="leave it out beside --adapter"):
        export_gguf(
            model=str(folder), output=tmp_path / "c.gguf", adapter="a", calibration=str(rows),
            type="q4_0",
        )  # fmt: skip
    assert not (tmp_path / "c.gguf").exists()
