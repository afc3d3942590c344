"""The folder of a run: who may write to it, what is in it afterwards, also when the run fails."""

import json
import logging
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.sources import load_config
from engine.config.train_config import TrainConfig
from engine.device import resolve_device, resolve_dtype
from engine.errors import ConfigError, DataError
from engine.provenance import git_commit, version
from engine.runs.directory import RunDirectory
from engine.runs.logs import RunLog
from engine.runs.metrics import MetricsWriter, StepMetrics
from engine.runs.output import name_run
from engine.runs.signals import Interrupted
from engine.storage.lock import DirectoryLock, is_locked
from engine.verbs.training.status import describe_status, find_run, read_status


def config(folder: Path, **values: Any) -> TrainConfig:
    return TrainConfig(model="some/Model-1B", data="d.jsonl", output_dir=folder, **values)


@contextmanager
def begun(settings: TrainConfig, *, console: bool = False) -> Iterator[RunDirectory]:
    """A run directory in which the run has begun, as after the weights are loaded."""
    with RunDirectory(settings, console=console) as run:
        run.open()
        run.begin()
        yield run


def summary(folder: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return answer


def test_a_run_that_ends_well_leaves_all_its_files(tmp_path: Path) -> None:
    with begun(config(tmp_path / "run")) as run:
        logging.getLogger("engine.training.loop").debug("a fine detail")
        logging.getLogger("somebody.else").info("chatter")
        run.write_manifest(data_digest="abc", total_steps=9)
        run.write_summary("Success", output_path=run.adapter_path, metrics={"loss": 1.5})
    log = run.log_path.read_text()
    assert "a fine detail" in log
    assert "chatter" not in log
    assert load_config(run.path / "config.yaml") == run.config
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["data_digest"] == "abc"
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["engine"] == version()
    assert {"seed", "machine", "git_commit", "starts"} <= manifest.keys()
    answer = summary(run.path)
    assert answer["status"] == "Success"
    assert answer["output_path"] == str(run.adapter_path)
    assert answer["parameters"]["model"] == "some/Model-1B"
    assert answer["error_message"] is None
    assert answer["metrics"] == {"loss": 1.5}


def test_a_failure_is_summed_up_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError),
        begun(config(tmp_path)) as run,
    ):
        raise DataError("rows.jsonl:3 is broken")
    answer = summary(tmp_path)
    assert answer["status"] == "Failure"
    assert answer["error_message"] == "rows.jsonl:3 is broken"
    assert 'raise DataError("rows.jsonl:3 is broken")' in run.log_path.read_text()


def test_a_fault_of_the_program_names_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError) as caught,
        begun(config(tmp_path)) as run,
    ):
        raise ZeroDivisionError("by zero")
    assert str(run.log_path) in caught.value.__notes__[0]
    assert summary(tmp_path)["error_message"] == "ZeroDivisionError: by zero"


def test_a_stopped_run_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), begun(config(tmp_path)):
        raise Interrupted(15, "Stopped after step 3")
    assert summary(tmp_path)["status"] == "Failure"
    assert summary(tmp_path)["error_message"] == "Stopped after step 3"


def test_a_run_that_is_ended_while_it_loads_leaves_a_summary(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, begun(config(tmp_path)):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert summary(tmp_path)["error_message"] == "Stopped by SIGTERM."
    with pytest.raises(KeyboardInterrupt), begun(config(tmp_path)):
        signal.raise_signal(signal.SIGINT)
    assert summary(tmp_path)["error_message"] == "Stopped by SIGINT."
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_summary_that_was_written_is_not_replaced_by_a_later_failure(tmp_path: Path) -> None:
    def draw(run: RunDirectory) -> None:
        run.write_summary("Success")
        raise ValueError("while drawing the curve")

    with pytest.raises(ValueError), begun(config(tmp_path)) as run:
        draw(run)
    assert summary(tmp_path)["status"] == "Success"


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with begun(config(tmp_path)) as run:
        assert is_locked(tmp_path)
        with pytest.raises(ConfigError, match="is writing to"), begun(config(tmp_path)):
            pytest.fail("two writers")
        run.write_summary("Success")
    assert not is_locked(tmp_path)
    with begun(config(tmp_path)):
        assert is_locked(tmp_path)


def test_results_are_never_replaced_unasked(tmp_path: Path) -> None:
    with begun(config(tmp_path)) as run:
        run.checkpoints.save(3, {"a": {"b": torch.ones(2)}}, {})
        run.adapter_path.mkdir()
        run.write_summary("Success")
    refusal = r"adapter, checkpoint-3.*engine resume .*--overwrite"
    with pytest.raises(ConfigError, match=refusal), begun(config(tmp_path)):
        pytest.fail("an earlier run is replaced")
    assert summary(tmp_path)["status"] == "Success"
    with begun(config(tmp_path, resume="auto")) as run:
        answer = run.checkpoints.resume("auto")
        assert answer is not None
        assert answer.step == 3
    with begun(config(tmp_path, overwrite=True)) as run:
        assert run.checkpoints.steps() == []
        assert not run.adapter_path.exists()


def test_a_run_that_left_no_results_may_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError), begun(config(tmp_path)):
            raise DataError("no rows")


