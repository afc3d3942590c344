"""Report to TensorBoard and Weights & Biases, where asked for.

Neither is installed with the program. Asking for one that is missing is an error before anything
is loaded. A tracker that fails later (no network, a full disk) is reported once and left alone:
`metrics.jsonl` has everything, and training goes on.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from engine.errors import ConfigError

log = logging.getLogger(__name__)


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        for number, (prompt, answer) in enumerate(samples, start=1):
            # Tensorboard renders Markdown: an indented block is shown as it is.
            text = "\n".join(f"    {line}" for line in f"{prompt}\n\n{answer}".split("\n"))
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "engine"),
            name=run_id,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        import wandb

        table: Any = wandb.Table(columns=["prompt", "answer"], data=[list(s) for s in samples])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed, naming the extra."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"--report-to {name} needs the package {name}, which is not installed: "
                f"pip install 'engine-trainer[{name}]', or leave {name} out."
            )


class Trackers:
    """All trackers of a run; with no names it does nothing. Raises `ConfigError`.

    `first_step` is the first step to come: what a killed run reported from there on is dropped.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        run_id: str,
        config: Mapping[str, Any],
        first_step: int = 1,
    ) -> None:
        require_trackers(names)
        self._open: dict[str, _Tracker] = {}
        for name in names:
            try:
                if name == "tensorboard":
                    self._open[name] = _TensorBoard(folder / "tensorboard", first_step)
                else:
                    self._open[name] = _WandB(folder, run_id, config)
            except Exception as error:
                raise ConfigError(
                    f"--report-to {name}: it could not be started: {error}."
                ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the numbers among `values` (None and text are left out)."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._each(lambda tracker: tracker.log(step, numbers))

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Report prompts with their answers after a step."""
        self._each(lambda tracker: tracker.log_samples(step, samples))

    def _each(self, report: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                report(tracker)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Finish every tracker; a second call does nothing."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _drop(self, name: str, error: Exception) -> None:
        del self._open[name]
        log.warning("%s failed and is left out from here on: %s", name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
