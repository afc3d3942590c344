"""Secrets reach neither what a run writes nor what a command prints."""

import io
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cli.main import main
from tests.support.processes.served import ServedModel
from tests.support.small_runs import quick_words
from tests.support.source_tree import ROOT

CANARY = "canary-4f1d9b"
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_KEY",
    "ENGINE_API_KEY", "DB_PASSWORD", "SSH_AUTH_SOCK", "MY_SECRET",
)  # fmt: skip
URL = f"postgresql://me:{CANARY}-url@127.0.0.1:9/rows?sslmode=disable&token={CANARY}-query"


def with_canary(folder: Path) -> list[str]:
    """Files that hold the canary."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def test_no_secret_reaches_a_log_a_record_a_tracker_or_the_terminal(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    words, rows = quick_words(tiny_model, Path("run")), str(write_rows(4))
    assert main(["train", *words, "--data", rows, "--report-to", "tensorboard"]) == 0
    assert (work / "run" / "tensorboard").exists()
    for number, data in enumerate((URL, "postgresql://me:${MY_SECRET}@127.0.0.1:9/rows")):
        # Without a query, then with one: refused by the settings, and by the database.
        for more in ((), ("--query", "select * from rows")):
            refused = quick_words(tiny_model, Path(f"run-{number}-{len(more)}"))
            assert main(["train", *refused, "--data", data, *more]) == 2
    told = "".join(capfd.readouterr())
    assert "engine:" in told
    assert CANARY not in told
    assert with_canary(work) == []


HTTP = f"http://me:{CANARY}-http@127.0.0.1:9/x?api_key={CANARY}-parameter"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
TRAIN = ("train", "--model", "{model}", "--data", "{rows}", "--output-dir", "run")
QUERY = ("--query", "select 1")
ENTRIES: dict[str, tuple[str, ...]] = {
    "train model": ("train", "--model", HTTP, "--data", "{rows}", "--output-dir", "run"),
    "train data": ("train", "--model", "{model}", "--data", URL, "--output-dir", "run", *QUERY),
    "train web data": ("train", "--model", "{model}", "--data", HTTP, "--output-dir", "run"),
    "eval data": (*TRAIN, "--eval-data", URL, "--eval-query", "select 1"),
    "teacher": (*TRAIN, "--teacher", HTTP),
    "reference": (*TRAIN, "--objective", "dpo", "--reference", HTTP),
    "tokenizer": (*TRAIN, "--tokenizer", HTTP, "--method", "scratch"),
    "init adapter": (*TRAIN, "--init-adapter", HTTP),
    "push": (*TRAIN, "--push-to-hub", HTTP),
    "output": ("train", "--model", "no", "--data", "{rows}", "--output-dir", HTTP),
    "config": ("train", "--config", HTTP),
    "unknown option": (*TRAIN, "--hub-token", f"{CANARY}-typed"),
    "unknown option, joined": (*TRAIN, f"--hf-token={CANARY}-typed"),
    "unknown word": (*TRAIN, f"hub_token={CANARY}-typed"),
    "unknown key": ("train", "--config", "{config}"),
    "words": ("train", HTTP),
    "verb": (HTTP,),
    "axolotl": ("import-config", "{axolotl}"),
    "axolotl, written": ("import-config", "{axolotl}", "--output", "translated.yaml"),
    "llama-factory": ("import-config", "{factory}", "--output", "translated.yaml"),
    "sweep": ("sweep", "{sweep}"),
    "pipeline": ("pipeline", "{pipeline}"),
    "serve key": ("serve", "--model", "{model}", "--host", "0.0.0.0", "--api-key", f"{CANARY} a"),
    "serve host": ("serve", "--model", "{model}", "--host", HTTP),
    "plan": ("plan", "--model", HTTP),
    "merge": ("merge", "--model", "{model}", "--adapter", HTTP, "--output", "out"),
    "prune": ("prune", "--model", HTTP, "--output", "out", "--fraction", "0.5"),
    "quantize": ("quantize", "--model", HTTP, "--output", "out", "--bits", "4"),
    "export": ("export", "gguf", "--model", HTTP, "--output", "out.gguf"),
    "eval": ("eval", "--model", "{model}", "--data", URL, *QUERY),
    "generate": ("generate", "--model", HTTP, "--prompt", "x"),
    "chat": ("chat", "--model", HTTP),
    "validate": ("data", "validate", "--data", URL, *QUERY),
    "convert": ("data", "convert", "--data", URL, *QUERY, "--output", "rows.jsonl"),
    "mix": ("data", "mix", "--sources", URL, "--output", "rows.jsonl"),
    "forge": (
        "forge", "--model", "{model}", "--data", URL, *QUERY, "--output-dir", "forge",
        "--cycles", "1", "--fraction", "0.5",
    ),
    "init": ("init", "--model", "{model}", "--data", URL),
    "init model": ("init", "--model", HTTP, "--data", "{rows}"),
    "status": ("status", HTTP),
    "resume": ("resume", HTTP),
    "compare": ("compare", HTTP, HTTP),
    "board": ("board", HTTP),
    "bench": ("bench", "--against", HTTP),
    "doctor": ("doctor",),
}  # fmt: skip
FILES = {
    "config": f"model: m\ndata: d\nhub_token: {CANARY}-key\n",
    "axolotl": (
        f"base_model: m\nadapter: lora\nhf_token: {CANARY}-key\nwandb_api_key: {CANARY}-key\n"
        f"datasets:\n  - path: {URL}\n    type: alpaca\n"
    ),
    "factory": (
        f"model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: {URL}\n"
        f"hf_hub_token: {CANARY}-key\n"
    ),
    "sweep": f"with:\n  data: '{URL}'\n  query: select 1\nparameters:\n  model: ['{HTTP}', m]\n",
    "pipeline": (
        f"output_dir: job\nstages:\n  - run: train\n    with: {{model: m, data: '{URL}', "
        f"query: select 1, teacher: '{HTTP}'}}\n"
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_secret_that_is_typed_anywhere_is_shown_and_stored_nowhere(
    entry: str,
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    known = {"model": str(tiny_model), "rows": str(write_rows(4))}
    for name, text in FILES.items():
        known[name] = str(tmp_path / f"{name}.yaml")
        Path(known[name]).write_text(text)
    work = tmp_path / "work"
    for folder in (work, work / "temporary"):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(work / "temporary"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for name in (*VARIABLES, *PROXIES):
        monkeypatch.setenv(name, f"http://me:{CANARY}-{name}@127.0.0.1:9")
    monkeypatch.setenv("ENGINE_API_KEY", f"{CANARY}-key-of-the-server")
    words = [known.get(word.strip("{}"), word) for word in ENTRIES[entry]]
    main(words)
    told = "".join(capfd.readouterr())
    assert told
    assert CANARY not in told
    assert with_canary(work) == []
    assert not list(work.rglob(f"*{CANARY}*"))


FAKE_WANDB = """
import json, os, pathlib, sys

