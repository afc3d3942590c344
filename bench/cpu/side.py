"""What both sides of a CPU step share: work, clock, memory."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1024 * 1024


@dataclass(frozen=True)
class Row:
    """One prompt/response pair: token ids, and the same ids with -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Work:
    """What a side has to do: the first ``warmup`` batches are trained on but not timed.

    ``flattened`` asks the peers for rows end to end instead of padded rows, ``policy`` names our
    level of gradient checkpointing and ``dtype`` our compute type.
    """

    gguf: str
    hf_directory: str
    rank: int
    alpha: int
    learning_rate: float
    warmup: int
    flattened: bool
    policy: str
    dtype: str
    batches: list[list[Row]]

    @classmethod
    def read(cls, path: Path) -> "Work":
        raw: dict[str, Any] = json.loads(path.read_text())
        batches = [[Row(**row) for row in batch] for batch in raw.pop("batches")]
        return cls(**raw, batches=batches)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Result:
    """What a side measured. ``peak_bytes`` is of the whole process, loading included.

    ``cpu_seconds`` is the processor's time, which other programs on the machine change less than
    the clock's.
    """

    tokens: int
    seconds: float
    cpu_seconds: float
    step_seconds: list[float]
    losses: list[float]
    loaded_peak_bytes: int
    peak_bytes: int
    trained_tensors: int
    versions: dict[str, str]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far (VmHWM of Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line: peak memory is measured on Linux only")


def measure(
    work: Work,
    step: Callable[[list[Row]], float],
    versions: dict[str, str],
    trained_tensors: int,
    result_file: Path,
) -> None:
    """Run ``step`` on every batch and write a `Result`. Counts real tokens: padding is none."""
    loaded_peak = peak_resident_bytes()
    losses, seconds, cpu_seconds = [], [], []
    for batch in work.batches:
        began, cpu_began = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    timed = work.batches[work.warmup :]
    result = Result(
        tokens=sum(len(row.input_ids) for batch in timed for row in batch),
        seconds=sum(seconds[work.warmup :]),
        cpu_seconds=sum(cpu_seconds[work.warmup :]),
        step_seconds=seconds,
        losses=losses,
        loaded_peak_bytes=loaded_peak,
        peak_bytes=peak_resident_bytes(),
        trained_tensors=trained_tensors,
        versions=versions,
    )
    result_file.write_text(json.dumps(asdict(result)))
