"""Every verb that writes files, as a command on tiny inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.small_runs import write_pairs
from tests.support.tiny_model import write_tiny_model
from tests.support.tokenizer_folder import write_byte_tokenizer

Words = Callable[[Path, Path], list[object]]


def _nothing(inputs: Path, folder: Path) -> None:
    """Most commands begin in an empty folder."""


@dataclass(frozen=True)
class Command:
    """A command line: `line(inputs, folder)` are its words, and it writes below `folder`.

    `growing` ends the names of files that grow while it runs.
    """

    name: str
    inputs: Path
    line: Words
    growing: tuple[str, ...] = (".log", ".lock", "metrics.jsonl", "answers.jsonl")
    before: Callable[[Path, Path], None] = _nothing

    def words(self, folder: Path) -> list[str]:
        """The words of the command line."""
        return [str(word) for word in self.line(self.inputs, folder)]

    def prepare(self, folder: Path) -> None:
        """Put what the command needs into the folder that it writes to."""
        self.before(self.inputs, folder)


TRAIN = ("--method", "lora", "--device", "cpu", "--max-length", 64, "--batch-size", 2)


def _train(*more: object, rows: str = "rows.jsonl") -> Words:
    return lambda inputs, folder: [
        "train", "--model", inputs / "model", "--data", inputs / rows,
        "--output-dir", folder / "run", "--resume", "auto", "--no-plot", *TRAIN, *more,
    ]  # fmt: skip


def _model(verb: str, *more: object, output: str = "out") -> Words:
    words = verb.split()
    return lambda inputs, folder: [
        *words, "--model", inputs / "model", "--output", folder / output, *more
    ]  # fmt: skip


def _gguf(*more: object, output: str) -> Words:
    return lambda inputs, folder: [
        "export",
        "gguf",
        "--model",
        inputs / "bytes",
        "--output",
        folder / output,
        *more,
    ]


def _data(verb: str, output: str, *more: object) -> Words:
    return lambda inputs, folder: ["data", verb, inputs / "rows.jsonl", output, folder / "out" / {
        "--output": "rows.jsonl", "--output-dir": "rows"}[output], *more]  # fmt: skip


def _with(*pairs: tuple[str, str]) -> Callable[[Words], Words]:
    """Options whose values are inputs."""

    def add(words: Words) -> Words:
        return lambda inputs, folder: [
            *words(inputs, folder),
            *(word for option, name in pairs for word in (option, inputs / name)),
        ]

    return add


LINES: dict[str, Words] = {
    "train": _train("--max-steps", 3, "--checkpoint-every", 1),
    "train --method full": _train("--max-steps", 2, "--checkpoint-every", 1, "--method", "full"),
    "train, cached tokens": lambda inputs, folder: [
        *_train("--max-steps", 1)(inputs, folder), "--token-cache", folder / "tokens"],
    "train, streamed": _train("--max-steps", 1, "--streaming", "on"),
    "train, preferences": lambda inputs, folder: [
        *_train("--max-steps", 1, "--objective", "dpo", rows="pairs.jsonl")(inputs, folder),
        "--reference-cache", folder / "reference"],
    "train, drawn": lambda inputs, folder: [
        *(word for word in _train("--max-steps", 1)(inputs, folder) if word != "--no-plot"),
        "--heldout", 0.3, "--eval-every", 1, "--save-best", "eval_loss"],
    "merge": _with(("--adapter", "run/adapter"))(_model("merge")),
    "quantize": _model("quantize", "--bits", 4),
    "prune": _model("prune", "--fraction", 0.25),
    "export gguf": _gguf("--modelfile", output="out/model.gguf"),
    "export gguf, divided": _gguf("--max-file-size", "40KB", output="model.gguf"),
    "export adapter": lambda inputs, folder: [
        "export", "adapter", "--adapter", inputs / "run" / "adapter", "--output", folder / "out"],
    "forge": lambda inputs, folder: [
        "forge", "--model", inputs / "model", "--data", inputs / "rows.jsonl", "--cycles", 1,
        "--fraction", 0.25, "--output-dir", folder / "job", "--max-steps", 1, "--device", "cpu",
        "--max-length", 64, "--batch-size", 2, "--resume"],
    "eval --gates": lambda inputs, folder: [
        "eval", "--model", inputs / "model", "--data", inputs / "rows.jsonl", "--device", "cpu",
        "--gates", inputs / "gates.yaml", "--output-dir", folder / "verdict"],
    "generate --output": lambda inputs, folder: [
        "generate", "--model", inputs / "model", "--data", inputs / "rows.jsonl", "--device", "cpu",
        "--max-new-tokens", 2, "--output", folder / "answers.jsonl"],
    "sweep": lambda inputs, folder: [
        "sweep", inputs / "sweep.yaml", "--output-dir", folder / "sweep"],
    "pipeline": lambda inputs, folder: [
        "pipeline", inputs / "pipeline.yaml", "--output-dir", folder / "job"],
    "compare --plot": lambda inputs, folder: [
        "compare", inputs / "run", inputs / "other", "--plot", folder / "curves.png"],
    "plan": lambda inputs, folder: [
        "plan", "--model", inputs / "model", "--data", inputs / "rows.jsonl", *TRAIN],
    "init": lambda inputs, folder: [
        "init", "--model", inputs / "model", "--data", inputs / "rows.jsonl",
        "--output", folder / "config.yaml"],
    "import-config": lambda inputs, folder: [
        "import-config", inputs / "axolotl.yaml", "--program", "axolotl",
        "--output", folder / "config.yaml"],
    "data convert": _data("convert", "--output"),
    "data convert to Parquet": lambda inputs, folder: [
        "data", "convert", inputs / "rows.jsonl", "--output", folder / "rows.parquet"],
    "data split": _data("split", "--output-dir"),
    "data dedup": _data("dedup", "--output"),
    "data decontaminate": _with(("--against", "others.jsonl"))(_data("decontaminate", "--output")),
    "data mix": lambda inputs, folder: [
        "data", "mix", "--config", inputs / "mix.yaml", "--output", folder / "rows.jsonl",
        "--report", folder / "mix.json"],
    "data pairs": lambda inputs, folder: [
        "data", "pairs", "--docs", inputs / "docs", "--mode", "prose", "--all-pages",
        "--output", folder / "rows.jsonl"],
    "data extract": lambda inputs, folder: [
        "data", "extract", inputs / "code", "--output", folder / "rows.jsonl"],
    "data synth": lambda inputs, folder: [
        "data", "synth", "--templates", inputs / "templates.yaml",
        "--output", folder / "rows.jsonl"],
    "data tokenizer": lambda inputs, folder: [
        "data", "tokenizer", inputs / "rows.jsonl", "--output-dir", folder / "words",
        "--vocab-size", 300],
    "data docstrings": lambda inputs, folder: [
        "data", "docstrings", "--output-dir", folder / "rows"],
}  # fmt: skip


def write_inputs(folder: Path) -> Path:
    """A tiny model, rows, a run with its adapter, and the files of settings."""
    import engine

    folder.mkdir(parents=True)
    model = write_tiny_model(folder / "model")
    rows = [{"prompt": f"Word {n}?", "response": "yes it is. " * (n % 4 + 1)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine.train(
        model=str(model), data=str(folder / "rows.jsonl"), output_dir=folder / "run", max_steps=2,
        max_length=64, batch_size=2, method="lora", device="cpu", plot=False, console=False,
    )  # fmt: skip
    shutil.copytree(folder / "run", folder / "other")
    shutil.copytree(model, folder / "bytes")
    write_byte_tokenizer(folder / "bytes", 128)
    write_pairs(folder / "pairs.jsonl")
    (folder / "others.jsonl").write_text(json.dumps({"prompt": "a b c", "response": "d e f"}))
    (folder / "docs").mkdir()
    (folder / "docs" / "page.md").write_text(
        "---\ntitle: A page\n---\n\n# A page\n\n" + "Some words. " * 40
    )
    (folder / "code").mkdir()
    (folder / "code" / "one.py").write_text(
        'def double(number: int) -> int:\n    """Give back twice the number."""\n'
        "    return 2 * number\n"
    )
    (folder / "axolotl.yaml").write_text("base_model: m\nadapter: lora\nlora_r: 8\n")
    steps = {
        "model": str(model), "data": str(folder / "rows.jsonl"), "max_steps": 1, "plot": False,
        "max_length": 64, "batch_size": 2, "method": "lora", "device": "cpu", "heldout": 0.3,
    }  # fmt: skip
    sweep = {"output_dir": "unused", "with": steps, "parameters": {"learning_rate": [1e-4]}}
    (folder / "sweep.yaml").write_text(json.dumps(sweep))
    convert = {"data": str(folder / "rows.jsonl"), "output": "${out}/rows.jsonl"}
    (folder / "pipeline.yaml").write_text(
        json.dumps(
            {
                "output_dir": "unused",
                "stages": [{"name": "rows", "run": "data convert", "with": convert}],
            }
        )
    )
    (folder / "gates.yaml").write_text(
        "{checker: regex, pattern: '^', coverage: none, max_new_tokens: 2, answered_rows: 2}"
    )
    (folder / "mix.yaml").write_text(
        json.dumps({"sources": [{"path": str(folder / "rows.jsonl")}]})
    )
    (folder / "templates.yaml").write_text(
        "values: {a: [one, two]}\ntemplates: [{prompt: 'Say {a}', response: '{a}'}]\n"
    )
    return folder


def commands(inputs: Path) -> Iterator[Command]:
    """All of them, on the same inputs."""
    for name, line in LINES.items():
        yield Command(name, inputs, line)
