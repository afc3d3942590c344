"""engine plan --gpus 8x80GiB: how a run can use several GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.clusters.hardware import Cluster, gpu_of_size, link_of, network_of
from engine.clusters.ranking import Ranked, rank_arrangements
from engine.config.spelling import number_and_size, size_in_bytes
from engine.config.tasks.workflow import PlanSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, gib
from engine.memory.run_planner import compute_dtype
from engine.verbs.training.plan import find_target, rate_of

_ESTIMATE = (
    "Memory and bytes are those of a simulated rank, as a run counts them; seconds are an estimate "
    "from nominal rates and were never measured."
)


@dataclass(frozen=True)
class ClusterReport:
    """The arrangements of a run on a cluster, the fastest that fits first."""

    title: str
    cluster: Cluster
    ranked: list[Ranked]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for programs."""
        cluster = self.cluster
        return {
            "model": self.title,
            "gpus": cluster.size,
            "machines": cluster.machines,
            "gpu_bytes": cluster.memory,
            "flops_per_second": cluster.flops,
            "link": cluster.link.name,
            "network": cluster.network.name,
            "estimate": _ESTIMATE,
            "arrangements": [one.as_dict() for one in self.ranked],
        }

    def text(self) -> str:
        """What `engine plan` prints."""
        lines = [
            f"{self.title} on {self.cluster.told()}, each {self.cluster.flops / 1e12:g} TFLOP/s",
            _ESTIMATE,
        ]
        for one in self.ranked:
            lines += ["", one.arrangement.options, *_described(one)]
        if self.ranked[0].plan is None:
            lines += ["", "Nothing fits: shorter rows, fewer adapters or larger GPUs are needed."]
        return "\n".join(lines)


def _described(one: Ranked) -> list[str]:
    """The lines of an arrangement."""
    if one.plan is None or one.time is None:
        return [f"  does not fit: {one.why_not}"]
    settings = ", ".join(f"{name} {value}" for name, value in one.as_dict()["settings"].items())
    waits = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in one.time.exposed.items())
    sent = ", ".join(f"{kind} {gib(size)}" for kind, size in one.plan.sent.items())
    host = f", and {gib(one.plan.host)} of host memory" if one.plan.host else ""
    return [
        f"  {settings}",
        f"  memory of each GPU  {gib(one.plan.memory)}{host}",
        f"  sent by each a step {sent or 'nothing'}",
        f"  a step              {one.time.seconds:.3g} s: products {one.time.compute:.3g} s"
        + (f", waiting for {waits}" if waits else ""),
        f"  all together        {one.tokens_per_second:,.0f} tokens/s, "
        f"{100 * one.efficiency:.0f} % of {one.arrangement.size} times one GPU",
    ]


def plan_cluster(config: TrainConfig, options: PlanSettings) -> ClusterReport:
    """Compare the arrangements of a run. Raises `ConfigError` as `engine.verbs.training.plan`."""
    count, size = number_and_size(options.gpus)
    try:
        memory = size_in_bytes(size)
    except ValueError as error:
        raise ConfigError(f"--gpus {options.gpus}: the size of a GPU {error}.") from error
    if config.device == "cpu":
        raise ConfigError(
            f"--gpus {options.gpus} plans for GPUs, and --device is {config.device}. Leave "
            "--device out, or give --gpus a number alone for processes on a CPU."
        )
    target = find_target(config)
    flops = rate_of(options.gpu or gpu_of_size(memory))
    network, link = network_of(options.network), link_of(options.link)
    cluster = Cluster(count, memory, flops, link, options.machines, network)
    dtype = compute_dtype(config, True)
    ranked = rank_arrangements(target.model, config, cluster, dtype, target.stored)
    return ClusterReport(config.model, cluster, ranked)
