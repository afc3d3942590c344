"""The command line: help without torch, one paragraph per mistake, and the right exit status."""

import errno
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from cli import main as cli
from engine.errors import DataError
from engine.runs.signals import Interrupted

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def engine(*words: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = ["-c", code] if code is not None else ["-m", "cli.main"]
    return subprocess.run(
        [sys.executable, *command, *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )


def complaint(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """What a command that has to fail says: one paragraph on the error stream."""
    assert cli.main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("engine: ")
    assert err.count("\n") == 1
    return err


def test_help_comes_in_half_a_second_and_names_every_verb() -> None:
    best, text = 9.0, ""
    for _ in range(5):
        started = time.perf_counter()
        done = engine("--help")
        best = min(best, time.perf_counter() - started)
        text = done.stdout
        assert done.returncode == 0
    assert best < 0.5
    for verb in cli.VERBS:
        assert f"\n  {verb} " in text


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["trian"],
        ["train", "--help"],
        ["train", "--epochs", "x"],
        ["status", "nowhere"],
    ],
)
def test_help_and_mistakes_need_no_torch(words: list[str]) -> None:
    code = (
        "import sys; from cli.main import main; status = main();"
        "print('torch' in sys.modules, status, file=sys.stderr)"
    )
    done = engine(*words, code=code)
    assert done.stderr.splitlines()[-1].startswith("False ")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_help_of_train_lists_every_setting_with_its_default(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.config.train_config import TrainConfig

    monkeypatch.setitem(ENVIRONMENT, "COLUMNS", columns)
    done = engine("train", "--help")
    assert done.returncode == 0
    names = {word for line in done.stdout.splitlines() for word in line.split()[:1]}
    assert {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields} <= names
    text = " ".join(done.stdout.split())
    for part in ("(default: 16)", "(default: 0.0002)", "qlora|lora|full", "cpu-demo", "--dry-run"):
        assert part in text


@pytest.mark.parametrize(
    "verb", ["eval", "generate", "merge", "prune", "forge", "status", "doctor"]
)
def test_every_verb_has_help(verb: str) -> None:
    done = engine(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("verb", "first"),
    [("train", "Model: --model Data: --data"), ("merge", "Model: --model --adapter"),
     ("eval", "Model: --model --adapter"), ("prune", "Model: --model Heads: --fraction")],
)  # fmt: skip
def test_help_begins_with_what_a_verb_is_about(verb: str, first: str) -> None:
    heads = [line.split()[0] for line in engine(verb, "--help").stdout.splitlines() if line.strip()]
    shown = [word for word in heads if word.startswith("--") or word.endswith(":")]
    wanted = first.split()
    # Of each group only as many options as are asked for.
    at = [shown.index(word) for word in wanted]
    assert at == sorted(at)
    for before, after in pairwise(wanted):
        if not after.endswith(":"):
            assert shown.index(after) == shown.index(before) + 1


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out == cli.help_text() + "\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["no verb 'trian'", "Did you mean `engine train`?"]),
        (["ask"], ["no verb 'ask'", "That is `engine generate` here."]),
        (["server"], ["no verb 'server'", "That is `engine serve` here."]),
        (["version"], ["That is `engine --version` here."]),
        (["quantise"], ["That is `engine quantize` here."]),
        (["--verison"], ["no option '--verison'", "Did you mean `engine --version`?"]),
        (["deepspeed"], ["no verb 'deepspeed'. Verbs: "]),
        (
            ["train", "--deepspeed", "z3.json"],
            ["no option --deepspeed: write `gpus:` or start"],
        ),
        (
            ["train", "deepspeed=z3.json"],
            ["no setting `deepspeed`; write `gpus:` or start"],
        ),
        (["train", "num_layers=3"], ["no setting `num_layers`; an adapter is put on every layer"]),
        (["train", "template=chatml"], ["comes from the model's own tokenizer files"]),
        (["--verbose"], ["no option '--verbose'"]),
        (["train", "--learning-rat", "1"], ["no option --learning-rat", "--learning-rate"]),
        (["train", "--micro-batch-size", "1"], ["Did you mean --batch-size?"]),
        (["train", "--lr", "1"], ["Did you mean --learning-rate?"]),
        (["train", "-m", "m"], ["no option -m. Did you mean --model?"]),
        (["train", "--batch", "4"], ["no option --batch. Did you mean --batch-size?"]),
        (["train", "batch=4"], ["did you mean `batch_size`"]),
        (["train", "--lora"], ["no option --lora: write `method: lora`"]),
        (
            ["train", "--method", "dora"],
            ["qlora, lora, full or scratch, and `use_dora` (--use-dora)"],
        ),
        (["generate", "-p", "hi"], ["Did you mean --prompt?"]),
        (["merge", "-o", "out"], ["Did you mean --output?"]),
        (["train", "--seed"], ["--seed", "needs a value"]),
        (["train", "stray"], ["'stray' is neither a configuration file"]),
        (["train", "a.yaml", "b.yaml"], ["'b.yaml' is neither"]),
        (["train", "no.yaml"], ["no.yaml cannot be read"]),
        (["train", "lora_rnk=3"], ["did you mean `lora_rank`"]),
        (["train", "--epochs", "many"], ["`model` is missing", "`epochs` = 'many' (--epochs)"]),
        (["train", "--preset", "huge"], ["no preset 'huge'", "qlora-8gb"]),
        (["eval", "--data", "d"], ["--model"]),
        (["eval", "--model", "m", "--dat", "d"], ["no option --dat", "--data"]),
        (["generate", "--model", "m", "--prompt", "p", "--top-p", "2"], ["--top-p"]),
        (["generate", "--model", "m", "--prompt", "p", "--quantize", "x"], ["nf4"]),
        (["status", "nowhere"], ["nowhere is no run"]),
    ],
)
def test_a_mistake_is_told_in_one_paragraph(
    capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    message = complaint(capsys, *words)
    for part in parts:
        assert part in message


def verb_that(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Put a verb `test` in place that calls `action`."""
    module = ModuleType("cli_test_verb")
    module.app = app = typer.Typer(add_completion=False)  # type: ignore[attr-defined]

    @app.command()
    def run() -> Any:
        return action()

    monkeypatch.setitem(sys.modules, "cli_test_verb", module)
    monkeypatch.setitem(cli.VERBS, "test", ("cli_test_verb", "only here"))


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "part"),
    [
        (DataError("rows.jsonl:3:1 is broken.\nMend it."), 2, "rows.jsonl:3:1 is broken. Mend it."),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "x.bin: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/r"), 2, "/r: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 2, "refused to open, read or write: Input"),
        (OSError("File or stream is not seekable."), 2, "not seekable. Outputs get their names"),
        (OSError(errno.EBADF, "Bad file descriptor"), 2, "(EBADF)"),
        (Interrupted(15, "Stopped after step 3."), 143, "Stopped after step 3."),
        (MemoryError(), 2, "The memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 2, "The memory is full"),
        (ZeroDivisionError("by zero"), 1, "failed with ZeroDivisionError: by zero"),
    ],
)
def test_each_kind_of_failure_has_its_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    part: str,
) -> None:
    verb_that(monkeypatch, raising(error))
    assert part in complaint(capsys, "test", status=status)


def test_an_interrupt_from_the_keyboard_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["test"]) == 130


def test_a_verb_chooses_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(monkeypatch, lambda: 3)
    assert cli.main(["test"]) == 3


def test_a_fault_leaves_its_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verb_that(monkeypatch, raising(ZeroDivisionError("by zero")))
    message = complaint(capsys, "test", status=1)
    (file,) = tmp_path.iterdir()
    assert str(file) in message
    assert "Traceback" in file.read_text()
    assert "Traceback" not in message


def test_a_fault_that_was_logged_names_that_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ZeroDivisionError("by zero")
    error.add_note("The traceback is in runs/x/pipeline.log.")
    verb_that(monkeypatch, raising(error))
    message = complaint(capsys, "test", status=1)
    assert message.endswith("by zero. The traceback is in runs/x/pipeline.log.\n")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["status", "--json"]])
def test_output_that_nobody_reads_is_no_failure(
    tmp_path: Path, words: list[str], buffered: str
) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.25}\n')
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": buffered},
        cwd=tmp_path,
    )
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_train_hands_over_what_it_was_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from engine.config.train_config import TrainConfig

    seen: list[TrainConfig] = []

    class Result:
        adapter_path = tmp_path / "adapter"
        status = "Success"
        next = ("engine eval",)
        pushed = None

    class Finetune:
        @staticmethod
        def train(config: TrainConfig) -> Result:
            seen.append(config)
            return Result()

        @staticmethod
        def dry_run(config: TrainConfig) -> str:
            return f"would train {config.model}"

    monkeypatch.setitem(sys.modules, "engine.verbs.training.train", Finetune)
    # Imported before, the module is an attribute of its package as well.
    monkeypatch.setattr("engine.verbs.training.train", Finetune, raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nseed: 1\npacking: true\n")
    words = ["train", str(file), "--seed", "2", "--no-packing", "--batch-size", "8", "--data", "a"]
    assert cli.main([*words, "--data", "b", "batch_size=3", "lora.rank=4"]) == 0
    (config,) = seen
    assert (config.seed, config.packing, config.batch_size) == (2, False, 3)
    assert (config.data, config.lora_rank) == (("a", "b"), 4)
    saved = f"Trained adapter saved to: {tmp_path / 'adapter'}"
    assert capsys.readouterr().out.splitlines() == [saved, "Next:", "  engine eval"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would train m\n"
    assert len(seen) == 1


def test_doctor_looks_at_everything_and_can_answer_in_json() -> None:
    done = engine("doctor", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"python", "torch", "triton", "memory", "disk", "kernels", "extra wandb"} <= set(checks)
    assert checks["kernels"]["status"] == "ok"
    assert checks["python"]["status"] == "ok"


def test_a_foreign_package_named_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from engine.verbs.doctor import examine

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = {check.name: check for check in examine()}["kernels"]
    assert answer.status == "problem"
    assert str(tmp_path) in answer.detail


def test_status_answers_for_a_run_in_words_and_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.25, "lr": 0.1}\n')
    (tmp_path / "manifest.json").write_text('{"total_steps": 20}')
    assert cli.main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "5 of 20  (25%)" in out
    assert "1.2500" in out
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["step"], answer["state"], answer["alive"]) == (5, "died", False)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("export", "--model", "m"), "Its commands: gguf, adapter"),
        (("data", "rows.jsonl"), "Its commands: "),
        (("train", "--fsdp", "full_shard"), "write `gpus:` or start torchrun"),
    ],
)
def test_what_stands_where_a_command_should_names_the_commands(
    words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(words)) == 2
    assert answer in capsys.readouterr().err
