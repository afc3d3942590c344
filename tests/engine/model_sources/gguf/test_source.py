import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.gguf.source import GGUFSource, dequantise
from engine.model_sources.gguf.tensor_map import undo_permutation
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.open import open_model_source

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
Golden = Callable[[str], Path]
Write = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_model_reads_the_same_from_gguf(
    golden: Golden, write_gguf: Write, tmp_path: Path, family: str
) -> None:
    checkpoint = open_model_source(write_gguf(tmp_path / "m.gguf", family))
    original = HFDirectory(golden(family))
    assert checkpoint.names() == original.names()
    for name in original.names():
        assert torch.equal(checkpoint.tensor(name), original.tensor(name)), name
        assert checkpoint.shape(name) == original.shape(name)
        assert checkpoint.dtype(name) == torch.float32
    ours, theirs = vars(checkpoint.config), vars(original.config)
    by_file = {"bos_token_id", "eos_token_id", "pad_token_id"}
    if family == "mistral":  # llama.cpp has one architecture for both, without the window
        by_file |= {"model_type", "sliding_window", "layer_types"}
    assert {k: v for k, v in ours.items() if k not in by_file} == {
        k: v for k, v in theirs.items() if k not in by_file
    }


def test_sampling_settings_are_read(write_gguf: Write, tmp_path: Path) -> None:
    values = {"temp": (F32, 0.7), "top_p": (F32, 0.8), "top_k": (5, 20), "min_p": (F32, 0.0)}
    values["penalty_repeat"] = (F32, 1.05)
    extra = {f"general.sampling.{key}": value for key, value in values.items()}
    source = open_model_source(write_gguf(tmp_path / "m.gguf", "qwen3", extra))
    assert source.generation_config == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
    }
    plain = open_model_source(write_gguf(tmp_path / "p.gguf", "qwen3"))
    assert plain.generation_config == {}


def test_yarn_scaling_is_read(golden: Golden, write_gguf: Write, tmp_path: Path) -> None:
    extra = {
        "qwen3.rope.scaling.type": (STRING, "yarn"),
        "qwen3.rope.scaling.factor": (F32, 4.0),
        "qwen3.rope.scaling.original_context_length": (U32, 64),
    }
    checkpoint = GGUFSource(write_gguf(tmp_path / "m.gguf", "qwen3_yarn", extra))
    assert (
        checkpoint.config.rope_parameters
        == HFDirectory(golden("qwen3_yarn")).config.rope_parameters
    )


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (F32, 2.5)},
        {"llama.rope.scale_linear": (F32, 2.5)},
    ],
)
def test_linear_scaling_is_read(write_gguf: Write, tmp_path: Path, extra: dict[str, Any]) -> None:
    rope = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama", extra)).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.5)


def test_numbers_stored_in_32_bits_come_back_as_they_were_meant(
    write_gguf: Write, tmp_path: Path
) -> None:
    raw = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama")).raw_config
    assert raw["rms_norm_eps"] == 1e-5
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["dtype"] == "float32"
    assert raw["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_types_unpack_to_what_the_package_gives(
    tmp_path: Path, gguf_bytes: Callable[..., bytes], kind: str
) -> None:
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    values[0, :32] = 0
    packed = gguf.quants.quantize(values, number)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({}, [("t", (64, 6), int(number), None, packed.tobytes())]))
    tensor = dequantise(GGUFFile(path), "t")
    expected = torch.from_numpy(gguf.quants.dequantize(packed, number).astype(np.float32))
    assert tensor.shape == (6, 64)
    assert torch.equal(tensor.float(), expected)
    assert tensor.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_other_types_go_through_the_package(
    tmp_path: Path, gguf_bytes: Callable[..., bytes], kind: str
) -> None:
    number = gguf.GGMLQuantizationType[kind]
    _, width = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, 2 * width, dtype=np.uint8)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({}, [("t", (256, 2), int(number), None, raw.tobytes())]))
    expected = gguf.quants.dequantize(raw.reshape(2, -1), number)
    assert np.array_equal(dequantise(GGUFFile(path), "t").numpy(), expected)


def test_without_the_package_a_rare_type_says_what_to_install(
    tmp_path: Path, gguf_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({}, [("t", (256,), 14, None, bytes(210))]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        dequantise(GGUFFile(path), "t")


def test_tensors_own_their_memory(write_gguf: Write, tmp_path: Path) -> None:
    checkpoint = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama"))
    first = checkpoint.tensor("model.norm.weight")
    first.zero_()
    assert checkpoint.tensor("model.norm.weight").abs().sum() > 0


def test_the_permutation_is_undone_for_rows_of_any_rank() -> None:
    rows = torch.arange(8.0)  # two heads of four, stored as 0 2 1 3
    stored = torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7])
    assert torch.equal(undo_permutation(stored, 2), rows)
    assert torch.equal(undo_permutation(stored[:, None], 2), rows[:, None])


