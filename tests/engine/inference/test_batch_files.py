"""`engine generate --data`: an answer to every row, in order, and again after a stop."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import engine
from cli import main as cli
from engine.config.tasks.inference import GenerateSettings
from engine.errors import CheckpointError, ConfigError, DataError
from engine.inference.batch_files import resume_after, settings_file
from engine.storage.lock import take
from engine.verbs.models.generate import answer_rows
from tests.support.small_runs import small_run

ROWS: list[Any] = [
    {"id": 1, "prompt": "Word?"},
    "plain text",
    {"messages": [{"role": "user", "content": "Who?"}], "z": [1], "a": None},
    *({"id": n, "prompt": "x" * n} for n in range(1, 12)),
]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(model: Path, tmp_path: Path, **options: Any) -> GenerateSettings:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    given: dict[str, Any] = {
        "model": model,
        "max_new_tokens": 9,
        "slots": 3,
        "temperature": 1.0,
        **options,
    }
    return GenerateSettings(data=data, output=tmp_path / "answers.jsonl", **given)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_in_order_with_their_keys(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model, tmp_path)
    counted: list[tuple[int, int]] = []
    assert answer_rows(settings, lambda done, rows: counted.append((done, rows))) == len(ROWS)
    assert counted[-1] == (len(ROWS), len(ROWS))
    lines = lines_of(tmp_path / "answers.jsonl")
    answers = ["response", "finish_reason", "completion_tokens"]
    assert [list(line) for line in lines] == [
        [*(row if isinstance(row, dict) else ["prompt"]), *answers] for row in ROWS
    ]
    assert lines[1]["prompt"] == "plain text"
    assert {line["finish_reason"] for line in lines} <= {"stop", "length"}
    assert len({line["response"] for line in lines}) > 5


@pytest.mark.parametrize("broken", [0, 1, 17])
def test_a_stopped_job_goes_on_with_the_same_answers(
    tiny_model: Path, tmp_path: Path, broken: int
) -> None:
    settings, output = settings_of(tiny_model, tmp_path), tmp_path / "answers.jsonl"
    answer_rows(settings)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:5]) + lines[5][:broken])
    assert answer_rows(settings) == len(ROWS) - 5
    assert output.read_bytes() == whole
    assert answer_rows(settings) == 0


def test_an_output_of_other_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    settings, output = settings_of(tiny_model, tmp_path), tmp_path / "answers.jsonl"
    for text in ('{"id": 2, "prompt": "Word?"}\n', "nonsense\n", "{}\n"):
        output.write_text(text)
        with pytest.raises(ConfigError, match=r"answers.jsonl:1 is not an answer to row 1"):
            answer_rows(settings)
        assert output.read_text() == text


def test_a_job_with_other_settings_does_not_go_on(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, output = settings_of(tiny_model, tmp_path), tmp_path / "answers.jsonl"
    answer_rows(settings)
    whole = output.read_bytes()
    for key, value in (("temperature", 0.25), ("seed", 8), ("system", "x"), ("num_samples", 2)):
        with pytest.raises(ConfigError, match=f"other settings: {key} was .* and is {value!r}"):
            answer_rows(settings.model_copy(update={key: value}))
    # How the machine does it changes no answer.
    assert answer_rows(settings.model_copy(update={"slots": 3, "cache_tokens": 512})) == 0
    assert output.read_bytes() == whole
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"rope_theta": 20000.0}))
    with pytest.raises(ConfigError, match="model digest was"):
        answer_rows(settings.model_copy(update={"model": str(other)}))
    settings_file(output).unlink()
    assert answer_rows(settings) == 0
    assert "nobody can tell" in caplog.text


def test_a_job_goes_on_only_with_the_adapter_tokenizer_and_template_it_began_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "run" / "adapter"
    small = small_run(tiny_model, tmp_path / "rows.jsonl", adapter.parent, max_steps=1)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    engine.train(small, console=False)
    kwargs = {"z": 1, "a": 2}
    settings = settings_of(tiny_model, tmp_path, adapter=str(adapter), chat_template_kwargs=kwargs)
    answer_rows(settings)

    def double(path: Path) -> None:
        weights = {name: 2 * tensor for name, tensor in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})

    def change(path: Path) -> None:
        path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))

    for path, act, told in (
        (adapter / "adapter_model.safetensors", double, "adapter digests"),
        (tiny_model / "tokenizer_config.json", change, "template digest"),
    ):
        before = path.read_bytes()
        act(path)
        with pytest.raises(ConfigError, match=f"other settings: .*{told} was"):
            answer_rows(settings)
        path.write_bytes(before)
    assert answer_rows(settings) == 0
    noted = json.loads(settings_file(tmp_path / "answers.jsonl").read_text())
    del noted["template digest"]  # an earlier version knew less
    settings_file(tmp_path / "answers.jsonl").write_text(json.dumps(noted))
    assert answer_rows(settings) == 0


def test_two_processes_do_not_write_to_one_output(tiny_model: Path, tmp_path: Path) -> None:
    settings, output = settings_of(tiny_model, tmp_path), tmp_path / "answers.jsonl"
    answer_rows(settings)
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])
    with output.open("a") as other:
        assert take(other.fileno())
        with pytest.raises(ConfigError, match=r"Another process is writing to .*answers.jsonl"):
            answer_rows(settings)
    answer_rows(settings)
    assert output.read_bytes() == whole


@pytest.mark.parametrize("odd", [{}, {"response": 5}, {"responses": ["a", None]}])
def test_a_line_without_an_answer_is_none(odd: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(json.dumps({"prompt": "p", **odd}) + "\n")
    with pytest.raises(ConfigError, match="jsonl:1 is not an answer to row 1"):
        resume_after(output, [{"prompt": "p"}])


def test_rows_without_a_prompt_are_named(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model, tmp_path)
    row: Any
    for row in ({"text": "x"}, {"prompt": 3}, {"messages": []}, 7):
        write_rows(tmp_path / "rows.jsonl", ["good", row])
        with pytest.raises(DataError, match=r"rows.jsonl:2:1: the row has no prompt"):
            answer_rows(settings)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        answer_rows(settings)


def test_samples_differ_and_come_again(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model, tmp_path, num_samples=4)
    answer_rows(settings)
    lines = lines_of(tmp_path / "answers.jsonl")
    assert all(len(line["responses"]) == 4 for line in lines)
    assert any(len(set(line["responses"])) > 1 for line in lines)
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "num_samples": 4}
    texts = engine.generate(tiny_model, prompts=["Word?", "plain text"], slots=2, **options)
    assert [one.text for one in texts] == [*lines[0]["responses"], *lines[1]["responses"]]


def test_the_command_line_says_what_it_did(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_rows(tmp_path / "r.jsonl", ROWS[:3]), tmp_path / "o.jsonl"
    words = ["generate", "--model", str(tiny_model), "--max-new-tokens", "3"]
    cli.main([*words, "--data", str(data), "--output", str(output), "--json"])
    assert json.loads(capsys.readouterr().out) == {"rows": 3, "output": str(output)}
    cli.main([*words, "--prompt", "Hi", "--num-samples", "2", "--temperature", "1"])
    assert capsys.readouterr().out.count("\n[2] ") == 1
    for wrong in (["--data", str(data)], ["--output", str(output)], []):
        assert cli.main([*words, *wrong]) == 2


def test_a_disk_without_room_is_named_and_other_faults_are_their_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails beside the writing, such as a closed pipe of the progress, is no disk's fault."""
    settings, output = settings_of(tiny_model, tmp_path), tmp_path / "answers.jsonl"

    def closed(done: int, rows: int) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(BrokenPipeError):
        answer_rows(settings, closed)
    assert len(lines_of(output)) == 1
    real, left = os.fsync, [3]

    def full(descriptor: int) -> None:
        left[0] -= os.fstat(descriptor).st_ino == output.stat().st_ino
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"ENOSPC.*are safe"):
            answer_rows(settings)
    answered = len(lines_of(output))
    assert answered == 1 + 3 + 1  # of the last the disk did not say that it has it
    assert answer_rows(settings) == len(ROWS) - answered
    assert len(lines_of(output)) == len(ROWS)
