"""Answers to the same prompts while a run trains, in samples.jsonl."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ConfigError, DataError, EngineError
from engine.monitoring import records
from engine.verbs.training.train import dry_run
from tests.support.small_runs import small_run

Rows = Callable[..., Path]
PROMPTS: list[Any] = [
    "Word 1?",
    {"prompt": "Word 2?", "response": "abc2.", "step": 7},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go"}]},
]


@pytest.fixture
def sampled(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> Callable[..., Any]:
    """Settings of a run that answers prompts every second step."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def settings(name: str, **changes: Any) -> Any:
        given = {
            "sample_every": 2,
            "sample_prompts": prompts,
            "sample_max_new_tokens": 8,
            "sample_temperature": 0.8,
            "max_steps": 3,
        }
        return small_run(tiny_model, write_rows(5), tmp_path / name, **(given | changes))

    return settings


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_prompts_are_answered_at_the_start_in_between_and_at_the_end(
    sampled: Callable[..., Any], tiny_model: Path
) -> None:
    run = engine.train(sampled("run"), console=False).run_directory
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [0] * 3 + [2] * 3 + [3] * 3
    assert lines[1]["prompt"] == "Word 2?" and lines[1]["expected"] == "abc2."
    assert lines[2]["messages"] == PROMPTS[2]["messages"]
    # The last ones are those that the saved adapter gives, each prompt with a seed of its own.
    for number in (0, 1):
        again = engine.generate(
            tiny_model,
            lines[number]["prompt"],
            run / "adapter",
            quantize="nf4",
            max_new_tokens=8,
            temperature=0.8,
            seed=42 + number,
        )
        assert again.text == lines[6 + number]["response"]
        assert again.finish_reason == lines[6 + number]["finish_reason"]
    # The board shows them under their prompts, by step.
    (first, *_) = records.samples(run)
    assert [answer["label"] for answer in first["answers"]] == ["step 0", "step 2", "step 3"]


def test_sampling_changes_no_weight(sampled: Callable[..., Any], tiny_model: Path) -> None:
    with_samples = engine.train(sampled("run", lora_dropout=0.1), console=False).run_directory
    none = {"sample_every": 0, "sample_prompts": None}
    without = engine.train(sampled("plain", lora_dropout=0.1, **none), console=False).run_directory
    name = Path("adapter") / "adapter_model.safetensors"
    assert (with_samples / name).read_bytes() == (without / name).read_bytes()
    assert not (without / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, EngineError, "prompts"),
        ('{"question": 1}\n', DataError, "no prompt"),
        ("", DataError, "no rows"),
        ('"Fine."\n{"messages": [7]}\n', DataError, "2:1: one of its messages is '7'"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused_before_a_weight_is_read(
    sampled: Callable[..., Any],
    content: str | None,
    error: type[EngineError],
    words: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    for verb in (dry_run, lambda config: engine.train(config, console=False)):
        with pytest.raises((error, OSError), match=words if content is not None else "bad.jsonl"):
            verb(sampled("run", sample_prompts=path))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_file_of_samples_is_a_part_of_its_run(sampled: Callable[..., Any]) -> None:
    engine.train(sampled("run", max_steps=1), console=False)
    run = engine.train(sampled("run", max_steps=1, overwrite=True), console=False).run_directory
    assert len(lines_of(run)) == 6
    assert len(lines_of(run / "replaced")) == 6
    again = sampled("run", sample_prompts=run / "samples.jsonl", overwrite=True)
    with pytest.raises(ConfigError, match=r"sample-prompts .* is a part of the run"):
        engine.train(again, console=False)
