"""`import engine`: a function per verb, the settings of the command line, and quiet threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import engine
from cli import main as cli
from tests.support.source_tree import ROOT

VERBS = ("train", "evaluate", "generate", "merge", "prune", "forge", "plan")


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a command prints with --json."""
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    return answer


def test_every_verb_is_a_function_and_stays_one() -> None:
    for name in (*VERBS, *VERBS):
        assert isinstance(getattr(engine, name), FunctionType), name
    assert set(VERBS) <= set(engine.__all__) <= set(dir(engine))
    assert engine.generate_text is engine.generate


def test_python_and_command_line_give_the_same(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, model = str(write_rows(6)), str(tiny_model)
    said = answered(capsys, "eval", "--model", model, "--data", rows)
    assert engine.evaluate(model, rows).perplexity == pytest.approx(said["perplexity"], rel=1e-12)
    said = answered(capsys, "generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "5")
    assert engine.generate(model, "Hi", max_new_tokens=5).text == said["text"]
    said = answered(capsys, "prune", "--model", model, "--report-only", "--fraction", "0.25")
    assert engine.prune(model, None, fraction=0.25).record["chosen"] == said["chosen"]
    said = answered(capsys, "plan", "--model", "qwen3-0.6b", "--gpu", "4090")
    report = engine.plan(engine.TrainConfig(model="qwen3-0.6b", data="-"), "4090").as_dict()
    for name in ("total_bytes", "settings", "seconds_per_step"):
        assert json.loads(json.dumps(report[name])) == said[name], name


def test_a_job_of_pruning_is_one_call(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = str(write_rows(12))
    results = engine.forge(
        model=str(tiny_model), data=rows, output_dir=tmp_path / "job", fraction=0.25, max_steps=1,
        heldout=0.25, samples=1, max_length=64, seed=3,
    )  # fmt: skip
    assert results["cycles"][0]["train"]["steps"] == 1
    assert results["cycles"][0]["prune"]["fraction"] == 0.25
    assert results["cycles"][0]["trained"]["model"] == str(tmp_path / "job" / "cycle-1" / "model")


def test_wrong_settings_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(engine.ConfigError, match="fractoin"):
        engine.prune(tiny_model, tmp_path / "out", fractoin=0.1)
    with pytest.raises(engine.ConfigError, match="seed"):
        engine.prune(tiny_model, None, engine.PruneSettings(fraction=0.1), seed=1)
    with pytest.raises(engine.ConfigError, match="lora_rnk"):
        engine.forge(model="m", data="d", output_dir=tmp_path / "o", fraction=0.1, lora_rnk=3)
    with pytest.raises(engine.ConfigError, match="H900"):
        engine.plan(engine.TrainConfig(model="qwen3-0.6b", data="-"), "H900")


def python(code: str, **variables: str) -> str:
    """What a new Python prints."""
    present = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
        env=present | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip
    return done.stdout.strip()


POLICY = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize("way", ["import engine", "import cli.main", "import engine.errors"])
def test_threads_wait_quietly_whatever_is_imported_first(way: str) -> None:
    assert python(f"{way}; {POLICY}") == "PASSIVE"


def test_a_policy_that_is_set_stays() -> None:
    assert python(f"import engine; {POLICY}", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_who_imported_torch_first_is_told() -> None:
    code = """
        import sys, types
        sys.modules["torch"] = types.ModuleType("torch")  # as if torch were there already
        import engine
        from engine.runs.startup import spinning_advice
        print(spinning_advice())
    """
    code = "\n".join(line.strip() for line in code.strip().splitlines())
    assert "import engine first" in python(code)
    assert python("import engine.runs.startup as s; print(s.spinning_advice())") == "None"