def test_the_starts_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    for choice in (None, "auto", "auto"):
        with begun(config(tmp_path, resume=choice)) as run:
            run.write_manifest()
    starts = json.loads((tmp_path / "manifest.json").read_text())["starts"]
    assert [start["resume"] for start in starts] == [None, "auto", "auto"]


@pytest.mark.parametrize("target", ["file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("in the way")
    refusal = r"cannot be written to.*--output-dir"
    with pytest.raises(ConfigError, match=refusal), begun(config(tmp_path / target)):
        pytest.fail("it was written to")


def test_a_run_is_named_after_its_time_and_model(tmp_path: Path) -> None:
    named = name_run(TrainConfig(model="org/My Model!", data="d"), now=0.0)
    assert named.run_id is not None
    assert named.run_id.endswith("-My-Model-")
    assert named.output_dir == Path("runs") / named.run_id
    assert name_run(config(tmp_path, run_id="mine")).run_id == "mine"


def test_logging_is_as_it_was_after_a_run(tmp_path: Path) -> None:
    root, own = logging.getLogger(), logging.getLogger("engine")
    before = (list(root.handlers), own.level)
    with begun(config(tmp_path), console=True):
        assert len(root.handlers) == len(before[0]) + 2
    assert (list(root.handlers), own.level) == before


def test_the_console_shows_messages_but_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(config(tmp_path), console=True):
        log = logging.getLogger("engine.verbs.training.train")
        log.debug("detail")
        log.info("news")
        try:
            raise ValueError("inner")
        except ValueError:
            log.warning("odd", exc_info=True)
    assert capsys.readouterr().err == "news\nwarning: odd\n"


def test_a_log_that_a_full_disk_refuses_ends_nothing(tmp_path: Path) -> None:
    """Not when it is written, nor when it is closed with the lines that it could not write."""
    lines, (soft, hard) = RunLog(None), resource.getrlimit(resource.RLIMIT_FSIZE)
    lines.open_file(tmp_path / "log")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        logging.getLogger("engine").info("%s", "x" * 300)
        lines.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log").stat().st_size == 100


def test_the_commit_is_that_of_the_checkout_or_unknown() -> None:
    answer = git_commit()
    assert answer is None or len(answer.rstrip("+")) == 40


@contextmanager
def a_run(folder: Path, steps: int = 4) -> Iterator[RunDirectory]:
    with begun(config(folder)) as run:
        run.write_manifest(total_steps=10)
        writer = MetricsWriter(run.metrics_path)
        for step in range(1, steps + 1):
            writer.write(
                StepMetrics(step, step / 10, 4.0 - step / 2, 1e-4, 0.5, 1234.0, 90, 2 << 30, 75.0)
            )
        writer.close()
        yield run


def test_the_status_of_a_run_that_is_alive(tmp_path: Path) -> None:
    with a_run(tmp_path):
        answer = read_status(tmp_path)
    assert (answer["state"], answer["alive"], answer["step"]) == ("running", True, 4)
    text = "\n".join(describe_status(answer))
    for part in ("4 of 10  (40%)", "2.0000", "1,234", "2.00 GiB", "1:15", "process"):
        assert part in text


def test_the_status_of_runs_that_ended(tmp_path: Path) -> None:
    with a_run(tmp_path / "died"):
        pass
    with a_run(tmp_path / "done") as run:
        run.write_summary("Success", output_path=run.adapter_path)
    with pytest.raises(DataError), a_run(tmp_path / "bad"):
        raise DataError("no rows")
    answer = {name: read_status(tmp_path / name, tail=3) for name in ("died", "done", "bad")}
    assert [status["state"] for status in answer.values()] == ["died", "finished", "failed"]
    assert not any(status["alive"] for status in answer.values())
    assert any("no rows" in text for text in describe_status(answer["bad"]))
    assert answer["bad"]["log"][-1] == "engine.errors.DataError: no rows"


def test_a_run_is_found_by_path_by_name_and_as_the_newest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with a_run(tmp_path / name):
            pass
    assert find_run(str(tmp_path / "one"), tmp_path) == tmp_path / "one"
    assert find_run("one", tmp_path) == tmp_path / "one"
    assert find_run("", tmp_path) == tmp_path / "two"
    for name, root in (("three", tmp_path), ("", tmp_path / "one")):
        with pytest.raises(ConfigError):
            find_run(name, root)


def test_a_lock_is_free_again_when_its_holder_lets_go(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with DirectoryLock(tmp_path) as lock:
        assert lock.locked
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    lock.release()


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=r"--device asks for cuda.*engine doctor"):
            resolve_device(name)
    monkeypatch.setenv("ENGINE_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="ENGINE_DEVICE asks for cuda"):
        resolve_device("auto")
    monkeypatch.setenv("ENGINE_DEVICE", "cpu")
    assert resolve_device("auto") == torch.device("cpu")


def test_a_gpu_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="2 GPUs"):
        resolve_device("cuda:2")


def test_the_compute_type_of_a_cpu_is_float32_unless_asked() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match="float16 does not work on a CPU"):
        resolve_dtype("float16", cpu)
