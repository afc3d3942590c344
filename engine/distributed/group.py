"""Join the processes that torchrun started, and leave them again.

Whatever starts torchrun's environment starts this: `torchrun -m cli.main train ...`, `engine train
--gpus N`, or a scheduler that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A
process without them is alone, and torch.distributed is not imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from engine.config.numbers import is_count
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from kernels.runtime.ranks import ONE_RANK, Ranks

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
RESTARTS, MAX_RESTARTS = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
_TASKS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "--ntasks-per-node 1"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "--map-by ppr:1:node"),
    "PMI_SIZE": ("mpiexec", "-ppn 1"),
}
"""What launchers other than torchrun tell their tasks of their number."""
_CONNECTING, _TRIES = 15, 5
"""Seconds of one try to connect a few processes that are there, and how many tries."""


@dataclass(frozen=True)
class Group:
    """The processes that train together. `local_rank` counts those of this machine.

    A collective waits `timeout` seconds for the others.
    """

    ranks: Ranks = ONE_RANK
    local_rank: int = 0
    timeout: int = 1800

    @property
    def leads(self) -> bool:
        """Whether this process writes, logs and draws for all."""
        return self.ranks.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.ranks.size == 1


ALONE = Group()
"""A process that trains by itself."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of a group, even of one, that a launcher started."""
    return RANK in environment and WORLD_SIZE in environment


def leads(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its group, or alone, before the group is joined."""
    return not launched(environment) or _number(environment, RANK) == 0


def refuse_tasks_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` where another launcher started this command several times, not torchrun.

    Each process would take itself for the only one, and all would write to one directory.
    """
    if launched(environment):
        return
    for variable, (launcher, option) in _TASKS.items():
        count = environment.get(variable, "")
        if is_count(count) and int(count) > 1:
            raise ConfigError(
                f"{launcher} started this command {count} times ({variable}), and each would train "
                f"by itself. Start one task on each machine ({option}) with `--gpus N` on one "
                "machine, or `torchrun --nnodes M --nproc-per-node N --rdzv-backend c10d "
                "--rdzv-endpoint FIRST_HOST:29500 -m cli.main train ...` on several; "
                "docs/distributed.md has the lines."
            )


def processes_of(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> int:
    """How many processes train together, started by a launcher or by `config.gpus`."""
    size = _number(environment, WORLD_SIZE) if launched(environment) else 1
    return max(size, config.gpus)


def processes_here(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> int:
    """How many of them are on this machine, and share its memory."""
    if not launched(environment):
        return config.gpus
    return _number(environment, LOCAL_WORLD_SIZE, _number(environment, WORLD_SIZE))


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process again after one of its group had failed."""
    return environment.get(RESTARTS, "0") not in ("", "0")


def may_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun will start the group again after a failure."""
    return environment.get(MAX_RESTARTS, "0") not in ("", "0")


@contextmanager
def joined(device: str, timeout: int) -> Iterator[Group]:
    """The group of this process inside the block; alone where nothing started several.

    `device` is that of the settings; each process of a machine takes the GPU of its local number.
    `timeout` is how many seconds a collective waits for the others. Raises `ConfigError` where the
    group cannot be joined, a machine has fewer GPUs than processes, or `refuse_tasks_alone` does.
    """
    refuse_tasks_alone()
    size = _number(os.environ, WORLD_SIZE) if launched() else 1
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    from engine.distributed.torch_ranks import TorchRanks

    local = _number(os.environ, LOCAL_RANK, _number(os.environ, RANK))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _take_gpu(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        _meet(backend, timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The group of {size} processes could not be joined: {str(error)[:500]}. Rank "
            f"{os.environ[RANK]} expected the others at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR', '(not set)')}, MASTER_PORT "
            f"{os.environ.get('MASTER_PORT', '(not set)')}: check that all were started, with one "
            "address that all can reach, and that no firewall is between them."
        ) from error
    try:
        yield Group(TorchRanks(), local, timeout)
    except BaseException:
        # NCCL would wait here for collectives that the others never join; gloo does not.
        if not on_gpu:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(backend: str, timeout: int) -> None:
    """Make torch's default group once all processes are there.

    gloo may wait in silence for a connection that was lost on its way. So a try to connect is
    short, all begin it together, and what failed for one is tried again by all.
    """
    import torch
    import torch.distributed as dist

    c10d: Any = dist.distributed_c10d  # these names are not exported
    store, rank, size = next(iter(c10d.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    # torchrun's store outlives a restart: what an earlier start left in it must not be read.
    start = os.environ.get(RESTARTS, "0")
    for number in range(_TRIES):
        _wait_for_all(store, f"try-{start}-{number}", size, timeout)
        short = timedelta(seconds=min(timeout, _CONNECTING + size / 8))
        try:
            dist.init_process_group(
                backend,
                store=c10d.PrefixStore(f"group-{start}-{number}", store),
                rank=rank,
                world_size=size,
                timeout=short,
            )
            everybody = torch.ones((), device="cpu")
            dist.all_reduce(everybody)
            break
        except RuntimeError:
            if dist.is_initialized():
                dist.destroy_process_group()
            if number == _TRIES - 1:
                raise
    c10d._set_pg_timeout(timedelta(seconds=timeout))


def _wait_for_all(store: Any, key: str, size: int, timeout: int) -> None:
    """Wait until every process has come to this point. Raises `RuntimeError` where one does not."""
    end = time.monotonic() + timeout
    arrived = store.add(key, 1)
    while arrived < size:
        if time.monotonic() > end:
            raise RuntimeError(f"{size - arrived} of them did not start within {timeout} seconds")
        time.sleep(0.02)
        arrived = store.add(key, 0)


def _take_gpu(local: int) -> None:
    import torch

    count = torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"Process {local} of this machine has no GPU: there are {count}, and one process runs "
            "on each. Start as many as there are GPUs, or give --device cpu."
        )
    torch.cuda.set_device(local)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not is_count(text):
        raise ConfigError(
            f"The environment variable {name} is {text!r}; a launcher such as torchrun sets it to "
            "a number. Unset RANK and WORLD_SIZE to train with one process."
        )
    return int(text)


def after_restart(config: TrainConfig) -> TrainConfig:
    """`config` as a process goes on with it that torchrun may start again.

    Raises `ConfigError` where the directory would have another name the next time.
    """
    if may_restart() and config.output_dir is None and config.run_id is None:
        raise ConfigError(
            "torchrun will start the processes again after a failure, and the run's directory "
            "would then have another name, so that nothing could go on. Give --output-dir or "
            "--run-id."
        )
    if restarted() and config.resume is None:
        return config.model_copy(update={"resume": "auto", "overwrite": False})
    return config
