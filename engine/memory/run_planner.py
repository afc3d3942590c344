"""Plan a run with its rows, teacher and machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.dataset import read_chosen
from engine.data.sources.resolve import data_files
from engine.device import resolve_device, resolve_dtype
from engine.memory.auto_policy import free_memory, resolve_policy
from engine.memory.decoded import FREE_SHARE, resolve_decoded, spare_memory
from engine.memory.estimate import MemoryPlan, Simulations, step_of
from engine.memory.estimate import plan as plan_memory
from engine.memory.model_shapes import preset_config
from engine.memory.search import changed, least_step
from engine.model_sources.scratch.open_base import describe_base
from engine.model_sources.vocabulary.token_file import read_tokens
from engine.storage.home import expanded
from engine.tokenization.tokenizer import load_tokenizer
from engine.training.row_set import RowSet, heldout_choice, read_examples, trained_choice
from engine.training.streamed import is_streamed
from models.config.model_config import ModelConfig

USABLE = 0.95
"""Share of a GPU's memory that a run may plan with; the rest is the driver's and the desktop's."""

_BASE = ("NF4 base", "dense base", "embeddings", "head", "norms and biases")


@dataclass(frozen=True)
class KnownRows:
    """The rows of a plan: how many there are, and their tokens where a tokenizer is at hand.

    `count` is None where no data was named; `lengths` and `row_set`, the tokenised rows, are None
    where tokens are not known.
    """

    count: int | None
    lengths: tuple[int, ...] | None
    row_set: RowSet | None = None

    def text(self, config: TrainConfig) -> str:
        """One line: what the plan takes the rows to be."""
        if self.lengths is not None:
            return (
                f"rows: {len(self.lengths):,}, the longest of {max(self.lengths):,} tokens; planned"
                " for the largest step that they can make"
            )
        every = f"every one is taken to have max_length, {config.max_length:,} tokens"
        if self.count is None:
            named = "they are streamed" if config.data != NO_DATA else "none were named (--data)"
            return f"rows: {named}; {every}"
        return f"rows: {self.count:,}; {config.model} has no tokenizer here, so {every}"


def read_known_rows(config: TrainConfig, model: ModelConfig) -> KnownRows:
    """The rows of `config.data`, checked as `engine train` checks them.

    They are tokenised where the model is a folder or a GGUF file with a tokenizer, and otherwise
    only read. Raises `DataError` and `CheckpointError` as train does.
    """
    if config.data == NO_DATA:
        return KnownRows(None, None)
    if is_streamed(config, data_files(config.data, config.query)):
        return KnownRows(None, None)  # planned as if every row were full
    path = expanded(config.model)
    at_hand = (path.is_dir() or path.suffix == ".gguf") and path.exists()
    if at_hand or config.method == "scratch":
        described = describe_base(config)
        if described.tokenizer_files():
            tokenizer = load_tokenizer(described, config.template_date)
            rows = read_examples(config, tokenizer, model.vocab_size)
            lengths = rows.lengths(config)
            if rows.report.documents:  # they are packed, so that every row is full
                lengths = (config.max_length,) * len(lengths)
            return KnownRows(len(lengths), lengths, rows)
    plain, _ = read_chosen(config.data, trained_choice(config))
    if config.eval_data:
        read_chosen(config.eval_data, heldout_choice(config))
    return KnownRows(len(plain[: config.limit_rows]), None)


def with_new_rows(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """`model` with the rows that a run adds to embedding and head.

    Of a model that is known by name alone every token of --add-tokens is taken to be new.
    """
    if config.add_tokens is None and config.init_adapter is None:
        return model
    if preset_config(config.model) is None:
        return replace(model, vocab_size=describe_base(config).config.vocab_size)
    new = () if config.add_tokens is None else read_tokens(config.add_tokens)
    return replace(model, vocab_size=model.vocab_size + len(new))


@dataclass(frozen=True)
class RunPlanner:
    """Plans runs of one model, on a GPU or a CPU, with the rows and the teacher that are known."""

    model: ModelConfig
    gpu: bool
    stored: torch.dtype
    rows: KnownRows = field(default_factory=lambda: KnownRows(None, None))
    teacher: ModelConfig | None = None
    _teachers: dict[tuple[object, ...], int] = field(default_factory=dict)
    _simulations: Simulations = field(default_factory=Simulations)

    def __call__(self, config: TrainConfig) -> MemoryPlan:
        """The plan of these settings, what they leave to the machine chosen."""
        if config.gradient_checkpointing == "auto":
            config = changed(config, gradient_checkpointing=self._policy(config))
        limit = spare_memory(config, torch.device("cuda")) if self.gpu else config.memory_budget
        keep, made = resolve_decoded(config, self.model.num_hidden_layers, limit, self._made)
        return made or self._made(changed(config, keep_decoded=keep))

    def _made(self, config: TrainConfig) -> MemoryPlan:
        made = plan_memory(
            self.model,
            config,
            gpu=self.gpu,
            dtype=compute_dtype(config, self.gpu),
            stored=self.stored,
            work=None
            if self.rows.lengths is None
            else step_of(config, self.rows.lengths, self.model),
            simulations=self._simulations,
        )
        if self.teacher is None:
            return made
        return replace(made, reserve=made.reserve | {"teacher's weights": self._teaching(config)})

    def _teaching(self, config: TrainConfig) -> int:
        """Bytes of the teacher's weights, which are loaded as the run's own base is."""
        assert self.teacher is not None
        names = ("method", "dtype", "embedding_on", "offload", "head_precision")
        key = tuple(getattr(config, name) for name in names)
        if key not in self._teachers:
            own = changed(least_step(config), keep_decoded="none", teacher=None)
            dtype = compute_dtype(config, self.gpu)
            made = plan_memory(self.teacher, own, gpu=self.gpu, dtype=dtype, stored=self.stored)
            self._teachers[key] = sum(made.save.owners.get(owner, 0) for owner in _BASE)
        return self._teachers[key]

    def _policy(self, config: TrainConfig) -> str:
        """What auto comes to; "selective" for a GPU that is not here, whose memory is unknown."""
        if self.gpu and config.memory_budget is None and not torch.cuda.is_available():
            return "selective"
        device = torch.device("cuda" if self.gpu else "cpu")
        work = None if self.rows.lengths is None else step_of(config, self.rows.lengths, self.model)
        dtype = compute_dtype(config, self.gpu)
        return resolve_policy(self.model, config, device, dtype, work)


def compute_dtype(config: TrainConfig, gpu: bool) -> torch.dtype:
    """The type a run computes in; a GPU that is not here is taken to know bf16."""
    if not gpu:
        return resolve_dtype(config.dtype, torch.device("cpu"))
    if config.dtype == "auto":
        if torch.cuda.is_available():
            return resolve_dtype("auto", resolve_device("cuda"))
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def usable_memory(gpu: bool) -> int | None:
    """Bytes that a run on this machine may plan with; None for a GPU that is not here.

    Of a CPU's memory a share of what is free: it is other programs' as well.
    """
    if not gpu:
        return int(FREE_SHARE["cpu"] * free_memory(torch.device("cpu")))
    if not torch.cuda.is_available():
        return None
    return int(USABLE * torch.cuda.get_device_properties(0).total_memory)
