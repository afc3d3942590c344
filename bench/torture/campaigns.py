"""The campaigns: each does so many trials and counts what came out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.torture.damage import damaged, with_odd_value
from engine.errors import CheckpointError, EngineError
from engine.model_sources.adapter.peft import CONFIG, load_adapter
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.safetensors.file import SafetensorsFile, save_file
from engine.runs.checkpoints import CheckpointStore

ROOT = Path(__file__).parents[2]
PROCESSES = ROOT / "tests" / "support" / "processes"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Campaign:
    """`run(trials, seed)` gives figures; `passed` says whether they are as promised."""

    what: str
    trials: int
    run: Callable[[int, int], Figures]
    passed: Callable[[Figures], bool]


def kills(trials: int, seed: int) -> Figures:
    """SIGKILL at random moments of a process that saves checkpoint after checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROCESSES / "resume_crash_server.py"), folder]
        done = subprocess.run(
            [*command, str(trials), "none"],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    figures: Figures = json.loads(done.stdout)
    return figures


def store_with_steps(folder: Path, steps: int) -> CheckpointStore:
    """A store of checkpoints of a few tensors."""
    store = CheckpointStore(folder)
    for step in range(1, steps + 1):
        tensors = {"a": torch.randn(64, 33), "b": torch.full((700,), step, dtype=torch.uint8)}
        store.save(step, {"adapter/adapter_model": tensors}, {"step": step})
    return store


def rot(trials: int, seed: int) -> Figures:
    """One flipped bit in a file of the newest checkpoint: found, and the one before it loads."""
    chance, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name, store_with_steps(Path(name), 2) as store:
        newest = store.path_of(2)
        whole = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
        sizes = [len(data) for data in whole.values()]
        for _ in range(trials):
            (path,) = chance.choices(list(whole), sizes)
            changed = bytearray(whole[path])
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            try:
                store.load(newest)
                counts["missed"] += 1
            except CheckpointError:
                counts["detected"] += 1
            path.write_bytes(whole[path])
        counts["previous_loads"] = int(store.load(store.path_of(1)).step == 1)
    return {"trials": trials, **counts}


def full_disks(trials: int, seed: int) -> Figures:
    """Saving on a file system of so many sizes, in a mount namespace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.torture.full_disk", folder, str(trials)]
        done = subprocess.run(
            ["unshare", "-Urm", *command], capture_output=True, text=True, check=True, cwd=ROOT
        )
    figures: Figures = json.loads(done.stdout)
    return figures


def fuzz(
    make: Callable[[random.Random], bytes], read: Callable[[bytes], object], trials: int, seed: int
) -> Figures:
    """Read damaged bytes: accepted, or refused by an `EngineError` that can be printed."""
    chance, counts, worst = random.Random(seed), Counter[str](), 0.0
    for _ in range(trials):
        data = make(chance)
        started = time.process_time()
        try:
            read(data)
            counts["accepted"] += 1
        except EngineError as error:
            message = str(error)
            fine = len(message) < 2000 and message.isprintable()
            counts["named" if fine else "unprintable"] += 1
        except Exception as error:
            counts[f"raw {type(error).__name__}"] += 1
        worst = max(worst, time.process_time() - started)
    return {"trials": trials, "worst_ms": round(1000 * worst, 1), **counts}


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

        return fuzz(make, read, trials, seed)


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
                rows, report = read_rows(path, bad_lines="skip")
            except Exception as error:
                counts[f"raw {type(error).__name__}"] += 1
                continue
            counts["accepted"] += len(rows)
            counts["named"] += len(report.skipped)
            counts["lost"] += report.read - len(rows) - len(report.skipped)
    seconds = round(time.process_time() - started, 1)
    return {"trials": trials, "seconds": seconds, **counts}


def configurations(trials: int, seed: int) -> Figures:
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


def protocol_steps(trials: int, seed: int) -> Figures:
    """Each step of the saving protocol taken away: the tests must notice every one."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider",
         "tests/engine/runs/test_protocol_steps.py"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    return {"passed": done.returncode == 0, "pytest": last.split(" in ")[0]}


def _no_raw(figures: Figures) -> bool:
    bad = ("raw", "unprintable", "lost")
    return not any(value for key, value in figures.items() if key.startswith(bad))


def _no_loss(figures: Figures) -> bool:
    return not any(figures[key] for key in ("lost", "unloadable", "wrong"))


CAMPAIGNS: dict[str, Campaign] = {
    "T1": Campaign("SIGKILL while checkpoints are saved", 10_000, kills, _no_loss),
    "T5": Campaign(
        "flipped bits of a checkpoint",
        10_000,
        rot,
        lambda f: f["detected"] == f["trials"] and f["previous_loads"] == 1,
    ),
    "T6": Campaign(
        "full disks", 100, full_disks, lambda f: f["loadable"] == f["trials"] == f["named"]
    ),
    "T9": Campaign("damaged safetensors headers", 1_000_000, headers, _no_raw),
    "T11": Campaign("damaged adapter configurations", 100_000, adapter_configs, _no_raw),
    "T12": Campaign("damaged configurations", 100_000, configurations, _no_raw),
    "T15": Campaign("damaged GGUF headers", 200_000, gguf_files, _no_raw),
    "T16": Campaign("damaged rows of JSON Lines", 1_000_000, json_lines, _no_raw),
    "T23": Campaign("steps of the protocol taken away", 1, protocol_steps, lambda f: f["passed"]),
}
