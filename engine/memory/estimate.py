"""Plan the memory of a run before anything is allocated.

`plan` simulates a step of the run's own code (`engine.memory.simulate.step`). Of a model of many
equal layers a few are simulated: the bytes of every segment of a step are linear in the number of
layers, so two shallow models give the deep one (a test compares them with the whole).
What lies outside torch's allocator on a GPU cannot be counted without one; it is added as the
constants below, and said so. On a CPU the process itself and holes of the C library's
allocator are added (`engine.memory.process`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from engine.config.train_config import TrainConfig
from engine.distributed.group import processes_of
from engine.memory.process import PROCESS
from engine.memory.simulate.answers import planned_batch
from engine.memory.simulate.depth import step_of_layers
from engine.memory.simulate.meter import Peak
from engine.memory.simulate.rank_memory import RankMemory, rank_memory
from engine.memory.simulate.rank_rows import LargestPass, largest_pass
from engine.memory.simulate.ranks import Measure, candidates, divides_trained
from engine.memory.simulate.step import SimulatedStep, simulate_step
from engine.training.adapters.starts import start_bytes
from kernels.runtime.device import architecture as device_architecture
from kernels.runtime.host_memory import cached_bytes
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch

CUDA_CONTEXT = 480 * 2**20
"""Bytes that a CUDA process holds outside torch's allocator: context, kernels, libraries. A reserve
that is assumed; it is between 300 and 600 MiB on the GPUs and drivers in use."""

_CUBLAS_HANDLES = 2
"""The thread that runs forward has one, and so has autograd's, which runs backward."""

_CUBLAS_HOPPER, _CUBLAS_EARLIER = 32 * 2**20, 8 * 2**20 + 2**17
"""Workspace that torch gives a handle, from compute capability 9.0 on and before."""

FRAGMENTATION = 0.05
"""Share of what comes and goes in a step that an allocator is assumed to lose to holes."""

_HEAP, _HEAP_SHARE = 120 * 2**20, 5
"""What a CPU's heap loses besides, at most a fifth of the tensors: it hardly depends on them."""

_SMALL_BLOCK, _SMALL_SEGMENT, _SEGMENT = 2**20, 2 * 2**20, 20 * 2**20
"""torch's CUDA allocator takes memory in segments, of another size for blocks over 1 MiB."""

_OF_A_PASS = (
    "gradient_checkpointing",
    "batch_size",
    "accumulate",
    "max_length",
    "keep_decoded",
    "offload",
    "mlp_tile_tokens",
    "loss_chunk_tokens",
    "low_memory_decode",
)
"""Settings that a rank's trained parameters do not depend on."""

_PASSING = ("saved activations", "block working set", "loss", "gradients")


@dataclass(frozen=True)
class Workload:
    """The documents of the micro-batches of one step, by their lengths; all tokens are trained.

    The step has `passes` such micro-batches in all, by default as many as it accumulates.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    passes: float | None = None

    @property
    def tokens(self) -> int:
        return sum(sum(lengths) for lengths in self.micro_batches)

    def times(self, config: TrainConfig) -> float:
        """How often the step has these micro-batches."""
        return (self.passes or config.accumulate) / len(self.micro_batches)


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes by owner, and the operations of one step (all its micro-batches).

    `reserve` names what is added to the tensors' bytes. `host` is what a GPU offloads to the host's
    memory, `batch_host` what the batches of this step and the next take there beside a GPU, and
    `tied` says that the head is the embedding. Of several processes one gives `sent` bytes to each
    kind of collective in a step.
    """

    config: TrainConfig
    gpu: bool
    dtype: torch.dtype
    load: Peak
    step: Peak
    save: Peak
    save_host: int
    trainable: int
    tokens: int
    flops: float
    reserve: dict[str, int] = field(default_factory=dict)
    host: int = 0
    batch_host: int = 0
    layers: int = 0
    tied: bool = False
    sent: Mapping[str, int] = field(default_factory=dict)

    @property
    def allocated(self) -> int:
        """The most bytes that tensors hold at once."""
        return max(self.load.bytes, self.step.bytes, self.save.bytes)

    @property
    def total(self) -> int:
        """What a budget must hold."""
        return self.allocated + sum(self.reserve.values())

    def seconds(self, flops_per_second: float) -> float:
        """Time of one step at a GPU's real rate of matrix products."""
        return self.flops / flops_per_second


def cublas_workspace(deterministic: bool = False, architecture: int | None = None) -> int:
    """Bytes of both threads' cuBLAS workspaces, which torch's allocator holds.

    Of a GPU of this `architecture` (capability as major * 10 + minor), by default the one that is
    here, else one with the largest. A `deterministic` run asks for 32 MiB on every GPU.
    """
    if architecture is None and torch.cuda.is_available():
        architecture = device_architecture(torch.device("cuda"))
    large = architecture is None or architecture >= 90 or deterministic
    return _CUBLAS_HANDLES * (_CUBLAS_HOPPER if large else _CUBLAS_EARLIER)


