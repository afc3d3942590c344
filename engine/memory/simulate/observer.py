"""Tell a memory meter what a training step is doing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from engine.distributed.data_parallel import DataParallel, JoinedParallel
from engine.memory.simulate.meter import MemoryMeter
from engine.training.step import StepRanks
from kernels.runtime.scratch import ScratchObserver, observe_scratch, pool, use_pool
from models.decoder import Decoder
from models.layers.linear import Embedding
from models.layers.observer import LayerObserver, observe_layers
from models.memory.lasting import lasting_matrices
from models.memory.offload import quantized_weights, tensors_of
from models.memory.sharded_parameters import ShardedParameters
from models.memory.sharded_weights import ShardedWeights
from optim.interface import OptimizerObserver, observe_optimizer


def track_model(meter: MemoryMeter, model: Decoder) -> None:
    """Count what a model holds, by owner."""
    for name, parameter in model.named_parameters():
        meter.track(_owner_of(name), [parameter])
        if parameter.grad is not None:
            meter.track("gradients", [parameter.grad])
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            weight = module.weight
            meter.track(
                "embeddings", [weight] if isinstance(weight, Tensor) else tensors_of(weight)
            )
        for weight in quantized_weights(module).values():
            meter.track("head" if name == "lm_head" else "NF4 base", tensors_of(weight))
    meter.track("decoded base", lasting_matrices(model))
    if isinstance(model.weight_stream, ShardedWeights | ShardedParameters):
        meter.track("divided layers", model.weight_stream.tensors())


def track_parallel(meter: MemoryMeter, parallel: StepRanks | None) -> None:
    """Count what of several ranks each has in buckets: trained weights and gradients."""
    sets = parallel.sets if isinstance(parallel, JoinedParallel) else (parallel,)
    for one in sets:
        for bucket in one.buckets if isinstance(one, DataParallel) else ():
            meter.track("trained weights", [bucket.values])
            meter.track("gradients", bucket.gradients)


def _owner_of(name: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf.startswith("lora"):
        return "adapters"
    if name.startswith("lm_head"):
        return "head"
    if "embed_tokens" in name:
        return "embeddings"
    return "norms and biases" if leaf == "bias" or "norm" in name else "dense base"


def _scratch_owner(purpose: str) -> str:
    return "loss chunk" if purpose == "logits" else "scratch"


class _StepObserver(LayerObserver, OptimizerObserver, ScratchObserver):
    """Divides a step into segments of a meter, and its memory among owners."""

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter, self._work = meter, meter.owner

    def forward_begins(self, layer: int) -> None:
        """What is made from here on is the layer's working set."""
        self._meter.owner = self._work
        self._meter.begin("forward", layer)

    def forward_ends(self, layer: int) -> None:
        """What is left of the working set is saved for backward; the loss may be next."""
        self._meter.hand_over(self._work, "saved activations")
        self._meter.owner = "loss"
        self._meter.begin("loss")

    def backward_begins(self, layer: int) -> None:
        """What is made from here on is the layer's working set."""
        self._meter.owner = self._work
        self._meter.begin("backward", layer)

    def backward_ends(self, layer: int, gradients: Iterable[Tensor]) -> None:
        """Gradients of the layer's parameters outlive its working set."""
        self._meter.track("gradients", gradients)
        self._meter.begin("between layers", layer)

    def weights_arrive(self, weights: Iterable[Any]) -> None:
        """Streamed weights belong to the base."""
        for weight in weights:
            self._meter.track("NF4 base", tensors_of(weight))

    def building_state(self) -> AbstractContextManager[None]:
        """The optimizer's state is its own."""
        return self._meter.owned_by("optimiser")

    def step_begins(self, gradients: Sequence[Tensor], whole: bool) -> None:
        """A step of all parameters is a segment; steps in backward belong to its segments."""
        self._meter.track("gradients", gradients)
        if whole:
            self._meter.begin("update")

    def step_ends(self, whole: bool) -> None:
        """What is left lasts until the next step."""
        if whole:
            self._meter.begin("between steps")

    def allocating(self, purpose: str) -> AbstractContextManager[None]:
        """A buffer is counted as scratch, or as the loss's chunk where it holds logits."""
        return self._meter.owned_by(_scratch_owner(purpose))


@contextmanager
def observed(meter: MemoryMeter, *, fresh_scratch: bool = False) -> Iterator[None]:
    """While entered, the training steps of this thread tell the meter where they are.

    With `fresh_scratch` they begin without scratch buffers; those of the process stay as they are.
    """
    observer, buffers = _StepObserver(meter), {} if fresh_scratch else pool()
    for key in buffers:
        meter.track(_scratch_owner(key[0]), [buffers[key]])
    with (
        observe_layers(observer),
        observe_optimizer(observer),
        observe_scratch(observer),
        use_pool(buffers),
    ):
        yield
