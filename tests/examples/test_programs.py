"""The programs in examples/ run from the first line to the last on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import demo, prune_and_recover, python_api, smollm2
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], str]:
    def write(name: str) -> str:
        path = tmp_path / name
        lines = ({"prompt": f"Word {n}?", "response": f"{'abc' * (n % 3 + 1)}"} for n in range(8))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def test_python_api_trains_answers_and_merges(
    tmp_path: Path, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    words = ["--model", str(model), "--data", rows("rows.jsonl"), "--output", str(output)]
    python_api.main([*words, "--steps", "2"])
    assert (output / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (output / "merged" / "config.json").is_file()
    assert "logits (1, 16, 128)" in capsys.readouterr().out


def test_prune_and_recover_writes_a_model_of_fewer_heads(
    tmp_path: Path, rows: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    data = ["--data", rows("rows.jsonl"), "--heldout", rows("heldout.jsonl")]
    words = ["--model", str(model), *data, "--output", str(output), "--fraction", "0.25"]
    prune_and_recover.main([*words, "--steps", "2"])
    assert (output / "recovered" / "pruning.json").is_file()
    out = capsys.readouterr().out
    assert "pruned 2 of 8 heads" in out
    assert "before" in out


def test_the_real_model_is_found_without_importing_its_package() -> None:
    assert smollm2.gguf_path().name == smollm2.FILE


def test_the_demonstration_picks_short_questions_about_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DATA", tmp_path)
    kinds = ("module", "function")
    lines = [
        {"prompt": f"What is f{n}?", "response": "Short.", "category": kinds[n % 2]}
        for n in range(demo.HELDOUT_ROWS + 10)
    ]
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    short, questions = demo.heldout(file)
    assert len(short.read_text().splitlines()) == demo.HELDOUT_ROWS
    assert [question.prompt for question in questions] == [
        "What is f1?",
        "What is f3?",
        "What is f5?",
    ]


def test_a_command_that_fails_fails_the_demonstration() -> None:
    with pytest.raises(demo.DemoFailed, match="ended with status 2"):
        demo.engine("no-such-verb")
