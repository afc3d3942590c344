"""`engine bench` as a user calls it."""

import csv
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from bench import ops
from cli.tools.bench import app
from engine.config.tasks.workflow import BenchSettings
from engine.errors import ConfigError
from engine.verbs.bench import load_baselines
from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]


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
        (["--against", "no.such.module"], "cannot be imported.*baselines"),
        (["--against", "json"], "has no function"),
        (["--against", "no_such_file.py"], "there is no file"),
        (["--tokens", "64,none,-2"], "numbers from 1 on"),
        (["mixture"], "qwen3-30b-a3b"),
        (["--compare", "only_one"], "two results"),
        (["--compare", "no_such", "--compare", "results"], "engine bench --output"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*arguments, "--device", "cpu")


def test_a_real_models_directory_gives_the_shapes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    run("rms_norm", "--device", "cpu", "--tokens", "8", "--budget", "0", "--json",
        "--model", str(folder))  # fmt: skip
    (row,) = json.loads(capsys.readouterr().out)
    config = json.loads((folder / "config.json").read_text())
    assert row["shape"] == f"8x{config['hidden_size']}"
    assert row["model"] == str(folder)


def test_several_numbers_of_tokens_are_a_sweep_and_csv_has_a_line_for_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("rms_norm", "--device", "cpu", "--tokens", "8,16,32", "--budget", "0", "--csv")
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["shape"] for line in lines] == ["8x576", "16x576", "32x576"]
    for line in lines:
        assert float(line["seconds"]) > 0
        assert float(line["torch seconds"]) > 0
        tokens = int(line["shape"].split("x")[0])
        assert tokens * 576 * 4 <= int(line["memory_bytes"]) <= 3 * tokens * 576 * 4


def test_two_results_stand_side_by_side_and_none_is_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["rope", "--device", "cpu", "--tokens", "8", "--budget", "0"]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        run(*options, "--output", str(folder))
    first = (folders[0] / "ops.json").read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        run(*options, "--output", str(folders[0]))
    assert (folders[0] / "ops.json").read_bytes() == first
    assert (folders[0] / "ops.csv").read_text().startswith("op,model,shape,dtype,seconds")
    capsys.readouterr()
    run("--compare", *map(str, folders), "--json")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    times = [json.loads((f / "ops.json").read_text())["rows"][0]["seconds"] for f in folders]
    assert row["seconds"] == times
    assert row["ratio"] == pytest.approx(times[0] / times[1])
    run("--compare", str(folders[0] / "ops.json"), str(folders[1]))
    assert "A / B" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_told_once_and_a_file_can_be_compared_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def baselines(op, work):\n"
        "    def fails():\n"
        "        raise RuntimeError('needs a newer one')\n"
        "    return {'mine': fails}\n"
    )
    run("rms_norm", "rope", "--device", "cpu", "--tokens", "8", "--budget", "0",
        "--against", str(tmp_path / "mine.py"))  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not measured: mine, rms_norm, rope: RuntimeError: needs a newer one" in shown


def test_the_example_of_the_help_is_a_module_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "bench" in project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert "bench.peers" in str(BenchSettings.model_fields["against"].description)
    assert load_baselines("bench.peers") is not None


def test_the_ops_beside_peers_never_write_over_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[str] = []

    class Command:
        def main(self, args: list[str], prog_name: str) -> None:
            given.extend(args)

    monkeypatch.setattr(ops, "get_command", lambda app: Command())
    ops.main(["rope"])
    target = ROOT / given[given.index("--output") + 1]
    assert not target.resolve().is_relative_to(ROOT / "bench")
    assert not target.exists()