@pytest.mark.parametrize(
    ("family", "extra", "drop", "error", "words"),
    [
        ("llama", {"general.architecture": (STRING, "gemma")}, (), ConfigError, "'gemma'"),
        ("llama", {"general.architecture": (U32, 1)}, (), CheckpointError, "architecture is 1"),
        (
            "llama",
            {"general.architecture": (ARRAY, (STRING, ["llama"]))},
            (),
            CheckpointError,
            "architecture is ['llama']",
        ),
        ("llama", {}, ("general.architecture",), ConfigError, "architecture None"),
        ("llama", {}, ("llama.block_count",), CheckpointError, "lacks the metadata key"),
        ("llama", {"llama.block_count": (U32, 3)}, (), CheckpointError, "9 missing"),
        ("llama", {"llama.block_count": (U32, 1)}, (), CheckpointError, "9 not in such"),
        ("llama", {"llama.block_count": (U32, 0)}, (), ConfigError, "num_hidden_layers is 0"),
        ("llama", {"llama.embedding_length": (U32, 32)}, (), CheckpointError, "wrong shape"),
        ("llama", {"llama.embedding_length": (STRING, "x")}, (), ConfigError, "one integer"),
        ("llama", {"llama.attention.head_count": (U32, 0)}, (), CheckpointError, "heads is 0"),
        ("llama", {"llama.attention.head_count_kv": (U32, 3)}, (), ConfigError, "not divide"),
        (
            "llama",
            {"llama.attention.head_count_kv": (ARRAY, (U32, [2, 1]))},
            (),
            ConfigError,
            "one integer",
        ),
        ("llama", {"llama.rope.dimension_count": (U32, 8)}, (), ConfigError, "16 wide"),
        ("llama", {"llama.expert_count": (U32, 8)}, (), ConfigError, "mixture of experts"),
        ("llama", {"llama.rope.scaling.type": (STRING, "longrope")}, (), ConfigError, "longrope"),
        ("llama3", {"llama.rope.freq_base": (F32, 7.0)}, (), CheckpointError, "Llama 3's formula"),
    ],
)
def test_metadata_that_does_not_fit_is_named(
    write_gguf: Write,
    tmp_path: Path,
    family: str,
    extra: dict[str, Any],
    drop: tuple[str, ...],
    error: type[Exception],
    words: str,
) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, extra, drop)
    with pytest.raises(error) as caught:
        GGUFSource(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_count_given_alike_for_every_layer_is_accepted(write_gguf: Write, tmp_path: Path) -> None:
    extra = {"llama.attention.head_count_kv": (ARRAY, (U32, [2, 2]))}
    config = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama", extra)).config
    assert config.num_key_value_heads == 2


def test_a_file_without_a_tokenizer_still_gives_tensors(write_gguf: Write, tmp_path: Path) -> None:
    checkpoint = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama"))
    assert checkpoint.tokenizer_json() is None
    assert checkpoint.tokenizer_model() is None
    assert checkpoint.chat_template() is None
    assert checkpoint.tokenizer_files() == {}
    assert checkpoint.tokenizer_config() == {}
    assert checkpoint.generation_config == {}


def test_a_folder_with_one_gguf_file_opens_it(write_gguf: Write, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    assert isinstance(open_model_source(tmp_path), GGUFSource)
    write_gguf(tmp_path / "n.gguf", "llama")
    with pytest.raises(ConfigError, match="several GGUF files"):
        open_model_source(tmp_path)


def test_the_digest_tells_files_apart(write_gguf: Write, tmp_path: Path) -> None:
    a = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama"))
    (tmp_path / "sub").mkdir()
    b = GGUFSource(write_gguf(tmp_path / "sub" / "a.gguf", "llama"))
    c = GGUFSource(write_gguf(tmp_path / "a.gguf", "qwen2"))
    assert a.digest() == b.digest() or a.digest() != c.digest()
    assert b.digest() != c.digest()


def test_an_unknown_tensor_is_an_error(write_gguf: Write, tmp_path: Path, golden: Golden) -> None:
    checkpoint = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama3"))
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype, checkpoint.release):
        with pytest.raises(CheckpointError, match=r"no tensor named 'lm_head\.weight'"):
            ask("lm_head.weight")
    assert "lm_head.weight" not in load_file(golden("llama3") / "model.safetensors")
