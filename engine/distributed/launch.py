"""Start torchrun's agent on this machine, for `engine train --gpus N`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.distributed.group import refuse_tasks_alone
from engine.errors import GroupError

log = logging.getLogger(__name__)

_GRACE, _GRACE_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"
"""How long torchrun's agent waits for processes that were asked to stop, before it kills them. Its
own 30 seconds may be over before a long step and its checkpoint are."""


@dataclass(frozen=True)
class Processes:
    """How many processes to start on this machine, and how often again after a failure."""

    count: int
    max_restarts: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class GroupOutcome:
    """How a group ended: what its first process left, and the signal that stopped it, if any."""

    told: dict[str, Any]
    signal: int | None = None


def run_group(module: str, job: dict[str, Any], processes: Processes) -> GroupOutcome:
    """Run `python -m module FILE` in every process, FILE being `job` as JSON with `outcome`.

    The first process writes to the path `outcome` what it has to tell, as JSON. The agent is
    torchrun's: a process that dies ends the others, and all start again as often as they may.
    Raises `GroupError` where a process ended without having told why, and `ConfigError` where
    another launcher started several agents.
    """
    refuse_tasks_alone()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="engine-group-") as folder:
        path, outcome = Path(folder) / "job.json", Path(folder) / "outcome.json"
        path.write_text(json.dumps(job | {"outcome": str(outcome)}))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes.count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=processes.max_restarts,
            monitor_interval=0.2,
        )
        stopped: int | None = None
        failure: Any = None
        with _threads(processes), _default(_GRACE, _GRACE_SECONDS):
            try:
                elastic_launch(config, sys.executable)("-m", module, str(path))
            except SignalException as error:
                stopped = int(error.sigval)
            except ChildFailedError as error:
                _, failure = error.get_first_failure()
        told = _read(outcome)
    if stopped is None and failure is not None and not told:
        raise GroupError(_ended(failure, processes))
    return GroupOutcome(told, stopped)


def _read(outcome: Path) -> dict[str, Any]:
    try:
        told = json.loads(outcome.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _ended(failure: Any, processes: Processes) -> str:
    code = int(failure.exitcode)
    how = f"with status {code}" if code >= 0 else f"by {_signal_name(-code)}"
    more = " It may have run out of memory." if code == -signal.SIGKILL else ""
    tries = f" {processes.max_restarts} restarts did not help." if processes.max_restarts else ""
    return (
        f"Process {failure.local_rank} of {processes.count} ended {how}, and with it the others."
        f"{more}{tries} What it said stands above. The last checkpoint is whole: go on from it "
        "with --resume auto."
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _threads(processes: Processes) -> Iterator[None]:
    """Divide the cores among the processes, where nobody has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = processes.threads or max(1, (cores or 1) // processes.count)
    with _default("OMP_NUM_THREADS", str(each)):
        yield


@contextmanager
def _default(name: str, value: str) -> Iterator[None]:
    """An environment variable inside the block, where nobody has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
