"""`engine doctor --distributed`: whether processes can train together."""

from __future__ import annotations

from engine.config.tasks.workflow import DoctorSettings
from engine.device import resolve_device
from engine.distributed.check_group import GroupReport, RankFacts, check_group
from engine.distributed.group import joined, launched
from engine.distributed.launch import Processes, run_group
from engine.errors import ConfigError


def examine_group(settings: DoctorSettings) -> GroupReport | None:
    """What the group of this process is, or one that is started here; None but on its first rank.

    Raises `ConfigError` where nothing started several processes and none are asked for.
    """
    if launched():
        with joined(settings.device, settings.ddp_timeout) as group:
            report = check_group(group, resolve_device(settings.device))
            return report if group.leads else None
    if settings.gpus == 1:
        raise ConfigError(
            "There is one process, which has nobody to train with. Start several: `engine doctor "
            "--distributed --gpus 2`, or `torchrun --nproc-per-node 2 -m cli.main doctor "
            "--distributed` on every machine, with torchrun's --nnodes and --rdzv-endpoint."
        )
    job = {"check": settings.model_dump(mode="json")}
    told = run_group("engine.verbs.worker", job, Processes(settings.gpus)).told
    if "error" in told:
        raise ConfigError(told["error"])
    return GroupReport(**{**told, "ranks": [RankFacts(**fact) for fact in told["ranks"]]})
