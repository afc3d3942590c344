"""llama.cpp as an oracle of token ids: GGUF files with a vocabulary, and its own server."""

import http.client
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

Tokenise = Callable[[str], list[int]]
WIDTH = 32


def write_vocabulary(path: Path, metadata: Mapping[str, Any], count: int) -> Path:
    """Write a GGUF file with one small layer and the tokenizer that `metadata` describes."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(count)
    writer.add_rope_dimension_count(WIDTH)
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, list(value))
    square = np.zeros((WIDTH, WIDTH), dtype=np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((count, WIDTH), dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def llama_cpp(path: Path) -> Iterator[Tokenise]:
    """llama.cpp's tokenizer for the file: special tokens in the text count, none are added."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 64
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    address = urlparse(server.listening_address)
    connection = http.client.HTTPConnection(str(address.hostname), address.port)

    def tokenise(text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/tokenize", json.dumps(body), headers)
        ids: list[int] = json.loads(connection.getresponse().read())["tokens"]
        return ids

    try:
        yield tokenise
    finally:
        connection.close()
        del server


def differences(ours: Callable[[str], Sequence[int]], path: Path, texts: list[str]) -> list[str]:
    """The texts whose ids differ from llama.cpp's."""
    with llama_cpp(path) as theirs:
        return [text for text in texts if list(ours(text)) != theirs(text)]
