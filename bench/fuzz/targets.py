"""One function for each reader of strangers' bytes, and its seeds."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import EngineError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CORPUS = Path(__file__).with_name("corpus")


@dataclass(frozen=True)
class Target:
    """`read` takes bytes and raises named errors only; `seeds` are whole inputs."""

    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]

    def fuzz_one(self, data: bytes) -> str:
        """`accepted` or `named`. Raises what the reader should not."""
        try:
            self.read(data)
        except _named() as error:
            message = str(error)
            assert message.isprintable(), f"a message that cannot be shown: {message!r}"
            assert len(message) < 5000, f"a message of {len(message)} characters"
            return "named"
        return "accepted"


@cache
def _named() -> tuple[type[Exception], ...]:
    from engine.serving.openai.api_errors import ApiError

    return (EngineError, ApiError)


@cache
def _folder() -> Path:
    """A folder of this process with a model, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="engine-fuzz-")
    _folders.append(folder)
    shutil.copytree(GOLDEN / "qwen3", Path(folder.name) / "model")
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _written(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def safetensors(data: bytes) -> None:
    """The header; nothing is accepted that the library refuses."""
    from safetensors.torch import load

    from engine.model_sources.safetensors.file import SafetensorsFile

    SafetensorsFile(_written("a.safetensors", data))
    load(data)


def gguf(data: bytes) -> None:
    """Header, metadata and tensor list."""
    from engine.model_sources.gguf.container import GGUFFile

    GGUFFile(_written("a.gguf", data))


def config(data: bytes) -> None:
    """config.json beside the weights of a small model."""
    from engine.model_sources.open import open_model_source

    _ = open_model_source(_written("model/config.json", data).parent).config


def adapter(data: bytes) -> None:
    """adapter_config.json alone."""
    from engine.model_sources.adapter.config import from_json
    from engine.storage.safe_files import read_json_object

    from_json(read_json_object(_written("adapter_config.json", data)), "adapter_config.json")


def tokenizer(data: bytes) -> None:
    """tokenizer.json and, behind a zero byte, tokenizer_config.json; then a sentence."""
    from engine.model_sources.open import open_model_source
    from engine.tokenization.tokenizer import load_tokenizer

    (_folder() / "model" / "config.json").write_bytes((GOLDEN / "qwen3/config.json").read_bytes())
    whole, _, beside = data.partition(b"\0")
    _written("model/tokenizer.json", whole)
    _written("model/tokenizer_config.json", beside or b"{}")
    read = load_tokenizer(open_model_source(_folder() / "model"))
    read.decode(read.encode("Hello there, 12!"), skip_special_tokens=False)


def json_lines(data: bytes) -> None:
    """Rows; all that were found are read or named."""
    from engine.data.dataset import read_rows

    rows, report = read_rows(_written("rows.jsonl", data), bad_lines="skip")
    assert len(rows) + len(report.skipped) == report.read


def yaml(data: bytes) -> None:
    """A configuration of a run."""
    from engine.config.sources import load_config

    load_config(_written("c.yaml", data))


def pruning(data: bytes) -> None:
    """The record of pruned heads, under its digest and without."""
    from engine.model_sources.pruning_record import read_pruning, sealed

    read_pruning(_written("pruning.json", data).parent)
    try:
        record = json.loads(data)
        whole = json.dumps(sealed(record)).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    read_pruning(_written("pruning.json", whole).parent)


def body(data: bytes) -> None:
    """The body of a request, for a chat and for a completion."""
    from engine.serving.openai.api_errors import Notes
    from engine.serving.openai.fields import parse_body
    from engine.serving.openai.requests import read_chat, read_completion

    given = parse_body(data)
    (read_chat if "messages" in given else read_completion)(given, Notes())


def _tokenizers() -> list[bytes]:
    from tests.support.tiny_model import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        parts = [Path(folder, f"tokenizer{end}.json").read_bytes() for end in ("", "_config")]
    return [b"\0".join(parts)]


def _gguf() -> list[bytes]:
    from tests.support.quantised_gguf import write_q8_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_q8_gguf(Path(folder) / "a.gguf", GOLDEN / "qwen2")
        return [(Path(folder) / "a.gguf").read_bytes()[:200_000]]


def _safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"a": torch.ones(2, 3), "b.c": torch.ones(5).half()}, {"format": "pt"})]


def _values(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


_ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "m", "use_rslora": False, "rank_pattern": {"q_proj": 4},
    "modules_to_save": None, "bias": "none", "task_type": "CAUSAL_LM",
}  # fmt: skip
_PRUNED = {"mode": "mask", "pruned_heads": {"0": [1]}, "metric": "l2-weights"}
_CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stop": ["a"], "seed": 3}
_ROWS = (
    b'{"prompt": "a", "response": "b"}\n{"messages": [{"role": "user", "content": "q"}, '
    b'{"role": "assistant", "content": "r"}]}\n'
)

TARGETS: dict[str, Target] = {
    "safetensors": Target(safetensors, _safetensors),
    "gguf": Target(gguf, _gguf),
    "config": Target(config, lambda: [(GOLDEN / "qwen3" / "config.json").read_bytes()]),
    "adapter": Target(adapter, _values(_ADAPTER)),
    "tokenizer": Target(tokenizer, _tokenizers),
    "json_lines": Target(
        json_lines, lambda: [_ROWS, b"[" + _ROWS.replace(b"\n", b",")[:-1] + b"]"]
    ),
    "yaml": Target(yaml, lambda: [b"model: m\ndata: [a, b]\nchat_template_kwargs: {a: 1}\n"]),
    "pruning": Target(pruning, _values(_PRUNED)),
    "body": Target(body, _values(_CHAT, {"prompt": "a", "max_tokens": 1, "logit_bias": {"5": 1}})),
}
