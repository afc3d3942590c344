"""What `make demo` runs: a model learns Python's standard library.

Every step is a command that a user could type; each is printed before it runs. The model,
SmolLM2-135M-Instruct, answers questions about functions it is never trained on, before and after
some minutes of QLoRA on the docstrings of other functions. The demonstration fails, with status 1
and a reason, where a command fails or the held-out perplexity falls by less than 30 %.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.smollm2 import gguf_path

RUN = Path("runs/demo")
DATA = Path("runs/demo-data")
TRAINING = [
    *("--method", "qlora", "--lora-rank", "16", "--lora-alpha", "32", "--target-modules", "all"),
    *("--learning-rate", "1e-3", "--batch-size", "4", "--max-length", "256"),
    *("--max-steps", "80", "--checkpoint-every", "40", "--seed", "0"),
]
HELDOUT_ROWS = 64
QUESTIONS = 3
MINIMAL_FALL = 0.30

console = Console(highlight=False)


class DemoFailed(Exception):
    """The demonstration did not show what it should; the message says what."""


@dataclass(frozen=True)
class Question:
    prompt: str
    docstring: str


def engine(*words: str, capture: bool = False) -> str:
    """Run ``engine WORDS``; returns its standard output if ``capture``. Raises `DemoFailed`."""
    console.print(f"\n[bold green]$[/] [bold]engine {shlex.join(words)}[/]", soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoFailed(f"`engine {words[0]}` ended with status {done.returncode}")
    return done.stdout or ""


def last_json(output: str) -> dict[str, Any]:
    """The JSON object on the last line of a command's output."""
    value: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return value


def heldout(file: Path) -> tuple[Path, list[Question]]:
    """Cut the held-out rows to a number that is evaluated in seconds, and pick the questions."""
    lines = file.read_text().splitlines()[:HELDOUT_ROWS]
    if len(lines) < HELDOUT_ROWS:
        raise DemoFailed(f"{file} has {len(lines)} rows; {HELDOUT_ROWS} are needed")
    short = DATA / "heldout-short.jsonl"
    short.write_text("\n".join(lines) + "\n")
    rows = [json.loads(line) for line in lines]
    brief = [
        Question(row["prompt"], row["response"])
        for row in rows
        if row["category"] == "function" and len(row["response"]) < 200
    ]
    if len(brief) < QUESTIONS:
        raise DemoFailed(f"{file} has only {len(brief)} short rows about functions to ask for")
    return short, brief[:QUESTIONS]


def perplexity(model: str, data: Path, *options: str) -> float:
    output = engine("eval", "--model", model, "--data", str(data), *options, "--json", capture=True)
    value = float(last_json(output)["perplexity"])
    console.print(f"perplexity {value:.2f}")
    return value


def answers(model: str, questions: Sequence[Question], *options: str) -> list[str]:
    texts = []
    for question in questions:
        words = ("generate", "--model", model, "--prompt", question.prompt, *options)
        output = engine(*words, "--max-new-tokens", "64", "--json", capture=True)
        texts.append(str(last_json(output)["text"]).strip())
    return texts


def show_answers(questions: Sequence[Question], before: list[str], after: list[str]) -> None:
    for question, old, new in zip(questions, before, after, strict=True):
        table = Table(title=question.prompt, show_header=False, show_lines=True, expand=True)
        table.add_column(width=10)
        table.add_column(overflow="fold")
        # The texts are data: square brackets in them are no markup.
        for name, text in (("before", old), ("after", new), ("docstring", question.docstring)):
            table.add_row(name, text.replace("[", "\\["))
        console.print(table)


def run() -> None:
    began = time.perf_counter()
    model = os.path.relpath(gguf_path())
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.rmtree(DATA, ignore_errors=True)

    engine("data", "docstrings", "--output-dir", str(DATA))
    data, questions = heldout(DATA / "heldout.jsonl")
    limit = ("--max-length", "256")
    ppl_before = perplexity(model, data, *limit)
    before = answers(model, questions)

    train = time.perf_counter()
    words = ("--model", model, "--data", str(DATA / "train.jsonl"), "--output-dir", str(RUN))
    engine("train", *words, *TRAINING)
    train_seconds = time.perf_counter() - train

    adapter = RUN / "adapter"
    ppl_after = perplexity(model, data, "--adapter", str(adapter), *limit)
    after = answers(model, questions, "--adapter", str(adapter))

    console.rule("What was learnt")
    show_answers(questions, before, after)
    curve = RUN / "loss.png"
    fall = 1 - ppl_after / ppl_before
    table = Table(title="Summary", show_header=False)
    table.add_row("held-out perplexity before", f"{ppl_before:.2f}")
    table.add_row("held-out perplexity after", f"{ppl_after:.2f}  ({fall:.0%} lower)")
    table.add_row("adapter", str(adapter / "adapter_model.safetensors"))
    table.add_row("loss curve", str(curve))
    table.add_row("training", f"{train_seconds:.0f} s")
    table.add_row("everything", f"{time.perf_counter() - began:.0f} s on {os.cpu_count()} cores")
    console.print(table)

    if not (adapter / "adapter_model.safetensors").is_file():
        raise DemoFailed(f"{adapter} holds no adapter_model.safetensors")
    if not curve.is_file():
        raise DemoFailed(f"the loss curve {curve} was not drawn")
    if fall < MINIMAL_FALL:
        raise DemoFailed(
            f"held-out perplexity fell by {fall:.1%}, from {ppl_before:.2f} to {ppl_after:.2f}; "
            f"it should fall by at least {MINIMAL_FALL:.0%}"
        )


def main() -> int:
    try:
        run()
    except (DemoFailed, FileNotFoundError) as error:
        console.print(f"\n[bold red]The demonstration failed:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
