"""Check a run without weights, for all verbs alike.

`engine train`, its dry run and `engine plan` go through these two functions before a weight file is
opened: `check_request` looks at the settings, the machine and the paths, `check_model` at the
model's shape as well. What needs the rows comes next (`engine.training.prepare`), and what needs
the weights last.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.config.rules import Facts, check
from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.sources.resolve import data_files
from engine.device import check_threads, resolve_device, resolve_dtype
from engine.distributed.group import processes_of
from engine.errors import CheckpointError, ConfigError
from engine.inference.batch_files import read_rows
from engine.model_sources.adapter.peft import Adapter
from engine.model_sources.adapter_path import open_adapter
from engine.model_sources.open import describe_model
from engine.runs.output import check_output
from engine.runs.trackers import require_trackers
from engine.training.adapters.selection import adapted_elements, check_selection, selection
from engine.training.adapters.starts import check_start
from engine.training.init_adapter import check_init_adapter
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import layer_policies
from models.memory.cuda_graphs import recordable
from models.tensor_names import parameter_count

_MOMENTS = {"adamw8bit": 2, "adamw": 8, "lion8bit": 1, "adafactor": 0}
"""Bytes of state per parameter."""

Machine = tuple[torch.device, torch.dtype]


def check_request(config: TrainConfig, machine: Machine | None = None) -> Machine:
    """Check what a run asks for as far as no model is needed; returns its device and dtype.

    `machine` stands in for this one, for a plan. Raises `ConfigError`, `DataError` or
    `CheckpointError` naming what is wrong. Nothing is written.
    """
    require_trackers(config.report_to)
    check_threads(config.threads)
    if machine is None:
        device = resolve_device(config.device)
        machine = device, resolve_dtype(config.dtype, device)
    check_run(config, None, *machine)
    check_output(config)
    for names, query in ((config.data, config.query), (config.eval_data, config.eval_query)):
        if names and names != NO_DATA:
            data_files(names, query)
    if config.sample_prompts is not None:
        read_rows(config.sample_prompts)
    if config.init_adapter is not None:
        open_adapter(config.init_adapter)
    return machine


def check_model(
    config: TrainConfig, model: ModelConfig, machine: Machine, *, disk: bool = True
) -> Adapter | None:
    """Check a run against the shape of its model; returns its `init_adapter`, if it has one.

    `disk` also looks whether a checkpoint has space on the disk of the run. Raises `ConfigError` or
    `CheckpointError` naming what does not fit.
    """
    device, dtype = machine
    check_run(config, model, device, dtype)
    if not config.every_weight:
        check_start(config, check_selection(config, model))
    if config.gradient_checkpointing != "auto":
        check_policies(config, model.num_hidden_layers)
    if config.teacher is not None:
        check_vocabulary("teacher", config.teacher, model)
    if config.reference not in (None, "base"):
        check_vocabulary("reference", str(config.reference), model)
    if disk:
        check_output(config, saved_bytes(config, model, dtype))
    return check_init_adapter(config, model)


def check_run(
    config: TrainConfig, model: ModelConfig | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises `ConfigError` where the settings do not fit the model, if known, or the machine."""
    facts = Facts(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        processes=processes_of(config),
    )
    if model is not None:
        facts = replace(
            facts,
            model_type=model.model_type,
            tied=model.tie_word_embeddings,
            hybrid="linear_attention" in model.layer_types,
            experts=model.num_experts or 0,
            recordable=_recordable(model) if config.cuda_graphs else None,
        )
    check(config, facts)


def _recordable(model: ModelConfig) -> bool:
    """Whether CUDA graphs can hold any layer of the model."""
    with torch.device("meta"):
        return any(map(recordable, Decoder(model).layers))


def check_policies(config: TrainConfig, layers: int) -> None:
    """Raises `ConfigError` where the checkpointing policies are not those of this many layers."""
    try:
        layer_policies(config.gradient_checkpointing, layers)
    except ValueError as error:
        raise ConfigError(f"--gradient-checkpointing: {error}.") from error


def check_vocabulary(role: str, name: str, model: ModelConfig) -> None:
    """Raises `CheckpointError` where another model's vocabulary is not this one's."""
    theirs, ours = describe_model(name).config.vocab_size, model.vocab_size
    if theirs != ours:
        raise CheckpointError(
            f"The {role} {name} has a vocabulary of {theirs}, the model one of {ours}; "
            "probabilities can only be compared over the same tokens. Name one of the same "
            f"family, or leave out --{role}."
        )


def saved_bytes(config: TrainConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one checkpoint: the trained weights, the optimizer's two moments, an average.

    Moments take 2 bytes a parameter in 8 bits (their scales a few percent more) and 8 in 32 bits;
    Lion has one, Adafactor next to none, and Muon's is of the weights' type.
    """
    moments = _MOMENTS.get(config.optimizer, dtype.itemsize)
    moments += 0 if config.ema_decay is None else 4
    if config.every_weight:
        return parameter_count(model) * (dtype.itemsize + moments)
    pairs = adapted_elements(selection(config, model), config.use_dora) * (4 + moments)
    matrices = min(len(config.saved_modules), 1 if model.tie_word_embeddings else 2)
    rows = model.vocab_size * model.hidden_size
    return pairs + matrices * rows * (dtype.itemsize + moments)
