"""Mixes have the proportions of their recipe, counted row by row."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import main


def write(path: Path, count: int, **more: Any) -> Path:
    rows = [{"prompt": f"{path.stem} {n}", "response": "R", **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mix(folder: Path, recipe: dict[str, Any], *words: object, status: int = 0) -> list[str]:
    file = folder / "mix.yaml"
    file.write_text(yaml.safe_dump(recipe))
    output = folder / "mixed.jsonl"
    told = ["data", "mix", str(file), "--output", str(output), "--overwrite", *map(str, words)]
    assert main(told) == status
    if status:
        return []
    return [json.loads(line)["prompt"] for line in output.read_text().splitlines()]


def by_source(prompts: list[str]) -> dict[str, int]:
    return dict(Counter(prompt.split()[0] for prompt in prompts))


def test_rates_and_weights_decide_how_often_rows_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", 40) for name in "abc")
    recipe = {
        "sources": [
            {"path": str(a), "weight": 2.5},
            {"path": str(b), "rate": 0.25},
            {"path": str(c), "rate": 0.5, "weight": 2, "name": "third"},
            {"path": str(tmp_path / "absent.jsonl"), "optional": True},
        ],
        "seed": 3,
    }
    report = tmp_path / "report.json"
    prompts = mix(tmp_path, recipe, "--report", report)
    assert by_source(prompts) == {"a": 100, "b": 10, "c": 40}
    counts = Counter(prompts)
    assert (
        sorted(count for prompt, count in counts.items() if prompt[0] == "a") == [2] * 20 + [3] * 20
    )
    assert {count for prompt, count in counts.items() if prompt[0] == "c"} == {2}
    figures = json.loads(report.read_text())["figures"]
    assert figures["third"] == {"read": 40, "used": 20, "written": 40, "repeated": 20}
    assert "absent.jsonl" in figures["absent"]
    assert "absent and optional" in " ".join(capsys.readouterr().err.split())
    assert mix(tmp_path, recipe) == prompts != sorted(prompts)
    assert mix(tmp_path, {**recipe, "seed": 4}) != prompts
    # What is drawn of one source does not depend on the others.
    alone = mix(tmp_path, {"sources": [recipe["sources"][1]], "seed": 3})  # type: ignore[index]
    assert set(alone) == {prompt for prompt in prompts if prompt[0] == "b"}


def test_a_total_is_divided_by_weights(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", 10) for name in "abc")
    sources = [{"path": str(a), "weight": 3}, {"path": str(b)}, {"path": str(c), "weight": 2}]
    assert by_source(mix(tmp_path, {"sources": sources, "rows": 40})) == {"a": 20, "b": 7, "c": 13}


def test_a_recipe_that_cannot_be_followed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(write(tmp_path / "a.jsonl", 10))
    mix(tmp_path, {"sources": [{"path": a, "waight": 2}]}, status=2)
    assert "waight" in capsys.readouterr().err
    mix(tmp_path, {"sources": [{"path": str(tmp_path / "absent.jsonl")}]}, status=2)
    mix(tmp_path, {"sources": [{"path": a, "rate": 2}]}, status=2)
    optional = {"path": str(tmp_path / "absent.jsonl"), "optional": True}
    mix(tmp_path, {"sources": [a, optional]}, "--strict", status=2)
    assert by_source(mix(tmp_path, {"sources": [a, optional]})) == {"a": 10}
