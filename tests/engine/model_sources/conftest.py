"""Writers of model files for these tests, independent of the code under test."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

Metadata = Mapping[str, tuple[int, Any]]
GGUFTensor = tuple[str, Sequence[int], int, int | None, bytes]
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_SCALARS = {0: "<B", 1: "<b", U32: "<I", 5: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def pack_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pack_value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if kind == STRING:
        return pack_string(value)
    if kind == ARRAY:
        inner, items = value
        body = b"".join(pack_value(inner, item) for item in items)
        return struct.pack("<IQ", inner, len(items)) + body
    return struct.pack(_SCALARS[kind], value)


def pack_gguf(
    metadata: Metadata,
    tensors: Sequence[GGUFTensor],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    """The bytes of a GGUF file; a tensor is (name, sizes fastest first, type, offset, data).

    A value given as bytes is written as it is, behind its key and type; an offset of None is the
    right one.
    """
    count = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, *count)
    for key, (kind, value) in metadata.items():
        head += pack_string(key) + struct.pack("<I", kind) + pack_value(kind, value)
    data = b""
    for name, sizes, kind, offset, content in tensors:
        at = len(data) if offset is None else offset
        head += pack_string(name) + struct.pack("<I", len(sizes))
        head += b"".join(struct.pack("<Q", size) for size in sizes)
        head += struct.pack("<IQ", kind, at)
        data += content + b"\0" * (-len(content) % align)
    return head + b"\0" * (-len(head) % align) + data


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to the rows of q_proj and k_proj of a llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.fixture
def gguf_bytes() -> Callable[..., bytes]:
    return pack_gguf


@pytest.fixture
def tokenizer_metadata() -> dict[str, tuple[int, Any]]:
    """A byte-level BPE of 256 bytes, four merges and three control tokens, as of SmolLM."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(letter[byte] for byte in range(256))]
    tokens += ["Ġt", "he", "Ġthe", "ĠĠ", "<tool>"]
    kinds = [3, 3, 3] + [1] * 260 + [4]
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (5, kinds)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["Ġ t", "h e", "Ġt he", "Ġ Ġ"])),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.padding_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, "{{ messages[0]['content'] }}"),
    }


@pytest.fixture
def write_gguf(golden: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a golden checkpoint as an F32 GGUF file, as llama.cpp's converter would."""

    def write(
        path: Path, family: str, extra: Metadata | None = None, drop: Sequence[str] = ()
    ) -> Path:
        folder = golden(family)
        config = json.loads((folder / "config.json").read_text())
        arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        tensors: list[GGUFTensor] = []
        for name, tensor in load_file(folder / "model.safetensors").items():
            array = tensor.float().numpy()
            part = name.split(".")[-2]
            if arch == "llama" and part in heads:
                array = interleave(array, heads[part])
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            tensors.append((name, array.shape[::-1], 0, None, array.tobytes()))
        rope = config["rope_parameters"]
        metadata: dict[str, tuple[int, Any]] = {
            "general.architecture": (STRING, arch),
            f"{arch}.block_count": (U32, config["num_hidden_layers"]),
            f"{arch}.context_length": (U32, config["max_position_embeddings"]),
            f"{arch}.embedding_length": (U32, config["hidden_size"]),
            f"{arch}.feed_forward_length": (U32, config["intermediate_size"]),
            f"{arch}.attention.head_count": (U32, config["num_attention_heads"]),
            f"{arch}.attention.head_count_kv": (U32, config["num_key_value_heads"]),
            f"{arch}.attention.layer_norm_rms_epsilon": (F32, config["rms_norm_eps"]),
            f"{arch}.rope.freq_base": (F32, rope["rope_theta"]),
        }
        if "head_dim" in config:
            metadata[f"{arch}.attention.key_length"] = (U32, config["head_dim"])
        if rope["rope_type"] == "llama3":
            factors = _llama3_divisors(rope, config["head_dim"])
            tensors.append(("rope_freqs.weight", factors.shape, 0, None, factors.tobytes()))
        metadata |= extra or {}
        for key in drop:
            del metadata[key]
        path.write_bytes(pack_gguf(metadata, tensors))
        return path

    return write


def _llama3_divisors(rope: Mapping[str, Any], dim: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter computes rope_freqs.weight, one frequency at a time."""
    result = []
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)):
        wavelength = 2 * np.pi / float(freq)
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, dtype=np.float32)


@pytest.fixture
def model_copy(golden: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden model directory that a test may damage."""

    def copy(family: str) -> Path:
        target = tmp_path / family
        target.mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(golden(family) / name, target / name)
        return target

    return copy
