"""A run's own figures: one line per step also over kills, an honest time left, what is shown."""

import io
import json
import logging
import os
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.runs.logs import RunLog
from engine.runs.metrics import (
    Eta,
    MetricsWriter,
    StepMetrics,
    describe_seconds,
    peak_memory_bytes,
    plot_loss,
    read_metrics,
)
from engine.runs.progress import ProgressReporter, QuietStream, describe_step, notebook_display
from engine.runs.trackers import Trackers, require_trackers
from engine.storage.lock import DirectoryLock


def line(step: int, loss: float | None = 1.0) -> StepMetrics:
    return StepMetrics(step=step, epoch=step / 10, loss=loss, lr=1e-4)


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_each_step_stands_in_the_file_once_after_going_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path)
    for step in range(1, 8):
        first.write(line(step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    second = MetricsWriter(path, resume_step=4)
    for step in range(5, 7):
        second.write(line(step))
    second.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("not even metrics\nmore\n")
    writer = MetricsWriter(path)
    writer.write(line(1))
    writer.close()
    assert steps(path) == [1]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(line(1))
    assert [one["step"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    writer.close()


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(line(3))
    with pytest.raises(ValueError, match="step 3"):
        writer.write(line(3))
    writer.close()


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(StepMetrics(1, 0.1, float("nan"), 1e-4, float("inf"), extra={"eval_loss": 2.5}))
    writer.close()
    (written,) = read_metrics(tmp_path / "metrics.jsonl")
    assert written["loss"] is None
    assert written["grad_norm"] is None
    assert written["eval_loss"] == 2.5
    assert "extra" not in written


def test_the_time_left_ignores_the_slow_first_step() -> None:
    eta = Eta(total_steps=10)
    assert eta.update(1, tokens=100, seconds=60.0) is None
    assert eta.update(2, tokens=100, seconds=1.0) == pytest.approx(8.0)
    assert eta.update(3, tokens=300, seconds=3.0) == pytest.approx(200 * 7 / 100)
    assert eta.update(10, tokens=100, seconds=1.0) == pytest.approx(0.0)


def test_the_time_left_follows_the_tokens_that_are_left() -> None:
    eta = Eta(total_steps=4, total_tokens=2000)
    eta.update(1, tokens=100, seconds=9.0, tokens_done=100)
    assert eta.update(2, tokens=400, seconds=2.0, tokens_done=500) == pytest.approx(7.5)


def test_the_time_left_after_going_on_counts_only_this_process() -> None:
    eta = Eta(total_steps=100)
    eta.update(51, tokens=10, seconds=5.0)
    assert eta.update(52, tokens=10, seconds=1.0) == pytest.approx(48.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.2, "0:00"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")],
)
def test_seconds_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert describe_seconds(seconds) == text


def test_peak_memory_is_at_least_what_is_held_now() -> None:
    ballast = torch.ones(4 << 20)
    now = psutil.Process().memory_info().rss
    assert now * 0.98 <= peak_memory_bytes(torch.device("cpu")) < psutil.virtual_memory().total
    del ballast


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 20):
        writer.write(line(step, 3.0 / step if step != 5 else float("nan")))
    writer.close()
    picture = plot_loss(tmp_path)
    assert picture == tmp_path / "loss.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_no_curve_without_matplotlib_or_without_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert plot_loss(tmp_path) is None
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(line(1))
    writer.close()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_loss(tmp_path) is None
    assert "engine-trainer[plot]" in caplog.text


def test_a_step_is_shown_in_words() -> None:
    shown = describe_step(
        StepMetrics(3, 0.1, 1.23456, 1e-4, None, 1234.5, 9, 3 << 30, 187.0, skipped=2)
    )
    assert shown == "loss 1.2346  1,234 tok/s  3.00 GiB  3:07 left  2 skipped"


def test_off_a_terminal_lines_come_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressReporter(25, start_step=0, log_every=10) as bar:
        for step in range(1, 26):
            bar.update(line(step))
    shown = [record.getMessage().split("  ")[0] for record in caplog.records]
    assert shown == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and breaks when told to."""

    broken = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError
        return super().write(text)


def test_a_terminal_gets_a_bar_and_may_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressReporter(3) as bar:
        bar.update(line(1, 2.5))
        assert bar._bar is not None
        bar._bar.refresh()
        assert "loss 2.5000" in terminal.getvalue()
        terminal.broken = True
        bar.update(line(2))
        bar._bar.refresh()


def test_a_closed_stream_takes_nothing_and_raises_nothing() -> None:
    terminal = Terminal()
    terminal.broken = True
    stream = QuietStream(terminal)
    assert stream.write("four") == 4
    assert stream.closed
    stream.write("x")
    stream.flush()


class FakeNotebook:
    """What IPython offers in a notebook, as far as a bar needs it."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.shown = 0
        self.broken = False

    def HTML(self, page: str) -> str:
        return page

    def display(self, page: str, display_id: bool) -> "FakeNotebook":
        self.shown += 1
        self.pages.append(page)
        return self

    def update(self, page: str) -> None:
        if self.broken:
            raise RuntimeError("the kernel has gone")
        self.pages.append(page)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> FakeNotebook:
    fake = FakeNotebook()
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return fake


def test_a_notebook_shows_one_bar_with_a_row_for_each_evaluation(notebook: FakeNotebook) -> None:
    with ProgressReporter(3) as bar:
        for step in (1, 2, 3):
            metrics = line(step)
            metrics.extra = {"eval_loss/category/<b>": 0.5 * step} if step != 2 else {}
            bar.update(metrics)
    assert notebook.shown == 1
    page = notebook.pages[-1]
    assert 'value="3" max="3"' in page and page.count("<tr>") == 3
    assert "1.5000" in page and "category/&lt;b&gt;" in page and "<b>" not in page


def test_a_notebook_that_goes_away_ends_the_bar_and_not_the_run(
    notebook: FakeNotebook, caplog: pytest.LogCaptureFixture
) -> None:
    with ProgressReporter(4) as bar:
        for step in (1, 2, 3, 4):
            notebook.broken = step > 1
            metrics = line(step)
            metrics.extra = {"eval_loss": 1.0}
            bar.update(metrics)
    assert caplog.text.count("the kernel has gone") == 1
    assert len(notebook.pages) == 1


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace()
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert notebook_display() is None


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine-trainer\[wandb\]"):
        require_trackers(["wandb"])


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    with Trackers(["tensorboard"], tmp_path, "run", {}) as trackers:
        trackers.log(1, line(1).as_dict())
        trackers.log_samples(1, [("what is asked", "what is answered")])
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
    assert b"train/grad_norm" not in file.read_bytes()
    for word in (b"samples/1", b"what is asked", b"what is answered"):
        assert word in file.read_bytes()


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, step: int, values: object) -> None:
            raise RuntimeError("no network")

        def log_samples(self, step: int, samples: object) -> None:
            raise AssertionError("asked after it was dropped")

        def close(self) -> None:
            raise AssertionError("closed after it was dropped")

    trackers = Trackers([], tmp_path, "run", {})
    trackers._open["broken"] = Broken()
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 1.0})
    trackers.log_samples(2, [("prompt", "answer")])
    trackers.close()
    assert caplog.text.count("no network") == 1


@pytest.mark.parametrize(
    "damage", [b'{"step": 1, "loss": NaN}', b"[" * 100_000, b"7", b'{"step": "x"}', b"\xff"]
)
def test_a_damaged_line_is_named_and_no_traceback(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + b'\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


def test_a_pipe_or_a_link_in_a_run_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="regular file"):
        read_metrics(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipeline.log")
    with pytest.raises(OSError):
        RunLog(None).open_file(tmp_path / "pipeline.log")
    (tmp_path / "other.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        RunLog(None).open_file(tmp_path / "other.log")
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        DirectoryLock(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == ""
