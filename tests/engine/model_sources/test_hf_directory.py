import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.hf_directory import INDEX, WEIGHTS, HFDirectory
from engine.model_sources.open import open_model_source

Copy = Callable[[str], Path]
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen2_swa", "qwen3", "qwen3_yarn")


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


def edit_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS
) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})


def tie_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files with an index; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_with_its_tensors(golden: Copy, family: str) -> None:
    checkpoint = open_model_source(golden(family))
    stored = load_file(golden(family) / WEIGHTS)
    assert sorted(checkpoint.names()) == sorted(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        checkpoint.release(name)
    assert checkpoint.config.model_type == checkpoint.raw_config["model_type"]
    assert checkpoint.generation_config["eos_token_id"] == 2


def test_shards_give_the_same_tensors_as_one_file(model_copy: Copy, golden: Copy) -> None:
    folder = model_copy("qwen3")
    shard(folder)
    whole, parts = HFDirectory(golden("qwen3")), HFDirectory(folder)
    assert whole.names() == parts.names()
    assert all(torch.equal(whole.tensor(name), parts.tensor(name)) for name in whole.names())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no folder"):
        HFDirectory(tmp_path / "none")


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        HFDirectory(tmp_path)


def test_an_adapter_given_as_a_model_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        HFDirectory(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json:1:2"),
        ("[]", "expected an object"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "twice"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ('{"model_type": "llama"}', "num_attention_heads"),
        ("\ufeff{}", "config.json:1:1"),
    ],
)
def test_an_unusable_config_is_named(model_copy: Copy, content: str, words: str) -> None:
    folder = model_copy("llama")
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        HFDirectory(folder)
    assert words in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_quantised_weights_are_refused_by_their_method(model_copy: Copy) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    name = "model.layers.0.mlp.up_proj.qweight"
    edit_weights(folder, lambda t: t.update({name: torch.ones(8, 8, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"stored quantised \(GPTQ\)"):
        HFDirectory(folder)


@pytest.mark.parametrize("noted", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp8"])
def test_a_note_of_quantisation_beside_plain_weights_is_a_warning(
    model_copy: Copy, golden: Copy, noted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", quantization_config=noted)
    assert HFDirectory(folder).names() == HFDirectory(golden("llama")).names()
    assert len(caplog.records) == 1
    assert "the weights are not quantised" in caplog.text


def test_a_folder_without_weights_says_what_is_missing(model_copy: Copy) -> None:
    folder = model_copy("llama")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds a config.json and no weights"):
        HFDirectory(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b"anything"),
        ("weights.pt", b""),
        ("renamed", b"PK\x03\x04 a zip file"),
        ("renamed.dat", b"\x80\x04\x95"),
    ],
)
def test_pickles_are_refused_by_name_and_by_content(
    model_copy: Copy, name: str, content: bytes
) -> None:
    folder = model_copy("llama")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        HFDirectory(folder)
    assert name in str(caught.value)


def test_a_pickle_named_safetensors_is_never_unpickled(model_copy: Copy) -> None:
    folder = model_copy("llama")
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        HFDirectory(folder)


@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "a\0.safetensors",
        "a.safetensors/",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(model_copy: Copy, target: Any) -> None:
    folder = model_copy("llama")
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / WEIGHTS).read_bytes())
    weight_map = shard(folder)
    weight_map[next(iter(weight_map))] = target
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="expected the plain name"):
        HFDirectory(folder)


def test_files_that_are_links_to_elsewhere_are_read(model_copy: Copy) -> None:
    """As transformers reads them. An index has no such right: see above."""
    folder = model_copy("llama")
    plain = HFDirectory(folder)
    before = {name: plain.tensor(name).clone() for name in plain.names()}
    shard(folder)
    for file in [*folder.iterdir()]:
        file.rename(folder.parent / file.name)
        file.symlink_to(folder.parent / file.name)
    linked = HFDirectory(folder)
    assert all(torch.equal(linked.tensor(name), value) for name, value in before.items())
    assert linked.tokenizer_files() == plain.tokenizer_files()


def test_a_configuration_behind_a_link_is_not_shown(model_copy: Copy) -> None:
    folder = model_copy("llama")
    (folder.parent / "secret").write_text('{"model_type": "password", "password": "password"}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../secret")
    with pytest.raises(ConfigError) as caught:
        HFDirectory(folder)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(model_copy: Copy, value: Any) -> None:
    folder = model_copy("llama")
    shard(folder)
    write_index(folder, value)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        HFDirectory(folder)


def test_missing_shards_are_listed(model_copy: Copy) -> None:
    folder = model_copy("llama")
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 .*: model-00002-of-00002"):
        HFDirectory(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(model_copy: Copy) -> None:
    folder = model_copy("llama")
    weight_map = shard(folder)
    files = sorted(set(weight_map.values()))
    name = next(iter(weight_map))
    weight_map[name] = files[0] if weight_map[name] == files[1] else files[1]
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="does not agree") as caught:
        HFDirectory(folder)
    assert name in str(caught.value)


def test_a_tensor_that_the_index_leaves_out_is_named(model_copy: Copy) -> None:
    folder = model_copy("llama")
    weight_map = shard(folder)
    name = list(weight_map)[-1]
    del weight_map[name]
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="does not agree") as caught:
        HFDirectory(folder)
    assert name in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(model_copy: Copy) -> None:
    folder = model_copy("llama")
    weight_map = shard(folder)
    name, file = next(iter(weight_map.items()))
    other = next(other for other in weight_map.values() if other != file)
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(1)}), other)
    with pytest.raises(CheckpointError, match="does not agree"):
        HFDirectory(folder)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(model_copy: Copy) -> None:
    folder = model_copy("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)

    edit_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        HFDirectory(folder)
    message = str(caught.value)
    for words in (
        "2 missing",
        "model.norm.weight [64]",
        "model.layers.1.mlp.up_proj.weight [96, 64]",
        "1 not in such a model: model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight is [64, 64], expected [32, 64]",
    ):
        assert words in message


def test_a_long_list_of_missing_tensors_is_cut_and_counted(model_copy: Copy) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", num_hidden_layers=20)
    with pytest.raises(CheckpointError, match=r"162 missing: .*, and 152 more"):
        HFDirectory(folder)


def test_derived_buffers_are_ignored(model_copy: Copy) -> None:
    folder = model_copy("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert name not in HFDirectory(folder).names()


def test_a_head_that_only_the_inner_part_calls_tied_is_read(tmp_path: Path, golden: Copy) -> None:
    raw = json.loads((golden("qwen3_5_vl") / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = True
    for outer, tied in (({}, False), ({"tie_word_embeddings": True}, True)):
        folder = tmp_path / str(tied)
        shutil.copytree(golden("qwen3_5_vl"), folder)
        if tied:
            edit_weights(folder, tie_head)
        inner = {k: v for k, v in raw.items() if k != "tie_word_embeddings"}
        (folder / "config.json").write_text(json.dumps(inner | outer))
        checkpoint = HFDirectory(folder)
        assert checkpoint.config.tie_word_embeddings is tied
        assert ("lm_head.weight" in checkpoint.names()) is not tied


def test_a_missing_head_is_an_error_where_it_is_not_tied(model_copy: Copy) -> None:
    folder = model_copy("llama")
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight \[128, 64\]"):
        HFDirectory(folder)


def test_integer_weights_are_refused(model_copy: Copy) -> None:
    folder = model_copy("llama")
    change = {"model.norm.weight": torch.ones(64, dtype=torch.int8)}
    edit_weights(folder, lambda tensors: tensors.update(change))
    with pytest.raises(CheckpointError, match=r"not floating point numbers: model\.norm\.weight"):
        HFDirectory(folder)


def test_the_chat_template_file_wins(model_copy: Copy) -> None:
    folder = model_copy("llama")
    assert HFDirectory(folder).chat_template() is None
    edit_json(folder / "chat_template.json", chat_template="third")
    assert HFDirectory(folder).chat_template() == "third"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "second"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert HFDirectory(folder).chat_template() == "second"
    edit_json(folder / "tokenizer_config.json", chat_template="also second")
    assert HFDirectory(folder).chat_template() == "also second"
    (folder / "chat_template.jinja").write_text("first\n")
    assert HFDirectory(folder).chat_template() == "first\n"


@pytest.mark.parametrize("value", [7, [], [{"name": "rag", "template": "x"}], ["x"], "x" * 2**21])
def test_an_unusable_chat_template_is_named(model_copy: Copy, value: Any) -> None:
    folder = model_copy("llama")
    edit_json(folder / "tokenizer_config.json", chat_template=value)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template"):
        HFDirectory(folder).chat_template()


def test_tokenizer_files_are_kept_as_they_are(model_copy: Copy) -> None:
    folder = model_copy("llama")
    assert HFDirectory(folder).tokenizer_json() is None
    assert HFDirectory(folder).tokenizer_model() is None
    (folder / "tokenizer.json").write_text('{"version": "1.0"}  \n')
    (folder / "tokenizer.model").write_bytes(b"\0spm")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    checkpoint = HFDirectory(folder)
    assert checkpoint.tokenizer_json() == '{"version": "1.0"}  \n'
    assert checkpoint.tokenizer_model() == folder / "tokenizer.model"
    assert checkpoint.tokenizer_config() == {}
    assert checkpoint.tokenizer_files() == {
        "tokenizer.json": b'{"version": "1.0"}  \n',
        "tokenizer.model": b"\0spm",
        "additional_chat_templates/rag.jinja": b"r",
    }


def test_the_digest_tells_models_apart(model_copy: Copy, golden: Copy) -> None:
    folder = model_copy("llama")
    first = HFDirectory(folder).digest()
    assert first == HFDirectory(golden("llama")).digest()
    change = {"model.norm.weight": torch.full((64,), 2.0)}
    edit_weights(folder, lambda tensors: tensors.update(change))
    second = HFDirectory(folder).digest()
    edit_json(folder / "config.json", rms_norm_eps=1e-4)
    assert len({first, second, HFDirectory(folder).digest()}) == 3


def test_a_single_file_that_is_no_gguf_is_refused(model_copy: Copy, tmp_path: Path) -> None:
    folder = model_copy("llama")
    with pytest.raises(ConfigError, match="Name the folder"):
        open_model_source(folder / WEIGHTS)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_model_source(tmp_path / "a.bin")
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="does not start with the letters GGUF"):
        open_model_source(tmp_path / "a.gguf")
