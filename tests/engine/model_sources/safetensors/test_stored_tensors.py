"""Tensors under the names and in the pairs in which programs of the world save them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.model_sources.export import export_hf_directory
from engine.model_sources.hf_directory import WEIGHTS, HFDirectory

Copy = Callable[[str], Path]


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_a_head_equal_to_the_embedding_is_tied(model_copy: Copy) -> None:
    folder = model_copy("llama3")
    edit_weights(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16()})
    )
    edit_weights(
        folder, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"].float()})
    )
    source = HFDirectory(folder)
    assert source.config.tie_word_embeddings
    assert "lm_head.weight" not in source.names()


def test_a_head_that_differs_from_the_embedding_is_used_and_stays(
    model_copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_copy("llama3")
    head = torch.randn(128, 64)
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    source = HFDirectory(folder)
    assert not source.config.tie_word_embeddings
    assert torch.equal(source.tensor("lm_head.weight"), head)
    assert len(caplog.records) == 1
    assert "the stored head is used" in caplog.text
    export_hf_directory(source, tmp_path / "out")
    again = HFDirectory(tmp_path / "out")
    assert again.raw_config["tie_word_embeddings"] is False
    assert torch.equal(again.tensor("lm_head.weight"), head)
    assert len(caplog.records) == 1


def test_a_head_of_another_shape_is_refused(model_copy: Copy) -> None:
    folder = model_copy("llama3")
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[3\]"):
        HFDirectory(folder)


@pytest.mark.parametrize("family", ["llama3", "qwen3_5_vl"])
def test_a_tied_model_with_an_alias_is_read(tmp_path: Path, golden: Copy, family: str) -> None:
    folder = tmp_path / family
    shutil.copytree(golden(family), folder)
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / WEIGHTS)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors.pop(embedding)
    for metadata in ({"format": "pt", embedding: "lm_head.weight"}, {"format": "pt"}):
        save_file(tensors, folder / WEIGHTS, metadata)
        source = HFDirectory(folder)
        assert source.config.tie_word_embeddings
        assert torch.equal(source.tensor(embedding), HFDirectory(golden(family)).tensor(embedding))
        assert "lm_head.weight" not in source.names()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_of_a_wrapped_model_are_read(model_copy: Copy, golden: Copy, prefix: str) -> None:
    folder = model_copy("qwen2")
    save_file({prefix + n: t for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert HFDirectory(folder).names() == HFDirectory(golden("qwen2")).names()


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "qwen3_5_vl"])
def test_names_of_a_model_without_its_head_are_read(
    tmp_path: Path, golden: Copy, family: str
) -> None:
    folder = tmp_path / family
    shutil.copytree(golden(family), folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / WEIGHTS)
    source, whole = HFDirectory(folder), HFDirectory(golden(family))
    assert sorted(source.names()) == sorted(whole.names())
    assert all(torch.equal(source.tensor(name), whole.tensor(name)) for name in whole.names())


def test_tensors_beside_the_decoder_are_one_warning_and_those_inside_are_refused(
    model_copy: Copy, golden: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_copy("llama")
    names = ["v_head.summary.weight", "score.weight", "model.layers.1.self_attn.k_scale"]
    edit_weights(folder, lambda t: t.update({name: torch.ones(2) for name in names}))
    assert HFDirectory(folder).names() == HFDirectory(golden("llama")).names()
    assert [record.message for record in caplog.records] == [
        f"{folder}: 2 tensors beside the decoder are not read: score.weight, v_head.summary.weight"
    ]
    edit_weights(folder, lambda t: t.update({"model.layers.1.self_attn.gate": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"such a model: model\.layers\.1\.self_attn\.gate"):
        HFDirectory(folder)
