import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.export import export_hf_directory
from engine.model_sources.gguf.source import GGUFSource
from engine.model_sources.hf_directory import INDEX, WEIGHTS, HFDirectory
from engine.model_sources.open import open_model_source
from engine.storage import durable

Golden = Callable[[str], Path]


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2_swa", "qwen3_yarn"])
def test_an_exported_model_is_the_same_model(golden: Golden, tmp_path: Path, family: str) -> None:
    source = HFDirectory(golden(family))
    written = export_hf_directory(source, tmp_path / "out")
    result = HFDirectory(tmp_path / "out")
    assert result.config == source.config
    changed = {k: v for k, v in source.raw_config.items() if result.raw_config.get(k) != v}
    assert changed == {}
    assert result.generation_config == source.generation_config
    assert all(torch.equal(result.tensor(name), source.tensor(name)) for name in source.names())
    assert (written.shards, written.tensors) == (1, len(source.names()))
    assert written.total_bytes == 4 * written.parameters


def test_a_gguf_model_becomes_a_directory_of_the_same_model(
    write_gguf: Callable[..., Path], golden: Golden, tmp_path: Path
) -> None:
    checkpoint = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama3"))
    export_hf_directory(checkpoint, tmp_path / "out", dtype="bfloat16")
    result = HFDirectory(tmp_path / "out")
    assert result.config == checkpoint.config
    assert result.raw_config["dtype"] == "bfloat16"
    stored = load_file(golden("llama3") / WEIGHTS)
    for name in result.names():
        assert torch.equal(result.tensor(name), stored[name].bfloat16())


def test_shards_hold_at_most_what_was_asked_and_an_index(golden: Golden, tmp_path: Path) -> None:
    source = HFDirectory(golden("llama"))
    written = export_hf_directory(source, tmp_path / "out", max_shard_size=100_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == written.shards > 2
    assert files[0] == f"model-00001-of-{written.shards:05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"] == {
        "total_parameters": written.parameters,
        "total_size": written.total_bytes,
    }
    for name in files:
        size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / name).values())
        assert size <= 100_000
    result = HFDirectory(tmp_path / "out")
    assert all(torch.equal(result.tensor(name), source.tensor(name)) for name in source.names())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(golden: Golden, tmp_path: Path) -> None:
    source = HFDirectory(golden("llama"))
    written = export_hf_directory(source, tmp_path / "out", max_shard_size=1)
    assert written.shards == len(source.names())


def test_the_type_is_named_in_both_spellings(golden: Golden, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_bytes((golden("qwen3") / "config_v4.json").read_bytes())
    (folder / WEIGHTS).write_bytes((golden("qwen3") / WEIGHTS).read_bytes())
    export_hf_directory(HFDirectory(folder), tmp_path / "out", dtype=torch.float16)
    raw = HFDirectory(tmp_path / "out").raw_config
    assert (raw["torch_dtype"], raw["dtype"]) == ("float16", "float16")
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_tokenizer_files_are_copied_byte_for_byte(
    model_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_copy("llama")
    contents = {
        "tokenizer.json": b'{"version":"1.0"}   ',
        "tokenizer.model": b"\0\1",
        "tokenizer_config.json": b'{ "eos_token" : "x" }',
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ x }}\r\n",
        "merges.txt": b"#v\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(b"r")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    export_hf_directory(HFDirectory(folder), tmp_path / "out")
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in contents} == contents
    assert (out / "additional_chat_templates" / "rag.jinja").read_bytes() == b"r"
    assert not (out / "pytorch_model.bin").exists()


def damage(folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / WEIGHTS)


def test_values_that_are_not_finite_are_not_written(
    model_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_copy("llama")
    damage(folder, float("nan"))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight holds values that"):
        export_hf_directory(HFDirectory(folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_an_overflow_in_the_smaller_type_is_not_written(
    model_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_copy("llama")
    damage(folder, 1e5)
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16"):
        export_hf_directory(HFDirectory(folder), tmp_path / "out", dtype="float16")
    export_hf_directory(HFDirectory(folder), tmp_path / "wide", dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "wide"]


def test_an_occupied_output_is_refused_before_any_work(golden: Golden) -> None:
    source = HFDirectory(golden("llama"))
    before = sorted(golden("llama").iterdir())
    with pytest.raises(ConfigError, match="exists already"):
        export_hf_directory(source, golden("llama"))
    assert sorted(golden("llama").iterdir()) == before


def test_a_full_disk_is_found_before_any_work(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_free_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match="are free there"):
        export_hf_directory(HFDirectory(golden("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int8, 5])
def test_an_unknown_type_is_refused(golden: Golden, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="expected one of float32, float16, bfloat16"):
        export_hf_directory(open_model_source(golden("llama")), tmp_path / "out", dtype=dtype)


def test_a_shard_size_below_one_is_refused(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size is 0"):
        export_hf_directory(HFDirectory(golden("llama")), tmp_path / "out", max_shard_size=0)
