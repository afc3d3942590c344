"""What a cluster is made of: GPUs, the links between them, networks.

Rates are nominal, per direction: of a PCI Express slot of 16 lanes (PCI-SIG: 8, 16 and 32 GT/s a
lane), of a GPU's NVLink (NVIDIA's data sheets: 600 GB/s of an A100, 900 of an H100 or H200 and
1,800 of a B200, both directions together), of all network adapters of one machine together.
`REACHED` is the share of them that collectives are assumed to get, and latencies are assumed too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.config.choices import GPU_TFLOPS
from engine.errors import ConfigError

REACHED = 0.8
"""Share of a link's nominal rate that a collective of large tensors reaches."""

_GIGABIT = 10**9 / 8
_LINK_LATENCY, _NETWORK_LATENCY = 3e-6, 12e-6


@dataclass(frozen=True)
class Link:
    """A connection: bytes a second in each direction, and seconds until the first arrives."""

    name: str
    bytes_per_second: float
    latency: float

    @property
    def rate(self) -> float:
        """Bytes a second that a collective gets."""
        return REACHED * self.bytes_per_second


LINKS = {
    name: Link(name, gigabytes * 1e9, _LINK_LATENCY)
    for name, gigabytes in {
        "pcie3": 15.75,
        "pcie4": 31.5,
        "pcie5": 63.0,
        "nvlink3": 300.0,
        "nvlink4": 450.0,
        "nvlink5": 900.0,
    }.items()
}
"""Links within a machine by name."""
LINKS["nvlink"] = LINKS["nvlink4"]

_NETWORKS = {"ethernet10": 10, "ethernet25": 25, "ethernet100": 100, "infiniband": 400}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*gbit(?:/s)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs: `gpus` of `memory` bytes in each, which do `flops` a second."""

    gpus: int
    memory: int
    flops: float
    link: Link
    machines: int
    network: Link

    @property
    def size(self) -> int:
        """How many GPUs there are."""
        return self.gpus * self.machines

    def ring(self, whole: float, ranks: int | None = None) -> float:
        """Seconds in which every rank gets all of `whole` bytes, of which each has a part.

        So does the reverse, a sum of which each gets a part. Every GPU receives (N - 1) / N of it
        over its link, every machine (M - 1) / M over its network; a ring has N - 1 steps.
        """
        count = self.size if ranks is None else ranks
        machines = -(-count // self.gpus)
        if count == 1:
            return 0.0
        within = whole * (count - 1) / count / self.link.rate
        between = whole * (machines - 1) / machines / self.network.rate
        waits = (count - machines) * self.link.latency + (machines - 1) * self.network.latency
        return max(within, between) + waits

    def exchange(self, given: float, ranks: int) -> float:
        """Seconds in which every rank gives each other its part of `given` bytes."""
        machines = -(-ranks // self.gpus)
        if ranks == 1:
            return 0.0
        within = given * (ranks - 1) / ranks / self.link.rate
        outside = given * min(ranks, self.gpus) * (machines - 1) / machines / self.network.rate
        return max(within, outside) + (self.network if machines > 1 else self.link).latency * 2

    def told(self) -> str:
        """One line."""
        gib = self.memory / 2**30
        text = f"{self.gpus} GPUs of {gib:g} GiB, {self.link.name} between them"
        if self.machines == 1:
            return text
        return f"{self.machines} machines with {text}, {self.network.name} between machines"


def link_of(name: str) -> Link:
    """A link within a machine by its name. Raises `ConfigError`."""
    if name.lower() not in LINKS:
        raise ConfigError(f"--link is {name!r}; it should be one of {', '.join(LINKS)}.")
    return LINKS[name.lower()]


def network_of(name: str) -> Link:
    """A network by its name or its rate, such as 100Gbit. Raises `ConfigError`."""
    match = _RATE.fullmatch(name.strip())
    gigabits = float(match[1]) if match else _NETWORKS.get(name.lower())
    if not gigabits:
        raise ConfigError(
            f"--network is {name!r}; it should be the rate of a machine's adapters together, such "
            f"as 100Gbit, or one of {', '.join(_NETWORKS)}."
        )
    return Link(name, gigabits * _GIGABIT, _NETWORK_LATENCY)


def gpu_of_size(memory: int) -> str:
    """The name of a GPU of about this memory, whose rate is taken where none is named."""
    least = {"h200": 100, "a100": 38, "5090": 30, "4090": 0}
    name = next(name for name, gib in least.items() if memory >= gib * 2**30)
    assert name in GPU_TFLOPS
    return name
