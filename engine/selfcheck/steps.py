"""Check whole steps of a tiny model: gradients, graphs, plan, bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from engine.benchmark.cases.shapes import configuration
from engine.config.train_config import TrainConfig
from engine.errors import gib
from engine.memory.estimate import Workload, plan
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_for
from engine.selfcheck.accuracy import references
from engine.selfcheck.options import CheckOptions, Finding, failed, passed
from engine.training.determinism import deterministic
from engine.training.step import TrainingStep
from engine.training.trainable import make_optimizer, make_trainable, step_settings
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from models.tensor_names import expected_tensors

DENSE, BIASED, MIXTURE, HYBRID = (
    "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-30b-a3b", "qwen3-next-80b-a3b",
)  # fmt: skip
_CPU = torch.device("cpu")
_LENGTHS = (5, 9)
_EQUAL = (128, 128)
_STEPS = 3
_PLAN_TOLERANCE = 0.02
_LOSSES_APART = 2e-2


class RandomSource:
    """A model source of random weights, a function of the shape alone."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        self._shapes = expected_tensors(config)

    def names(self) -> list[str]:
        """Names of the file's tensors."""
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """A matrix of standard deviation 1 / sqrt(columns), or a norm near its usual value."""
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(len(name) + sum(map(ord, name)))
        drawn = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) == 1:
            drawn = 0.1 * drawn + (0.0 if name.endswith("bias") else 1.0)
        else:
            drawn *= float(shape[-1]) ** -0.5
        return drawn.to(torch.bfloat16)

    def codes(self, name: str) -> None:
        """Nothing is quantised."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def tiny_shape(model: str, options: CheckOptions) -> ModelConfig:
    """A model of the same family, in the interpreter of as few layers as show its kinds."""
    shape = configuration(model, small=True)
    return shape.with_layers(1) if options.interpret and shape.period == 1 else shape


def run_config(**changes: object) -> TrainConfig:
    """QLoRA with the settings that `engine train` has by default, but for `changes`."""
    given = {"gradient_checkpointing": "none", "lora_dropout": 0.0, "max_length": 512} | changes
    return TrainConfig(model="-", data="-", **given)


def build_step(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    weights_on: torch.device = _CPU,
) -> TrainingStep:
    """The step that `engine train` makes of these settings, on random weights.

    Weights are drawn on `weights_on`: on the CPU they are the same for every device. The B halves
    of adapters are not zero, so that every gradient is computed from something.
    """
    source = RandomSource(model, weights_on)
    decoder = build_for(config, cast(ModelSource, source), device, dtype)
    make_trainable(decoder, config, None)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            drawn = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn)
    if config.cuda_graphs:
        decoder.record_layers()
    return TrainingStep(
        decoder,
        make_optimizer(decoder, config),
        step_settings(config),
        config.max_grad_norm,
        config.seed,
    )


def batch_of(model: ModelConfig, lengths: tuple[int, ...], seed: int = 0) -> PackedBatch:
    """Random documents of these lengths, every token of which is trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.vocab_size, (sum(lengths),), generator=generator)
    return PackedBatch.of(ids, ids, torch.tensor([0, *lengths]).cumsum(0))


def model_check(
    model: str, *, half: bool = True, **changes: object
) -> Callable[[CheckOptions], Finding]:
    """A check of a step's loss and every gradient, with truth in float64 and plain torch beside it.

    Lengths of differences are compared: at most three times that of plain torch in the same type
    on the CPU. `half` False computes in fp32, where rounding must not choose a token's experts.
    """

    def run(options: CheckOptions) -> Finding:
        shape, cpu = tiny_shape(model, options), torch.device("cpu")
        dtype = options.dtypes[0] if half else torch.float32
        config = run_config(**changes)
        batch = batch_of(shape, _LENGTHS)
        # The weights are drawn on the CPU for all three, so that they are the same.
        ours = _gradients(build_step(shape, config, options.device, dtype), batch)
        with references():
            plain, truth = (
                _gradients(build_step(shape, config, cpu, t), batch) for t in (dtype, torch.float64)
            )
        for name, true in truth.items():
            apart, other = _apart(ours[name], true), _apart(plain[name], true)
            if not apart <= 3 * other + 8 * torch.finfo(dtype).eps:
                return failed(f"{name} is off by {apart:.1e} of its length, plain by {other:.1e}")
        worst = max(_apart(ours[name], true) for name, true in truth.items())
        return passed(f"loss and {len(truth) - 1} gradients, at most {worst:.1e} of their length")

    return run


