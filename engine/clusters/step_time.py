"""Estimate of a step on several GPUs; nothing here is measured.

A rank's time is that of its products, `flops / rate` (1 + the cost of its memory options), and of
what it sends and cannot hide. With C a pass's computation, a third of it forward, L layers, and
ring(V) the time in which all ranks get V bytes of which each has a part (`Cluster.ring`):

    data parallel    gradients: ring(P b) less the last pass's backward, 2/3 C, and at least the
                     last bucket's; parameters after the update: ring(P b), nothing hides it
    divided layers   a layer's gather hides behind the layer before it: L - 2 times
                     max(0, ring(layer) - C / 3 L) forward, max(0, ring(layer) - 2 C / 3 L) backward
    trained ones     as above, and in every pass's backward the sum of its gradients in fp32 too
    context          the exchanges of heads of every layer (`models.parallel.traffic`)
    experts          the exchanges of rows of every layer
    streamed weights a layer's bytes from the host, hidden as a gather is

A step also makes three sums of a few numbers. Rings take N - 1 steps of the links' latency: that,
and a network that all GPUs of a machine share, is where scaling ends. Sources: Rajbhandari et al.
2020 (ZeRO, arXiv 1910.02054), Jacobs et al. 2023 (Ulysses, arXiv 2309.14509), and for the time of
a ring Thakur et al. 2005 (Optimization of collective communication operations in MPICH).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.clusters.hardware import LINKS, Cluster
from engine.clusters.rank_plan import RankPlan
from engine.distributed.data_parallel import BUCKET_ELEMENTS
from models.config.model_config import ModelConfig
from models.parallel.token_slices import TokenSlices
from models.parallel.traffic import exchanged_heads, exchanged_rows

_FORWARD = 1 / 3
_HOST = LINKS["pcie4"].rate
"""What a GPU gets from its host's memory."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them."""

    compute: float
    exposed: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


def step_time(plan: RankPlan, model: ModelConfig, cluster: Cluster, itemsize: int) -> StepTime:
    """The time of a step of this rank, which has most to do."""
    compute = plan.flops / cluster.flops * (1.0 + plan.cost)
    exposed: dict[str, float] = {}
    _gradients(plan, cluster, compute, exposed)
    _layers(plan, model, cluster, compute, exposed, itemsize)
    _tokens(plan, model, cluster, exposed, itemsize)
    if plan.arrangement.size > 1:
        exposed["numbers"] = 6 * cluster.ring(64)
    return StepTime(compute, {name: s for name, s in exposed.items() if s > 0.0})


def _gradients(
    plan: RankPlan,
    cluster: Cluster,
    compute: float,
    exposed: dict[str, float],
) -> None:
    """Gradients of data parallelism and the parameters that owners moved."""
    size = plan.arrangement.size
    if size == 1 or plan.divides_trained:
        return
    behind = (1 - _FORWARD) * compute / max(1.0, plan.passes)
    last = cluster.ring(min(plan.sums, 4 * BUCKET_ELEMENTS))
    exposed["gradients"] = max(last, cluster.ring(plan.sums) - behind)
    exposed["parameters"] = cluster.ring(plan.sums)


def _layers(
    plan: RankPlan,
    model: ModelConfig,
    cluster: Cluster,
    compute: float,
    exposed: dict[str, float],
    itemsize: int,
) -> None:
    """Layers that are gathered from all ranks, or come from the host."""
    size, layers, passes = plan.arrangement.size, model.num_hidden_layers, plan.passes
    divided = plan.arrangement.weights and size > 1
    if not divided and not plan.streams:
        return
    share = plan.layer / size if divided else plan.layer
    one = max(cluster.ring(plan.layer) if divided else 0.0, share / _HOST if plan.streams else 0.0)
    forward = _FORWARD * compute / passes / layers
    backward = (1 - _FORWARD) * compute / passes / layers
    again = max(0, layers - 2)  # `gathered_layers` says why two stay
    sums = plan.layer * max(4, itemsize) // itemsize if plan.divides_trained else 0
    back = one + (cluster.ring(sums) if sums else 0.0)
    hidden = again * (max(0.0, one - forward) + max(0.0, back - backward))
    exposed["layers"] = passes * hidden + back


def _tokens(
    plan: RankPlan,
    model: ModelConfig,
    cluster: Cluster,
    exposed: dict[str, float],
    itemsize: int,
) -> None:
    """What ranks give each other of their tokens' hidden states, heads and rows of experts."""
    how, passes, tokens = plan.arrangement, plan.passes, plan.tokens
    if how.context > 1:
        slices = TokenSlices.of(tokens * how.context, 0, how.context)
        given = sum(
            exchanged_heads(model, layer, slices, plan.policy).bytes(itemsize)
            for layer in range(model.num_hidden_layers)
        )
        exposed["context"] = passes * cluster.exchange(given, how.context)
    if how.experts > 1:
        rows = exchanged_rows(model, tokens, tokens * model.num_experts_per_tok).bytes(itemsize)
        exposed["experts"] = passes * cluster.exchange(rows * model.num_hidden_layers, how.experts)