def workload(config: TrainConfig, model: ModelConfig | None = None) -> Workload:
    """The largest step that the settings allow: every row as long as `max_length`.

    More than two micro-batches need what two need. Of several ranks it is the step of the one that
    has most, which depends on the `model`.
    """
    if model is not None and processes_of(config) > 1:
        return _of_a_rank(largest_pass(config, None, model))
    lengths = (config.max_length * config.sequences_per_example,) * config.batch_size
    return Workload((lengths,) * min(config.accumulate, 2))


def step_of(config: TrainConfig, lengths: Sequence[int], model: ModelConfig) -> Workload:
    """The most tokens that a step over rows of these lengths can have; longer rows are cut.

    Of several ranks it is the step of the one that has most.
    """
    if processes_of(config) > 1:
        return _of_a_rank(largest_pass(config, lengths, model))
    most = config.max_length * config.sequences_per_example
    lengths = sorted((min(most, length) for length in lengths), reverse=True)
    count = min(config.accumulate, 2)
    if config.packing:
        return Workload(((min(config.max_length, sum(lengths)),) * config.batch_size,) * count)
    size = config.batch_size
    steps = [tuple(lengths[i * size : (i + 1) * size]) for i in range(count)]
    return Workload(tuple(step for step in steps if step))


def _of_a_rank(largest: LargestPass) -> Workload:
    return Workload((largest.lengths,), largest.passes)


def make_batch(
    lengths: Sequence[int], config: TrainConfig | None = None, vocab_size: int = 1
) -> PackedBatch:
    """A batch of documents of these lengths, every token of which is trained.

    Where the objective of `config` is about answers, the lengths are those of its examples. The
    tokens are spread over the vocabulary, whose rows ranks may divide.
    """
    if config is not None and config.learns_answers:
        return planned_batch(lengths, config)
    count = sum(lengths)
    ids = torch.arange(count) * vocab_size // max(1, count)
    return PackedBatch.of(ids, ids, torch.tensor([0, *lengths]).cumsum(0))


@dataclass(frozen=True)
class Simulations:
    """Steps that were simulated, by depth, settings and rows; all of one model and machine.

    Where `whole`, every layer is simulated, and none is inferred from those of shallow models.
    """

    whole: bool = False
    steps: dict[Hashable, SimulatedStep] = field(default_factory=dict)
    ranks: dict[Hashable, RankMemory] = field(default_factory=dict)

    def of_a_rank(
        self,
        model: ModelConfig,
        config: TrainConfig,
        measure: Measure,
        *,
        gpu: bool,
        dtype: torch.dtype,
    ) -> RankMemory:
        """What the rank of a run that has most by `measure` holds of the trained parameters."""
        alike = config.model_copy(update=dict.fromkeys(_OF_A_PASS, None))
        key = (alike.model_dump_json(warnings=False), processes_of(config), measure)
        if key not in self.ranks:
            self.ranks[key] = rank_memory(model, config, measure, gpu=gpu, dtype=dtype)
        return self.ranks[key]


def plan(
    model: ModelConfig,
    config: TrainConfig,
    *,
    gpu: bool,
    dtype: torch.dtype,
    stored: torch.dtype = torch.bfloat16,
    work: Workload | Sequence[PackedBatch] | None = None,
    process: int = PROCESS,
    simulations: Simulations | None = None,
) -> MemoryPlan:
    """Plan a run of `config` on a model of this shape.

    `GPU` plans for CUDA, `stored` is the type of the files' tensors, and `work` the largest step
    (by default the largest that the settings allow), or the batches of the step itself. `process`
    is what a CPU holds besides tensors. `simulations` holds steps of earlier plans for the same
    model and machine, and gets those of this one. Raises `ValueError` where the checkpointing
    policies are not those of the layers.
    """
    work = work or workload(config, model)
    if isinstance(work, Workload):
        batches = [make_batch(lengths, config, model.vocab_size) for lengths in work.micro_batches]
    else:
        batches = list(work)
        work = Workload(tuple((int(batch.input_ids.numel()),) for batch in batches))
        simulations = simulations and Simulations(simulations.whole)
    simulations = simulations or Simulations()
    lengths, known = work.micro_batches, simulations.steps

    def step(measure: Measure, shallow: ModelConfig, own: TrainConfig) -> SimulatedStep:
        key = (shallow.num_hidden_layers, own.model_dump_json(), lengths, measure)
        if key not in known:
            known[key] = simulate_step(
                shallow, own, batches, measure, gpu=gpu, dtype=dtype, stored=stored
            )
        return known[key]

    def of_rank(measure: Measure) -> tuple[SimulatedStep, RankMemory | None]:
        result = step_of_layers(model, config, partial(step, measure), simulations.whole)
        if processes_of(config) == 1 or divides_trained(config):
            return result, None
        lasting = simulations.of_a_rank(model, config, measure, gpu=gpu, dtype=dtype)
        return result.with_lasting(lasting.owners), lasting

    ranks = map(of_rank, candidates(config, gpu=gpu))
    result, lasting = max(ranks, key=lambda rank: rank[0].step.bytes)
    made = _plan_of(result, config, gpu, dtype, work, model.num_hidden_layers)
    if gpu:
        made = _with_batches_ahead(made, batches, math.ceil(work.times(config)))
    else:
        made = replace(made, reserve={"process": process, **made.reserve})
    if lasting is not None:
        made = _with_state_of_all(made, lasting)
        made = replace(made, sent=dict(Counter(made.sent) + Counter(lasting.sent)))
    made = _with_start(made, *start_bytes(config, model))
    return replace(made, tied=model.tie_word_embeddings)


