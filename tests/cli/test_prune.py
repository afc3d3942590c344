"""`engine prune` from the command line: what it prints, writes and refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main

Golden = Callable[[str], Path]


def test_the_table_says_what_was_asked_and_done_in_every_layer(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(golden("qwen3")), "--output", str(out), "--fraction", "0.25"]
    assert main(["prune", *words, "--scope", "layer", "--metric", "random", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "heads", "asked", "pruned", "left", "kv", "left", "which"]
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["0", "4", "1", "1", "3"],
        ["1", "4", "1", "1", "3"],
    ]
    assert lines[3] == "Asked for 2 of 8 heads, pruned 2: 25.00 % (random, zero)."
    assert lines[4] == f"Pruned model saved to: {out}"
    assert (out / "pruning.json").exists() and (out / "head_importance.png").exists()


def test_a_report_as_json_is_one_object_and_writes_nothing(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(golden("llama")), "--fraction", "0.5", "--report-only", "--json"]
    assert main(["prune", *words, "--granularity", "kv-group", "--scope", "layer"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["units"] == {"before": 4, "asked": 2, "removed": 2}
    assert record["heads"]["removed"] == 4
    assert record["output"] is None
    assert not list(tmp_path.iterdir())


def test_layers_that_lose_most_of_their_heads_are_named(
    golden: Golden, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(golden("qwen2_moe")), "--fraction", "0.5", "--report-only"]
    words += ["--metric", "random", "--seed", "0"]  # takes 3 of layer 1's 4 heads
    for scope, named in (("global", True), ("layer", False)):
        assert main(["prune", *words, "--scope", scope]) == 0
        text = capsys.readouterr().out
        assert ("More than half of the heads of layer 1 go" in text) == named


def test_a_shortfall_that_is_allowed_is_told(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(golden("llama")), "--fraction", "0.9", "--report-only"]
    assert main(["prune", *words, "--min-heads", "2"]) == 2
    assert "asks for 7 heads" in capsys.readouterr().err
    assert main(["prune", *words, "--min-heads", "2", "--allow-shortfall"]) == 0
    assert "Fewer than asked by 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fraction", "0.5"], "--report-only"),
        (["--fraction", "1.5", "--report-only"], "between 0 and 1"),
        (["--fraction", "0.5", "--report-only", "--protect", "0,x"], "no list of layer numbers"),
        (["--fraction", "0.5", "--report-only", "--protect", "2"], "layers 0 to 1"),
        (["--fraction", "0.5", "--report-only", "--metric", "gradient"], "--data"),
        (["--fraction", "0.5", "--report-only", "--metric", "l3"], "l3"),
        (["--fraction", "0.5", "--report-only", "--per-layer"], "goes with --mode structural"),
    ],
)
def test_bad_options_are_told_in_one_paragraph(
    golden: Golden, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["prune", "--model", str(golden("llama")), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_cut_layer_by_layer_says_that_no_other_program_loads_it(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(golden("llama")), "--output", str(out), "--fraction", "0.25"]
    assert main(["prune", *words, "--mode", "structural", "--per-layer"]) == 0
    text = capsys.readouterr().out
    assert "Loads in this engine alone: config.json gives the number of heads" in text
    assert "this engine alone" in json.loads((out / "pruning.json").read_text())["loads_in"]
    assert main(["prune", "--help"]) == 0
    described = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Only this engine loads it." in described
