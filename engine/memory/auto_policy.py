"""Resolve `--gradient-checkpointing auto`: the fastest policy that fits.

Policies differ in time and memory only; the gradients are the same (`models.layers.block`). They
are planned for the largest step of the run (`engine.memory.estimate`), the fastest first, against a
share of the memory that is free, or against the run's budget. With a budget, the most frugal policy
is planned first: if even that does not fit, the run is refused. Where a generous estimate needs not
half of that, nothing is planned: a plan takes a part of a second.
"""

from __future__ import annotations

import logging
import math

import torch

from engine.config.choices import POLICIES
from engine.config.spelling import given_chunk
from engine.config.train_config import TrainConfig
from engine.distributed.group import processes_here
from engine.errors import gib
from engine.memory.decoded import FREE_SHARE
from engine.memory.estimate import MemoryPlan, Workload, plan, workload
from engine.memory.process import PROCESS
from engine.memory.search import changed
from kernels.loss.linear_cross_entropy import chunk_tokens
from kernels.runtime.device import free_memory as device_free_memory
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors

log = logging.getLogger(__name__)


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses: a GPU's, or the machine's."""
    if device.type == "cuda":
        return device_free_memory(device)
    import psutil

    return int(psutil.virtual_memory().available)


def chunk_of(config: TrainConfig, model: ModelConfig, dtype: torch.dtype, gpu: bool) -> int:
    """Trained tokens in a chunk of the loss, chosen as the loss itself chooses where it is auto."""
    return given_chunk(config.loss_chunk_tokens) or chunk_tokens(
        model.vocab_size, dtype.itemsize, gpu=gpu
    )


def _estimate(
    model: ModelConfig, config: TrainConfig, work: Workload, dtype: torch.dtype, gpu: bool
) -> int:
    """More bytes than a run without recompute needs: dense weights, states, all activations."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    inner, hidden = model.intermediate_size, model.hidden_size
    layer = 4 * hidden + 2 * heads * model.head_dim + 4 * inner
    tokens = max(sum(lengths) for lengths in work.micro_batches)
    weights = sum(math.prod(shape) for shape in expected_tensors(model).values())
    trained = weights if config.every_weight else config.lora_rank * model.num_hidden_layers * (
        2 * hidden + heads * model.head_dim + inner
    ) * 8  # fmt: skip
    trained += len(config.saved_modules) * model.vocab_size * hidden
    logits = chunk_of(config, model, dtype, gpu) * model.vocab_size
    longest = max(max(lengths) for lengths in work.micro_batches)
    if config.attention_dropout > 0.0:  # the weights of one block of queries exist
        logits += 4 * model.num_attention_heads * longest**2
    activations = tokens * layer * (model.num_hidden_layers + 2)
    return 4 * (weights + 4 * trained + 2 * logits) + dtype.itemsize * activations


def resolve_policy(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    work: Workload | None = None,
    free: int | None = None,
) -> str:
    """The policy of `config.gradient_checkpointing`, chosen where it says auto.

    `work` is the largest step (by default the largest that the settings allow) and `free` the bytes
    that are free, looked up where it is None. Where no policy is sure to fit it is "full".
    """
    return planned_policy(model, config, device, dtype, work, free)[0]


def planned_policy(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    work: Workload | None = None,
    free: int | None = None,
    process: int = PROCESS,
) -> tuple[str, MemoryPlan | None]:
    """As `resolve_policy`, with the plan of the largest step at that policy if it was made.

    `process` is what a CPU holds besides tensors.
    """
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing, None
    limit = config.memory_budget
    if limit is None:
        free = free_memory(device) if free is None else free
        free //= processes_here(config) if device.type == "cpu" else 1
        limit = int(free * FREE_SHARE[device.type])
    work = work or workload(config, model)
    gpu = device.type == "cuda"
    if 2 * _estimate(model, config, work, dtype, gpu) < limit - (0 if gpu else process):
        return "none", None

    def made(policy: str) -> MemoryPlan:
        settings = changed(config, gradient_checkpointing=policy)
        return plan(model, settings, gpu=gpu, dtype=dtype, work=work, process=process)

    *faster, policy = POLICIES
    planned = made(policy) if config.memory_budget is not None else None
    if planned is None or planned.total <= limit:
        for other in faster:
            tried = made(other)
            if tried.total <= limit:
                policy, planned = other, tried
                break
    planned = planned or made(policy)
    log.info(
        "gradient checkpointing %s: a step needs %s, and %s may be used",
        policy, gib(planned.total), gib(limit),
    )  # fmt: skip
    return policy, planned
