"""What a run tells while it trains: metrics, trackers, progress, samples, callbacks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from engine.config.training.evaluation import EVAL
from engine.runs.directory import RunDirectory
from engine.runs.metrics import MetricsWriter, StepMetrics
from engine.runs.progress import ProgressReporter
from engine.runs.trackers import Trackers
from engine.training.evaluation.callbacks import CallbackList
from engine.training.evaluation.samples import SAMPLES, PromptAnswers, SampleWriter, as_texts
from engine.training.prepare import Prepared


class RunReports:
    """Everybody who is told of a step, an evaluation, samples or a checkpoint.

    What is opened is closed with `stack`. A run that goes on from step `start` has no lines after
    it; one that begins answers its prompts before the first step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        prepared: Prepared,
        answers: PromptAnswers | None,
        start: int,
        callbacks: CallbackList,
        stack: ExitStack,
    ) -> None:
        config = directory.config
        self.callbacks = callbacks
        self._metrics = MetricsWriter(directory.metrics_path, start)
        stack.callback(self._metrics.close)
        assert config.run_id is not None
        self._trackers = stack.enter_context(
            Trackers(
                config.report_to,
                directory.path,
                config.run_id,
                config.stored(),
                first_step=start + 1,
            )
        )
        self._samples: SampleWriter | None = None
        if answers is not None:
            self._samples = SampleWriter(directory.path / SAMPLES, answers, start)
            stack.callback(self._samples.close)
            if start == 0:
                self.sample(0)
        self._bar = stack.enter_context(
            ProgressReporter(
                prepared.total_steps, start, log_every=config.log_every, live=directory.console
            )
        )

    def step(self, line: StepMetrics) -> None:
        """Tell a step, and the evaluation after it."""
        self._metrics.write(line)
        told = line.as_dict()
        self._trackers.log(line.step, told)
        self._bar.update(line)
        evaluated = {name: value for name, value in line.extra.items() if name.startswith(EVAL)}
        if evaluated:
            self.callbacks.on_eval(line.step, evaluated)
        self.callbacks.on_step(line.step, told)

    def sample(self, step: int) -> None:
        """Answer the prompts with the weights after a step."""
        if self._samples is not None:
            self._trackers.log_samples(step, as_texts(self._samples.write(step)))

    def sync(self) -> None:
        """Bring everything to the disk that a checkpoint must not be ahead of."""
        self._metrics.sync()
        if self._samples is not None:
            self._samples.sync()

    def saved(self, step: int, path: Path) -> None:
        """Tell a checkpoint."""
        self.callbacks.on_save(step, path)


class NoReports:
    """The reports of a process whose run another one tells of.

    It answers prompts with the others where none of them has the whole model.
    """

    def __init__(self, answers: PromptAnswers | None = None, start: int = 0) -> None:
        self._answers = answers if answers is not None and answers.together else None
        if start == 0:
            self.sample(0)

    def step(self, line: StepMetrics) -> None:
        """Nobody is told."""

    def sample(self, step: int) -> None:
        """Answer the prompts for the process that writes them."""
        if self._answers is not None:
            self._answers(step)

    def sync(self) -> None:
        """Nothing was written."""

    def saved(self, step: int, path: Path) -> None:
        """Nobody is told."""