def _gradients(step: TrainingStep, batch: PackedBatch) -> dict[str, Tensor]:
    """The loss and every gradient of one micro-batch, on the CPU in float64."""
    step.model.train()
    loss = step.model.batch_loss(batch, replace(step.settings, dropout_seed=5))
    loss.backward()
    gradients = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
    values = {"loss": loss.detach(), **gradients}
    return {name: value.cpu().double() for name, value in values.items()}


def _apart(ours: Tensor, truth: Tensor) -> float:
    """|ours - truth| / |truth|; NaN counts as infinitely far."""
    apart = float((ours - truth).norm() / truth.norm().clamp_min(1e-12))
    return apart if math.isfinite(apart) else math.inf


def _losses(step: TrainingStep, batch: PackedBatch, steps: int = _STEPS) -> list[float]:
    return [step([batch], number).loss for number in range(steps)]


def same_losses(
    label: str, lengths: tuple[int, ...], **changes: object
) -> Callable[[CheckOptions], Finding]:
    """A check that a mechanism which only saves time or memory leaves the losses as they were."""

    def run(options: CheckOptions) -> Finding:
        shape = configuration(DENSE, small=True)
        batch = batch_of(shape, lengths)
        losses = [
            _losses(build_step(shape, config, options.device, options.dtypes[0]), batch)
            for config in (run_config(), run_config(**changes))
        ]
        apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        if not apart <= _LOSSES_APART:
            return failed(f"losses with and without {label} are {apart:.1e} apart: {losses}")
        return passed(f"{_STEPS} losses with and without, {apart:.1e} apart", losses)

    return run


def check_same_bits(options: CheckOptions) -> Finding:
    """Two equal runs under --deterministic leave the same bits."""
    shape, adapters = tiny_shape(DENSE, options), list[list[Tensor]]()
    lengths, steps = ((9, 5), 2) if options.interpret else ((130, 20, 257), 4)
    batch = batch_of(shape, lengths)
    with deterministic(options.device):
        for _ in range(2):
            config = run_config(lora_dropout=0.1, deterministic=True)
            step = build_step(shape, config, options.device, options.dtypes[0])
            _losses(step, batch, steps)
            adapters.append([p.detach().clone() for p in trained(step.model)])
    equal = all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))
    if not equal:
        return failed(f"two equal runs of {steps} steps left different bits")
    return passed(f"{len(adapters[0])} tensors of two runs of {steps} steps are equal to the bit")


def trained(model: Decoder) -> list[Tensor]:
    """The parameters that want a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_memory_plan(options: CheckOptions) -> Finding:
    """What a tiny model's third step allocates, beside what was planned for it."""
    shape = replace(
        configuration(DENSE, small=True), hidden_size=512, intermediate_size=1536, head_dim=64
    ).with_layers(6)
    config = run_config(max_length=512, batch_size=2)
    step = build_step(shape, config, options.device, options.dtypes[0])
    batch = batch_of(shape, (512, 512))
    for number in range(3):
        torch.cuda.reset_peak_memory_stats(options.device)
        step([batch], number)
    real = torch.cuda.max_memory_allocated(options.device)
    work = Workload(((512, 512),))
    made = plan(shape, config, gpu=True, dtype=options.dtypes[0], work=work)
    # The library's workspaces are in torch's allocator once it has multiplied.
    expected = made.step.bytes + made.reserve.get("cuBLAS workspace", 0)
    apart = expected / real - 1
    figures: Mapping[str, int] = {"planned": expected, "allocated": real}
    text = f"{gib(expected)} planned, {gib(real)} allocated ({apart:+.1%})"
    small = abs(expected - real) < 8 << 20
    if abs(apart) > _PLAN_TOLERANCE and not small:
        return failed(text, figures)
    return passed(text, figures)
