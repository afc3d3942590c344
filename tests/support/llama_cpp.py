"""llama.cpp as an oracle: GGUF files with a vocabulary, its token ids and its answers."""

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
FLOAT32 = 0


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


def _parameters(path: Path, context: int) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    return parameters


def _served(parameters: Any) -> tuple[Any, http.client.HTTPConnection]:
    """A server, which ends when nothing refers to it, and a connection to it."""
    import xllamacpp

    server = xllamacpp.Server(parameters)
    address = urlparse(server.listening_address)
    return server, http.client.HTTPConnection(str(address.hostname), address.port)


@contextmanager
def llama_cpp(path: Path) -> Iterator[Tokenise]:
    """llama.cpp's tokenizer for the file: special tokens in the text count, none are added."""
    server, connection = _served(_parameters(path, 64))

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


def answers(
    path: Path,
    prompts: Sequence[list[int]],
    *,
    adapter: Path | None = None,
    exact_cache: bool = False,
    **asked: Any,
) -> list[dict[str, Any]]:
    """What llama.cpp answers to each prompt of token ids, by its likeliest tokens.

    `asked` goes into the requests. `exact_cache` keeps keys and values in float32.
    """
    import xllamacpp

    parameters = _parameters(path, 256)
    parameters.cpuparams.n_threads = 1
    if exact_cache:
        parameters.cache_type_k = parameters.cache_type_v = FLOAT32
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server, connection = _served(parameters)
    made = []
    for ids in prompts:
        body = json.dumps({"prompt": ids, "temperature": 0, **asked})
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        made.append(json.loads(connection.getresponse().read()))
    connection.close()
    del server
    return made


def likeliest(
    path: Path, prompts: Sequence[list[int]], count: int, adapter: Path | None = None
) -> list[dict[int, float]]:
    """llama.cpp's log-probabilities of the `count` likeliest tokens after every prompt."""
    made = answers(path, prompts, adapter=adapter, n_predict=1, n_probs=count)
    # A stop token leaves no text, and the server then tells no probabilities.
    return [
        {
            token["id"]: token["logprob"]
            for step in answer.get("completion_probabilities", [])
            for token in step["top_logprobs"]
        }
        for answer in made
    ]
