"""Preference tuning of SmolLM2 on docstrings: right ones against other functions'.

Every pair asks for a function of the installed Python: the chosen answer is its docstring, the
rejected one another function's. The model is trained with `engine train --objective dpo` on 200
pairs and judged on 50 held-out ones, whose functions it never saw: how often the right docstring is
rewarded more, and how many words of its own answer are the right docstring's and the wrong one's.

Writes bench/results/preference_smollm2.{json,md}. Takes some ten minutes on 2 cores.

Run as ``python -m bench.preference_smollm2 [--output-dir runs/preference-smollm2]``.
"""

import argparse
import datetime
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from engine.config.train_config import TrainConfig
from engine.provenance import device_name, git_commit
from engine.storage import durable
from engine.verbs.models.generate import generate
from engine.verbs.training.train import train
from examples.smollm2 import gguf_path

RESULTS = Path(__file__).parent / "results"
TRAINED, HELDOUT, ANSWERED = 200, 50, 10
LONGEST = 120
"""Characters of the docstrings that are taken, so that no answer is cut."""


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of a function's docstring and another's, no function asked for twice."""
    from engine.data.docstrings import docstring_pairs

    asked: dict[str, str] = {}
    for row in docstring_pairs():
        prompt, answer = (message["content"] for message in row.messages[-2:])
        if len(answer) <= LONGEST:
            asked.setdefault(prompt, answer)
    items = list(asked.items())
    random.Random(seed).shuffle(items)
    return [
        {"prompt": prompt, "chosen": right, "rejected": items[(index + 1) % len(items)][1]}
        for index, (prompt, right) in enumerate(items[:count])
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as JSON Lines."""
    durable.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return {word.strip(".,:;()`'\"").lower() for word in text.split()} - {""}


def answers_prefer(model: str, adapter: Path | None, rows: list[dict[str, str]]) -> dict[str, Any]:
    """How many greedy answers have more words of the right docstring than of the wrong one."""
    prompts = [row["prompt"] for row in rows]
    results = generate(
        model, adapter=adapter, prompts=prompts, max_new_tokens=32, temperature=0.0, device="cpu"
    )
    shares = []
    for row, result in zip(rows, results, strict=True):
        own = words_of(result.text)
        right, wrong = (words_of(row[side]) for side in ("chosen", "rejected"))
        shares.append((len(own & right) / len(right), len(own & wrong) / len(wrong)))
    return {
        "answers": len(shares),
        "answers_nearer_to_the_right": sum(right > wrong for right, wrong in shares),
        "words_of_the_right": sum(right for right, _ in shares) / len(shares),
        "words_of_the_wrong": sum(wrong for _, wrong in shares) / len(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.preference_smollm2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/preference-smollm2"))
    options = parser.parse_args()
    root: Path = options.output_dir
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    rows = preference_rows(TRAINED + HELDOUT)
    trained = write_rows(root / "train.jsonl", rows[:TRAINED])
    heldout = write_rows(root / "heldout.jsonl", rows[TRAINED:])
    result = train(
        TrainConfig(
            model=str(gguf_path()),
            data=[str(trained)],
            eval_data=[str(heldout)],
            output_dir=root / "run",
            objective="dpo",
            share_prompt=True,
            method="qlora",
            batch_size=4,
            epochs=1,
            learning_rate=2e-4,
            max_length=256,
            threads=2,
            eval_every=0,
            device="cpu",
            plot=False,
            reference_cache="none",
        )
    )
    model, metrics = str(gguf_path()), result.metrics
    assert result.adapter_path is not None
    told = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "pairs": TRAINED,
        "heldout_pairs": HELDOUT,
        "train_seconds": metrics["train_seconds"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "accuracy": metrics["heldout_rewards/accuracies"],
        "margin": metrics["heldout_rewards/margins"],
        "loss_before": metrics["heldout_loss_before"],
        "loss": metrics["heldout_loss"],
        "before": answers_prefer(model, None, rows[TRAINED:][:ANSWERED]),
        "after": answers_prefer(model, result.adapter_path, rows[TRAINED:][:ANSWERED]),
    }
    durable.write_json(RESULTS / "preference_smollm2.json", told)
    durable.write_text(RESULTS / "preference_smollm2.md", as_markdown(told))
    print(as_markdown(told))


def as_markdown(told: dict[str, Any]) -> str:
    """The figures as a page."""
    before, after = told["before"], told["after"]
    return f"""# Preference tuning of SmolLM2-135M-Instruct

`python -m bench.preference_smollm2`, {told["time"][:10]}, {told["cpu"]}: {told["pairs"]} pairs of \
docstrings, one epoch of `--objective dpo --share-prompt --method qlora` in \
{told["train_seconds"]:.0f} s, peak {told["peak_memory_bytes"] / 2**30:.2f} GiB.

| on {told["heldout_pairs"]} held-out pairs | before | after |
|---|---|---|
| reward accuracy | none | {told["accuracy"]:.2f} |
| reward margin | 0 | {told["margin"]:.2f} |
| loss | {told["loss_before"]:.3f} | {told["loss"]:.3f} |

| greedy answers to {after["answers"]} held-out prompts | before | after |
|---|---|---|
| have more words of the right docstring than of the wrong one | \
{before["answers_nearer_to_the_right"]} | {after["answers_nearer_to_the_right"]} |
| share of the right docstring's words | {before["words_of_the_right"]:.3f} | \
{after["words_of_the_right"]:.3f} |
| share of the wrong docstring's words | {before["words_of_the_wrong"]:.3f} | \
{after["words_of_the_wrong"]:.3f} |
"""


if __name__ == "__main__":
    main()