def _with_start(made: MemoryPlan, pairs: int, dividing: int) -> MemoryPlan:
    """The plan with the host memory that a start of the adapter as a part of the weights takes."""
    if not dividing:
        return made
    if made.gpu:
        return replace(made, host=made.host + pairs)
    owners = made.load.owners | {"decomposition": dividing}
    return replace(
        made,
        load=Peak(made.load.bytes + dividing, owners),
        reserve=made.reserve | ({"first pairs": pairs} if pairs else {}),
    )


def _with_state_of_all(made: MemoryPlan, lasting: RankMemory) -> MemoryPlan:
    """The plan with the optimizer's state of all ranks, which a checkpoint brings to each host."""
    if made.gpu:
        weights = made.save.owners.get("trained weights", 0)
        return replace(made, save_host=weights + lasting.whole_state)
    return replace(made, reserve=made.reserve | {"optimiser of all ranks": lasting.whole_state})


def _with_batches_ahead(made: MemoryPlan, batches: Sequence[PackedBatch], micro: int) -> MemoryPlan:
    """The plan with what `engine.training.batches_ahead` needs beside this step's `batches`.

    A step has them `micro` times. The copies' stream has memory of its own, for two steps; what the
    step counts is a part of it.
    """
    sizes = [batch.joined_bytes() for batch in batches] * micro
    segment = _SMALL_SEGMENT if max(sizes) <= _SMALL_BLOCK else _SEGMENT
    taken = -(-2 * sum(sizes) // segment) * segment
    ahead = max(0, taken - made.step.owners.get("batch", 0))
    plain = sum(t.numel() * t.element_size() for batch in batches for t in batch.tensors())
    return replace(
        made,
        reserve=made.reserve | {"batches ahead": ahead},
        batch_host=2 * micro * plain + sum(cached_bytes(size) for size in sizes),
    )


def _plan_of(
    result: SimulatedStep,
    config: TrainConfig,
    gpu: bool,
    dtype: torch.dtype,
    work: Workload,
    layers: int,
) -> MemoryPlan:
    step, resident = result.step, result.resident
    saved: tuple[str, ...] = ("adapters", "optimiser", "moving average")
    if config.saved_modules:
        saved += ("embeddings", "head")
    if config.every_weight:
        saved = ("dense base", "embeddings", "head", "norms and biases", "optimiser")
        saved += ("moving average",)
    passing = sum(step.owners.get(owner, 0) for owner in _PASSING)
    holes = int(FRAGMENTATION * passing)
    if gpu:
        context, workspace = CUDA_CONTEXT, cublas_workspace(config.deterministic)
        reserve = {"CUDA context": context, "cuBLAS workspace": workspace}
    else:
        reserve = {}
        holes += min(_HEAP, step.bytes // _HEAP_SHARE)
    reserve["allocator's holes"] = holes
    micro = work.times(config)
    return MemoryPlan(
        config=config,
        gpu=gpu,
        dtype=dtype,
        load=result.load,
        step=step,
        save=Peak(sum(resident.values()), resident),
        save_host=sum(resident.get(owner, 0) for owner in saved) if gpu else 0,
        trainable=result.trainable,
        tokens=int(work.tokens * micro),
        flops=result.flops * micro,
        reserve=reserve,
        host=result.host,
        layers=layers,
        sent=dict(Counter(result.steps) + Counter(_times(result.passes, micro))),
    )


def _times(given: Mapping[str, int], passes: float) -> dict[str, int]:
    return {kind: round(passes * size) for kind, size in given.items()}
