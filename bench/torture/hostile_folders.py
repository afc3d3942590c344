"""Folders whose names lead elsewhere, pickles under any name, and damaged tokenizers."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.torture.campaign import Campaign, Figures, fuzz, no_raw
from bench.torture.damage import damaged, with_odd_value
from engine.errors import EngineError
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from tests.support.tiny_model import write_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden" / "qwen3"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


def _names(outside: Path) -> list[str]:
    """Names of shards that lead out of the folder, or are no files."""
    target, up = outside / WEIGHTS, "../" * 30
    return [
        str(target), f"../{outside.name}/{WEIGHTS}", f"./../{outside.name}/{WEIGHTS}",
        f"{up}{str(target)[1:]}", f"a/../../{outside.name}/{WEIGHTS}", f"..\\{outside.name}\\x",
        f"file://{target}", f"~/{WEIGHTS}", f"${{HOME}}/{WEIGHTS}", "/etc/passwd", "/dev/zero",
        "/dev/stdin", "/proc/self/environ", "..", ".", "", " ", "/", "//", "a/b.safetensors",
        "C:\\x.safetensors", "\\\\host\\x.safetensors", "x\0.safetensors", f"{WEIGHTS}\0.txt",
        "x" * 4096, "x" * 256 + ".safetensors", "\u202e.safetensors", "\x1b[2J.safetensors",
        "model.safetensors/", f"./{WEIGHTS}", f"{WEIGHTS}/.", "%2e%2e/x.safetensors", "con",
        "model.bin", "pipe.safetensors", "folder.safetensors", "device.safetensors",
        "loop.safetensors", "MODEL.SAFETENSORS", "-rf.safetensors", "*.safetensors", "missing",
    ]  # fmt: skip


def paths(trials: int, seed: int) -> Figures:
    """Names in an index that lead out of a model's folder: refused, and nothing there is opened."""
    global _opened
    sys.addaudithook(_audit)
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        inside, outside = Path(name) / "model", Path(name) / "secret"
        for folder in (inside, outside):
            shutil.copytree(GOLDEN, folder)
        tensors = _tensor_names(inside / WEIGHTS)
        os.mkfifo(inside / "pipe.safetensors")
        (inside / "folder.safetensors").mkdir()
        (inside / "device.safetensors").symlink_to("/dev/zero")
        (inside / "loop.safetensors").symlink_to("loop.safetensors")
        (inside / "real.safetensors").write_bytes((inside / WEIGHTS).read_bytes())
        (inside / WEIGHTS).unlink()
        names = _names(outside)
        for shard in names:
            (inside / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
            _opened = []
            try:
                source = open_model_source(inside)
                for tensor in tensors[:1]:
                    source.tensor(tensor)
                counts["accepted"] += 1
            except EngineError as error:
                counts["named" if str(error).isprintable() else "unprintable"] += 1
            except Exception as error:
                counts[f"raw {type(error).__name__}"] += 1
            opened, _opened = _opened, None
            elsewhere = [o for o in opened if not Path(o).is_relative_to(inside)]
            system = ("/proc/self/", "/usr", str(ROOT), sys.prefix, "/sys")
            counts["opened_elsewhere"] += any(not o.startswith(system) for o in elsewhere)
    return {"names": len(names), **counts}


def _tensor_names(path: Path) -> list[str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


class _Payload:
    """An object whose unpickling writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def pickles(trials: int, seed: int) -> Figures:
    """Pickles under every name that a model or an adapter has: none is opened."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, canary = Path(name) / "model", Path(name) / "canary"
        plain = [pickle.dumps(_Payload(canary), protocol) for protocol in range(6)]
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("archive/data.pkl", plain[2])
        named = (
            WEIGHTS, "pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt",
            "tf_model.h5", "flax_model.msgpack", "tokenizer.json", "tokenizer.model", "config.json",
        )  # fmt: skip
        for file in named:
            for data in (*plain, packed.getvalue()):
                shutil.copytree(GOLDEN, folder)
                if file not in ("config.json", "tokenizer.json", "tokenizer.model"):
                    (folder / WEIGHTS).unlink()
                (folder / file).write_bytes(data)
                try:
                    source = open_model_source(folder)
                    load_tokenizer(source)
                    counts["accepted"] += 1
                except EngineError:
                    counts["named"] += 1
                except Exception as error:
                    counts[f"raw {type(error).__name__}"] += 1
                shutil.rmtree(folder)
        return {"files": sum(counts.values()), "run": int(canary.exists()), **counts}


def tokenizers(trials: int, seed: int) -> Figures:
    """Damaged tokenizer.json and tokenizer_config.json: read and used, or named."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder)
        names = ("tokenizer.json", "tokenizer_config.json")
        files = {file: (folder / file).read_bytes() for file in names}
        values = {file: json.loads(data) for file, data in files.items()}

        def make(chance: random.Random) -> bytes:
            file = chance.choice(list(files))
            if chance.random() < 0.4:
                data = damaged(files[file], chance)
            else:
                data = json.dumps(with_odd_value(values[file], chance)).encode()
            return file.encode() + b"\0" + data

        def read(data: bytes) -> None:
            file, _, content = data.partition(b"\0")
            for known, whole in files.items():
                (folder / known).write_bytes(content if known == file.decode() else whole)
            tokenizer = load_tokenizer(_AsSource(folder))
            tokenizer.decode(tokenizer.encode("Hello there, 12!"), skip_special_tokens=False)

        return fuzz(make, read, trials, seed)


class _AsSource(TokenizerFolder):
    """A folder read as a model's is, by the strict readers."""

    def tokenizer_json(self) -> str | None:
        from engine.storage.safe_files import read_text

        return read_text(self.path / "tokenizer.json", 64 << 20)

    def tokenizer_config(self) -> dict[str, Any]:
        from engine.storage.safe_files import read_json_object

        return read_json_object(self.path / "tokenizer_config.json")


HOSTILE_FOLDERS = {
    "T10": Campaign(
        "names in an index that lead elsewhere", 1, paths,
        lambda f: no_raw(f) and not f["opened_elsewhere"] and f.get("accepted", 0) <= 1,
    ),
    "T11": Campaign("pickles under other names", 1, pickles, lambda f: no_raw(f) and not f["run"]),
    "T13": Campaign("damaged tokenizers", 20_000, tokenizers, no_raw),
}  # fmt: skip
