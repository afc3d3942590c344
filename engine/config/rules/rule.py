"""`Rule`: settings that exclude each other or do not fit the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from engine.config.choices import (
    ComputeType,
    DecayShape,
    EmbeddingOn,
    HeadPrecision,
    Method,
    ObjectiveName,
    Offload,
    Optimizer,
    SavedModule,
    Schedule,
    Sharding,
    Streaming,
)


class RunSettings(Protocol):
    """The settings of `TrainConfig` that the rules look at."""

    model: str
    data: tuple[str, ...]
    gpus: int
    max_restarts: int
    shard: Sharding
    context_parallel: int
    expert_parallel: int
    tokenizer: str | None
    method: Method
    lora_dropout: float
    hidden_dropout: float
    attention_dropout: float
    objective: ObjectiveName
    teacher: str | None
    reference: str | None
    packing: bool
    share_prompt: bool
    streaming: Streaming
    train_on: str
    eval_data: tuple[str, ...]
    heldout: float
    eval_every: int
    eval_ema: bool
    ema_decay: float | None
    sample_every: int
    sample_prompts: Path | None
    output_dir: Path | None
    run_id: str | None
    resume: str | None
    overwrite: bool
    use_dora: bool
    init_adapter: Path | None
    modules_to_save: tuple[SavedModule, ...]
    add_tokens: Path | None
    optimizer: Optimizer
    label_smoothing_factor: float
    z_loss: float
    init_lora_weights: str
    loftq_iter: int
    double_quant: bool
    layers: str | None
    loraplus_lr_ratio: float | None
    exclude_modules: str | tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    warmup_ratio: float | None
    warmup_steps: int | None
    lr_schedule: Schedule
    min_lr_ratio: float
    lr_power: float
    lr_num_cycles: int
    lr_decay_ratio: float | None
    lr_decay_steps: int | None
    lr_decay_shape: DecayShape
    max_grad_norm: float
    accumulate: int
    dtype: ComputeType
    optimizer_in_backward: bool
    head_precision: HeadPrecision
    embedding_on: EmbeddingOn
    offload: tuple[Offload, ...]
    keep_decoded: str
    mlp_tile_tokens: int | None
    low_memory_decode: bool
    cuda_graphs: bool
    memory_budget: int | None

    @property
    def every_weight(self) -> bool:
        """Whether all weights are trained, and no adapter."""
        ...

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """What is trained whole beside an adapter."""
        ...

    @property
    def best_metric(self) -> str | None:
        """The figure that best checkpoint and early stopping go by; None without either."""
        ...

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Self:
        """The same settings with those in `update` replaced."""
        ...


@dataclass(frozen=True)
class Facts:
    """What is known of the machine and the model; None where it is not known yet.

    `tied` says that the head is the embedding, `recordable` that CUDA graphs can hold a layer,
    `hybrid` that some layers are Gated DeltaNets, `experts` how many a mixture has, `processes` how
    many train together.
    """

    device: str | None = None
    dtype: str | None = None
    model_type: str | None = None
    tied: bool | None = None
    recordable: bool | None = None
    hybrid: bool | None = None
    experts: int | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Rule:
    """`setting` cannot be used `when` this is true: `message` says why, `fix` what to do instead.

    Both texts are format strings over the settings `c` and the facts `f`.
    """

    setting: str
    when: Callable[[RunSettings, Facts], bool]
    message: str
    fix: str

    def text(self, config: RunSettings, facts: Facts) -> str:
        """Both texts, about these settings."""
        return f"{self.message} {self.fix}".format(c=config, f=facts, offload=_joined(config))


def _joined(config: RunSettings) -> str:
    return " and ".join(f"offload {what}" for what in config.offload)
