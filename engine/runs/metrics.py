"""metrics.jsonl, time left, peak memory and the loss curve.

`metrics.jsonl` holds one JSON object per optimizer step. A line is handed to the operating system
whole, so a killed run leaves at most one torn line at the end. Going on from step S first drops
that line and every line after S: each step stands in the file once.
"""

import json
import logging
import math
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError
from engine.plots import new_figure, save_figure
from engine.storage.appended import AppendedLines
from engine.storage.safe_files import read_regular

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_LONGEST_FILE = 1 << 32


@dataclass
class StepMetrics:
    """One line of `metrics.jsonl`.

    `tokens_per_second` counts the step's real tokens (no padding) over its wall time,
    `trained_tokens` those that carry a label, in this step; `skipped` counts the run's steps so far
    whose update was left out because a value was not finite. What is not known is None; a float
    that is not finite is written as null, because JSON has no word for it.
    """

    step: int
    epoch: float
    loss: float | None
    lr: float
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    trained_tokens: int = 0
    peak_memory_bytes: int = 0
    eta_seconds: float | None = None
    skipped: int = 0
    seconds: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The line's keys and values; `extra` is merged into the others."""
        line = asdict(self)
        line |= line.pop("extra")
        return {key: _finite(value) for key, value in line.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter(AppendedLines):
    """Appends lines to `metrics.jsonl`, after cutting the file back to `resume_step`.

    `resume_step` 0 starts the file anew. Raises `CheckpointError` if it cannot be written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        lines = read_metrics(path) if resume_step > 0 else []
        earlier = [line for line in lines if line["step"] <= resume_step]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in earlier)
        super().__init__(path, text.encode())
        self.last_step = earlier[-1]["step"] if earlier else -1

    def write(self, metrics: StepMetrics) -> None:
        """Append one step. Raises `ValueError` for a step that stands in the file already."""
        if metrics.step <= self.last_step:
            raise ValueError(f"step {metrics.step} comes after step {self.last_step} was written")
        self.append(json.dumps(metrics.as_dict(), allow_nan=False) + "\n")
        self.last_step = metrics.step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` in order of steps, without a torn last line.

    A missing file has no lines. Raises `CheckpointError` for a damaged line before the last.
    """
    if not path.is_symlink() and not path.exists():
        return []
    rows = read_regular(path, _LONGEST_FILE).split(b"\n")
    lines: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row, parse_constant=_refuse) if row.strip() else None
            if line is None:
                continue
            step = line["step"]
            if not isinstance(step, int) or not 0 <= step < 1 << 62:
                raise TypeError("step is no integer")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(rows):
                break
            raise CheckpointError(
                f"{path}:{number} is not a line of metrics ({error}). Set the file aside and go on "
                "with --resume auto: only the history is lost."
            ) from None
        lines[step] = {key: _number_or_none(value) for key, value in line.items()}
    return [lines[step] for step in sorted(lines)]


def _number_or_none(value: Any) -> Any:
    fits = isinstance(value, int | float) and not abs(value) > sys.float_info.max
    return _finite(value) if fits else None


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


class Eta:
    """Seconds left, from the measured time per token and the tokens that are left.

    The first step of a process pays for warming up and is left out as soon as there is another, so
    nothing is promised before the second. The last `window` steps count, weighted by their tokens.
    Without a number of all tokens, the mean of the measured steps stands in for the steps to come.
    """

    def __init__(self, total_steps: int, total_tokens: int | None = None, window: int = 50) -> None:
        self.total_steps = total_steps
        self.total_tokens = total_tokens
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._measured = 0

    def update(
        self, step: int, tokens: int, seconds: float, tokens_done: int | None = None
    ) -> float | None:
        """Take in one step of `tokens` real tokens; return the seconds left, None if unknown.

        `tokens_done` counts the tokens of all steps so far, also of earlier processes.
        """
        self._measured += 1
        if self._measured == 2:
            self._recent.clear()
        self._recent.append((tokens, seconds))
        if self._measured < 2:
            return None
        all_tokens = sum(count for count, _ in self._recent)
        all_seconds = sum(time for _, time in self._recent)
        steps_left = max(0, self.total_steps - step)
        if all_tokens == 0:
            return all_seconds / len(self._recent) * steps_left
        if self.total_tokens is not None and tokens_done is not None:
            left = float(max(0, self.total_tokens - tokens_done))
        else:
            left = all_tokens / len(self._recent) * steps_left
        return all_seconds / all_tokens * left


def describe_seconds(seconds: float | None) -> str:
    """`0:07`, `3:07`, `2:03:07`, or `?` for what is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory_bytes(device: "torch.device | None" = None) -> int:
    """The most memory used so far: torch's allocator on a GPU, resident memory on a CPU."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        log.debug("no /proc/self/status on this system; asking getrusage")
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot_loss(run_directory: Path, heldout_before: float | None = None) -> Path | None:
    """Draw `loss.png` from the run's metrics; None, with a line in the log, if it cannot be.

    A run whose weights are saved does not fail for want of a picture.

    `heldout_before` is the held-out loss before the first step.
    """
    try:
        return _plot_loss(run_directory, heldout_before)
    except CheckpointError as error:
        log.warning("No loss curve; everything else is saved. %s", error)
        return None


def _plot_loss(run_directory: Path, heldout_before: float | None) -> Path | None:
    lines = read_metrics(run_directory / "metrics.jsonl")
    points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not points:
        log.info("No loss curve: %s holds no finite loss.", run_directory / "metrics.jsonl")
        return None
    figure = new_figure("loss curve", 8, 4.5)
    if figure is None:
        return None
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss per step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    heldout = [
        (line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None
    ]
    if heldout_before is not None:
        heldout.insert(0, (0, heldout_before))
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="tab:orange", label="held-out loss")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=run_directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    target = run_directory / "loss.png"
    save_figure(figure, target)
    log.info("Loss curve: %s", target)
    return target


def smoothed(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving mean, corrected for its start at zero."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(mean / weight)
    return means
