"""Settings of runs over several processes, and how they are started."""

from typing import Annotated

from engine.config.choices import Sharding
from engine.config.settings import Settings, setting
from engine.config.spelling import spelled


class DistributedSettings(Settings):
    """How many processes train together. None of these decides what a run learns."""

    gpus: int = setting(
        1,
        "Distributed",
        "processes on this machine that train together, one on each GPU (on a CPU they share its "
        "cores); the rows of a step are dealt to them. For several machines start torchrun",
        ge=1,
        le=1024,
    )
    shard: Annotated[Sharding, spelled({"false": "none", "base": "weights"})] = setting(
        "none",
        "Distributed",
        "weights: every process keeps a part of the weights, gathered a layer at a time, and with "
        "method full of their gradients and optimizer states",
    )
    context_parallel: int = setting(
        1,
        "Distributed",
        "processes that share the tokens of each batch, for long rows; divides their number",
        ge=1,
        le=1024,
    )
    expert_parallel: int = setting(
        1,
        "Distributed",
        "processes that divide the experts of a mixture, to which tokens are sent; divides their "
        "number and that of the experts",
        ge=1,
        le=1024,
    )
    max_restarts: int = setting(
        0,
        "Distributed",
        "with --gpus: how often to start again from the last checkpoint when a process dies",
        ge=0,
        le=1000,
    )
    ddp_timeout: int = setting(
        1800,
        "Distributed",
        "seconds that a process waits for the others before it gives up",
        ge=10,
        le=10**9,
    )
