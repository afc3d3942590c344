"""Campaigns of hostile files, read or refused by a named error."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bench.torture.campaign import Campaign, Figures, fuzz, merged, no_raw, outcome, silent
from bench.torture.damage import damaged, with_odd_value
from bench.torture.hostile_clients import CLIENTS
from bench.torture.hostile_folders import HOSTILE_FOLDERS
from bench.torture.templates import TEMPLATES
from engine.model_sources.adapter.peft import CONFIG, load_adapter
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.safetensors.file import SafetensorsFile, save_file

ROOT = Path(__file__).parents[2]


def headers(trials: int, seed: int) -> Figures:
    """Damaged safetensors headers; none is accepted that the library refuses."""
    from safetensors.torch import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({"a": torch.randn(2, 3), "b.c": torch.ones(5).half()}, path, {"format": "pt"})
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

        def make(chance: random.Random) -> bytes:
            if chance.random() < 0.5:
                return damaged(whole, chance, first=length + 8)
            text = json.dumps(with_odd_value(header, chance)).encode()
            return len(text).to_bytes(8, "little") + text + body

        def read(data: bytes) -> None:
            path.write_bytes(data)
            SafetensorsFile(path)
            load(data)  # raises where the library refuses what was accepted

        return fuzz(make, read, trials, seed) | _bombs(path)


def _bombs(path: Path) -> Figures:
    """Headers of very many empty values, up to 55 MB: the time until the slowest is refused."""
    from tests.engine.model_sources.safetensors.test_malformed import BOMBS, pack

    seconds = []
    for bomb in BOMBS.values():
        path.write_bytes(pack(bomb(), b""))
        kind, took = outcome(SafetensorsFile, path)
        if kind != "named":
            return {f"raw bomb {kind}": 1}
        seconds.append(took)
    return {"worst_bomb_ms": round(1000 * max(seconds), 1)}


def _headers_pass(figures: Figures) -> bool:
    return no_raw(figures) and figures["worst_bomb_ms"] < 100


def gguf_files(trials: int, seed: int) -> Figures:
    """Damaged headers of GGUF files."""
    from tests.support.quantised_gguf import write_q8_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        write_q8_gguf(path, ROOT / "tests" / "fixtures" / "golden" / "qwen2")
        whole = path.read_bytes()

        def read(data: bytes) -> None:
            path.write_bytes(data)
            GGUFFile(path)

        return fuzz(lambda chance: damaged(whole, chance, first=2500), read, trials, seed)


def adapter_configs(trials: int, seed: int) -> Figures:
    """Damaged adapter_config.json, as bytes and as values of other kinds."""
    import engine
    from tests.support.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
        model = write_tiny_model(folder / "model")
        engine.train(
            model=str(model), data=str(rows), output_dir=folder / "run", max_steps=1,
            max_length=64, device="cpu", plot=False, console=False,
        )  # fmt: skip
        adapter = folder / "run" / "adapter"
        whole = (adapter / CONFIG).read_bytes()
        value = json.loads(whole)

        def make(chance: random.Random) -> bytes:
            if chance.random() < 0.4:
                return damaged(whole, chance)
            return json.dumps(with_odd_value(value, chance)).encode()

        def read(data: bytes) -> None:
            (adapter / CONFIG).write_bytes(data)
            load_adapter(adapter)

        return fuzz(make, read, trials, seed)


def json_lines(trials: int, seed: int) -> Figures:
    """Damaged rows, many to a file: each is read, or skipped with its line."""
    from engine.data.dataset import read_rows

    row = json.dumps({"prompt": "What is 1 + 1?", "response": "It is 2."}).encode()
    chance, counts, batch = random.Random(seed), Counter[str](), 10_000
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for _ in range(max(1, trials // batch)):
            lines = [damaged(row, chance).replace(b"\n", b" ") for _ in range(batch - 1)]
            path.write_bytes(b"\n".join([row, *lines]))
            try:
                with silent():
                    rows, report = read_rows(path, bad_lines="skip")
            except Exception as error:
                counts[f"raw {type(error).__name__}"] += 1
                continue
            counts["accepted"] += len(rows)
            counts["named"] += len(report.skipped)
            counts["lost"] += report.read - len(rows) - len(report.skipped)
    seconds = round(time.process_time() - started, 1)
    return {"trials": trials, "seconds": seconds, **counts}


def yaml_files(trials: int, seed: int) -> Figures:
    """Damaged YAML configurations."""
    from engine.config.sources import load_config

    whole = b"model: m\ndata: [a, b]\nlora_rank: 8\nchat_template_kwargs: {a: 1}\nseed: 3\n"
    pieces = (
        b"!!int ''",
        b"!!bool x",
        b"&a ",
        b"*a ",
        b"\0",
        b"{",
        b"[",
        b": ",
        b"- ",
        b"<<: *a\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            load_config(path)

        return fuzz(lambda chance: damaged(whole, chance, pieces), read, trials, seed)


def model_configs(trials: int, seed: int) -> Figures:
    """Damaged config.json, as bytes and as values of other kinds."""
    from engine.model_sources.open import open_model_source

    golden = ROOT / "tests" / "fixtures" / "golden"
    families = sorted(path for path in golden.iterdir() if (path / "config.json").is_file())
    with tempfile.TemporaryDirectory() as name:
        whole = {path.name: (path / "config.json").read_bytes() for path in families}
        for path in families:
            shutil.copytree(path, Path(name) / path.name)

        def make(chance: random.Random) -> bytes:
            family = chance.choice(list(whole))
            if chance.random() < 0.4:
                data = damaged(whole[family], chance)
            else:
                data = json.dumps(with_odd_value(json.loads(whole[family]), chance)).encode()
            return family.encode() + b"\0" + data

        def read(data: bytes) -> None:
            family, _, content = data.partition(b"\0")
            folder = Path(name) / family.decode()
            (folder / "config.json").write_bytes(content)
            try:
                _ = open_model_source(folder).config
            finally:
                (folder / "config.json").write_bytes(whole[folder.name])

        return fuzz(make, read, trials, seed)


def configurations(trials: int, seed: int) -> Figures:
    """A third each of YAML configurations, adapters' and models' ones."""
    kinds = {"yaml": yaml_files, "adapter": adapter_configs, "model": model_configs}
    told = {kind: run(max(1, trials // 3), seed) for kind, run in kinds.items()}
    figures: Figures = {}
    for kind, counts in told.items():
        plain = ("accepted", "named")
        figures = merged(
            figures, {f"{key}_{kind}" if key in plain else key: counts[key] for key in counts}
        )
    return figures


HOSTILE_FILES: dict[str, Campaign] = {
    "T9": Campaign("damaged safetensors headers", 1_000_000, headers, _headers_pass, 100_000),
    "T12": Campaign("damaged configurations", 30_000, configurations, no_raw),
    "T15": Campaign("damaged GGUF headers", 200_000, gguf_files, no_raw, 50_000),
    "T16": Campaign("damaged rows of JSON Lines", 1_000_000, json_lines, no_raw, 100_000),
    **HOSTILE_FOLDERS,
    **TEMPLATES,
    **CLIENTS,
}
