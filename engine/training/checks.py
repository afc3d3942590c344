"""Check a run without weights, for all verbs alike.

`engine train`, its dry run and `engine plan` go through these two functions before a weight file is
opened: `check_request` looks at the settings, the machine and the paths, `check_model` at the
model's shape as well. What needs the rows comes next (`engine.training.prepare`), and what needs
the weights last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.config.rules import Facts, check
from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.dataset import data_files
from engine.device import resolve_device, resolve_dtype
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.peft import Pairs, load_adapter
from engine.model_sources.open import describe_model
from engine.runs.output import check_output
from engine.runs.trackers import require_trackers
from engine.storage.safe_files import read_json_object
from engine.training.trainable import BASE_FILE, targets_of
from models.adapters import scale_of
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import layer_policies
from models.memory.cuda_graphs import recordable
from models.tensor_layout import Layout, path_in_file
from models.tensor_names import expected_tensors, parameter_count

Machine = tuple[torch.device, torch.dtype]


def check_request(config: TrainConfig, machine: Machine | None = None) -> Machine:
    """Check what a run asks for as far as no model is needed; returns its device and dtype.

    `machine` stands in for this one, for a plan. Raises `ConfigError`, `DataError` or
    `CheckpointError` naming what is wrong. Nothing is written.
    """
    require_trackers(config.report_to)
    if machine is None:
        device = resolve_device(config.device)
        machine = device, resolve_dtype(config.dtype, device)
    check_run(config, None, *machine)
    check_output(config)
    for paths in (config.data, config.eval_data):
        if paths and paths != NO_DATA:
            data_files(list(paths))
    if config.init_adapter is not None:
        load_adapter(config.init_adapter)
    return machine


def check_model(
    config: TrainConfig, model: ModelConfig, machine: Machine, *, disk: bool = True
) -> Pairs | None:
    """Check a run against the shape of its model; returns the tensors of `init_adapter`, if any.

    `disk` also looks whether a checkpoint has space on the disk of the run. Raises `ConfigError` or
    `CheckpointError` naming what does not fit.
    """
    device, dtype = machine
    check_run(config, model, device, dtype)
    if config.method != "full":
        targets_of(config, model)
    if config.gradient_checkpointing != "auto":
        check_policies(config, model.num_hidden_layers)
    if config.teacher is not None:
        check_teacher(config.teacher, model)
    if disk:
        check_output(config, saved_bytes(config, model, dtype))
    return check_init_adapter(config, model)


def check_run(
    config: TrainConfig, model: ModelConfig | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises `ConfigError` where the settings do not fit the model, if known, or the machine."""
    facts = Facts(device=device.type, dtype=str(dtype).removeprefix("torch."))
    if model is not None:
        facts = replace(
            facts,
            model_type=model.model_type,
            tied=model.tie_word_embeddings,
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


def check_teacher(teacher: str, student: ModelConfig) -> None:
    """Raises `CheckpointError` where the teacher's vocabulary is not the student's."""
    theirs, ours = describe_model(teacher).config.vocab_size, student.vocab_size
    if theirs != ours:
        raise CheckpointError(
            f"The teacher {teacher} has a vocabulary of {theirs}, the model one of {ours}; "
            "probabilities can only be compared over the same tokens. Name a teacher of the same "
            "family, or leave out --teacher."
        )


def saved_bytes(config: TrainConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one checkpoint: the trained weights and the two moments of the optimizer.

    Moments take 2 bytes a parameter in 8 bits (their scales a few percent more) and 8 in 32 bits.
    """
    moments = 2 if config.optimizer == "adamw8bit" else 8
    if config.method == "full":
        return parameter_count(model) * (dtype.itemsize + moments)
    shapes = _adapted_shapes(model, targets_of(config, model)).values()
    magnitudes = sum(out for out, _ in shapes) if config.use_dora else 0
    count = config.lora_rank * sum(out + inner for out, inner in shapes) + magnitudes
    return count * (4 + moments)


def check_init_adapter(config: TrainConfig, model: ModelConfig) -> Pairs | None:
    """The tensors of `init_adapter`, if there is one and it is of this model, rank and targets.

    Raises `CheckpointError` naming every mismatch.
    """
    if config.init_adapter is None:
        return None
    adapter, tensors = load_adapter(config.init_adapter)
    wrong = []
    base = _base_digest(config.init_adapter)
    if base is None and not _same_model(adapter.base_model_name_or_path, config.model):
        wrong.append(f"its base is {adapter.base_model_name_or_path}, this run's {config.model}")
    if adapter.r != config.lora_rank:
        wrong.append(f"its rank is {adapter.r}, --lora-rank is {config.lora_rank}")
    # An adapter of experts has the root of rsLoRA in its alpha, so the scales are compared.
    scale = scale_of(config.lora_rank, config.lora_alpha, config.use_rslora)
    if not math.isclose(adapter.scale, scale):
        wrong.append(
            f"its alpha is {adapter.lora_alpha:g} (rslora {adapter.use_rslora}), this run's "
            f"{config.lora_alpha:g} (rslora {config.use_rslora})"
        )
    if adapter.use_dora != config.use_dora:
        wrong.append(f"its use_dora is {adapter.use_dora}, this run's {config.use_dora}")
    targets = {path.rsplit(".", 1)[-1] for path in tensors}
    wanted = targets_of(config, model)
    if targets != set(wanted):
        wrong.append(f"it adapts {_listed(targets)}, --target-modules is {_listed(set(wanted))}")
    if not wrong:
        wrong = _misfits(model, wanted, tensors)[:4]
    if wrong:
        raise _refused(config.init_adapter, wrong)
    return tensors


def check_adapter_base(config: TrainConfig, digest: str) -> None:
    """Raises `CheckpointError` where `init_adapter` records another base than that of `digest`."""
    if config.init_adapter is None:
        return
    base = _base_digest(config.init_adapter)
    if base is not None and base != digest:
        name = read_json_object(config.init_adapter / "adapter_config.json").get(
            "base_model_name_or_path"
        )
        raise _refused(config.init_adapter, [f"it was trained on another base ({name})"])


def _refused(adapter: Path, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The adapter {adapter} cannot be trained on from here: {'; '.join(wrong)}. Give the "
        "settings it was trained with, or leave out --init-adapter to start a new one."
    )


def _adapted_shapes(model: ModelConfig, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every projection that `targets` mean, experts one by one."""
    stored = expected_tensors(model, Layout(model.nested, fused=False))
    shapes = {name.removesuffix(".weight"): shape for name, shape in stored.items()}
    return {
        path: (shape[0], shape[1])
        for path, shape in shapes.items()
        if path.rpartition(".")[2] in targets and len(shape) == 2
    }


def _misfits(model: ModelConfig, targets: tuple[str, ...], pairs: Pairs) -> list[str]:
    """What in an adapter's paths and shapes is not as the model's projections ask for."""
    shapes = _adapted_shapes(model, targets)
    given = {path_in_file(model, path): parts for path, parts in pairs.items()}
    wrong = [f"it lacks {path}" for path in shapes if path not in given]
    wrong += [f"the model has no {path}" for path in given if path not in shapes]
    for path, (a, b, *_) in given.items():
        if path in shapes and (b.shape[0], a.shape[1]) != shapes[path]:
            fit = f"{b.shape[0]} x {a.shape[1]}"
            wrong.append(
                f"{path} is for {fit}, the model has {shapes[path][0]} x {shapes[path][1]}"
            )
    return wrong


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _base_digest(adapter: Path) -> str | None:
    path = adapter / BASE_FILE
    if not path.is_file():
        return None
    try:
        return str(read_json_object(path)["digest"])
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it to go on by the base's name alone."
        ) from error


def _same_model(left: str, right: str) -> bool:
    """Whether two names of a model mean the same: equal paths, or the same last part."""
    if not left:
        return True
    return Path(left).resolve() == Path(right).resolve() or Path(left).name == Path(right).name
