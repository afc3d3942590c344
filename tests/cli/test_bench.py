"""`engine bench` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cli.tools.bench import app
from engine.errors import ConfigError


def run(*arguments: str) -> Any:
    command = get_command(app)
    return command.main(args=list(arguments), prog_name="engine bench", standalone_mode=False)


def test_named_ops_are_printed_as_json_rows(capsys: pytest.CaptureFixture[str]) -> None:
    run("rms_norm", "rope", "--device", "cpu", "--tokens", "8", "--budget", "0", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in rows] == ["rms_norm", "rope"]
    for row in rows:
        assert {"device", "torch", "triton", "commit", "shape", "dtype"} <= set(row)
        assert row["model"] == "smollm2-135m"
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"]


def test_the_table_and_the_files_show_the_same_ops(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("swiglu", "--device", "cpu", "--tokens", "8", "--budget", "0", "--output", str(tmp_path))
    shown = capsys.readouterr().out
    assert "swiglu" in shown
    assert "Measured limits" in shown
    content = json.loads((tmp_path / "ops.json").read_text())
    assert [row["op"] for row in content["rows"]] == ["swiglu"]
    assert content["roofline"]["bandwidth"] > 0


def test_several_models_have_a_table_each(capsys: pytest.CaptureFixture[str]) -> None:
    models = ("smollm2-135m", "qwen3-0.6b")
    options = [word for name in models for word in ("--model", name)]
    run("rms_norm", "--device", "cpu", "--tokens", "8", "--budget", "0", *options)
    shown = capsys.readouterr().out
    assert all(f": {name}" in shown for name in models)
    assert shown.count("rms_norm") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rmsnorm"], "rms_norm"),
        (["--model", "llama-3.1-9b"], "llama-3.1-8b"),
        (["--against", "no.such.module"], "baselines"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*arguments, "--device", "cpu")