class Run:
    def __init__(self, folder):
        self.file = (pathlib.Path(folder) / "wandb.jsonl").open("a")
    def log(self, values, step):
        self.file.write(json.dumps([step, values], default=str) + "\\n")
    def finish(self):
        self.file.close()

class Table(dict):
    pass

def init(**given):
    run = Run(given["dir"])
    # As wandb does: the settings, and the words of the command.
    run.file.write(json.dumps([given, sys.argv], default=str) + "\\n")
    return run
"""


def test_wandb_gets_no_secret(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    run, rows = tmp_path / "run", str(write_rows(4))
    words = [*quick_words(tiny_model, run), "--data", rows, "--report-to", "wandb"]
    database = tmp_path / "rows.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("create table t (prompt text, response text)")
        connection.execute("insert into t values ('a', 'b')")
        connection.commit()
    url = f"sqlite:///{database}?password={CANARY}-url"
    words += ["--eval-data", url, "--eval-query", "select * from t", "--eval-every", "1"]
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", *PROXIES), f"http://a:{CANARY}@127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "train", *words],
        capture_output=True,
        text=True,
        env=os.environ | secrets | {"PYTHONPATH": f"{ROOT}:{tmp_path / 'fake'}"},
        cwd=tmp_path,
        check=False,
    )
    told = (run / "wandb.jsonl").read_text()
    assert "--report-to" in told
    assert CANARY not in done.stdout + done.stderr + told
    assert with_canary(run) == []


def test_a_served_model_tells_no_secret(tiny_model: Path) -> None:
    key = f"{CANARY}-key-of-the-server"
    with ServedModel(tiny_model, variables={"ENGINE_API_KEY": key, "HF_TOKEN": CANARY}) as server:
        right = {"Authorization": f"Bearer {key}"}
        wrong = {"Authorization": f"Bearer {CANARY}-wrong"}
        answers = [
            server.request("GET", f"/v1/models?api_key={CANARY}-query", headers=right),
            server.request("GET", f"/{CANARY}-path?token={CANARY}", headers=right),
            server.request("GET", "/v1/models", headers=wrong),
            server.request("GET", "/metrics", headers=right),
            server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, right),
            server.request("POST", "/v1/completions", {"prompt": "a", "api_key": key}, right),
        ]
        assert [status for status, _ in answers][2:3] == [401]
        told = server.output + "".join(body.decode() for _, body in answers)
    assert key not in told
    assert f"{CANARY}-wrong" not in told
    assert f"{CANARY}-query" not in told
    assert f"token={CANARY}" not in told


def test_the_search_for_the_canary_finds_one(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log").write_text(f"x {CANARY} y")
    assert with_canary(tmp_path) == ["deep/log"]
