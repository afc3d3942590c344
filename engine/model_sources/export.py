"""Write a model source as a Hugging Face directory.

The tensors stream: each is read, changed, cast, checked and written before the next is read.
Embedding and head, the largest of most models, do so some rows at a time. So memory holds a layer's
largest tensor and no more. The folder appears under its name when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.choices import MAX_SHARD_SIZE
from engine.config.spelling import DTYPES as SPELLINGS
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.config_json import complete_config
from engine.model_sources.hf_directory import INDEX, WEIGHTS
from engine.model_sources.interface.model_source import ModelSource, TokenizerSource
from engine.model_sources.interface.row_parts import outside_layers, row_parts
from engine.model_sources.pruning_record import PRUNING, carried, read_pruning
from engine.model_sources.quantised.write import Encoding
from engine.model_sources.safetensors.file import SafetensorsWriter
from engine.storage import durable, names
from models.tensor_layout import carried_prefixes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Transform = Callable[[str, torch.Tensor], torch.Tensor]
_Shard = dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]
"""Tensor of the source -> type and shape of each tensor that it becomes in the file."""


@dataclass(frozen=True)
class WrittenModel:
    """What `write_directory` wrote: where, how many tensors, in how many files of what size."""

    output: Path
    tensors: int
    parameters: int
    shards: int
    total_bytes: int


def export_hf_directory(
    source: ModelSource,
    output: Path | str,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> WrittenModel:
    """Write `source` to the new folder `output`, in `dtype` or each tensor in its own.

    A tensor that a GGUF file stores quantised is float32 unless `dtype` says otherwise. Raises
    `ConfigError` if `output` is occupied, and `CheckpointError` for a tensor that is not finite in
    `dtype`, or if the disk refuses.
    """
    return write_directory(source, output, lambda _, tensor: tensor, dtype, max_shard_size)


def write_directory(
    source: ModelSource,
    output: Path | str,
    transform: Transform,
    dtype: torch.dtype | str | None,
    max_shard_size: int,
    write_more: Callable[[Path], None] | None = None,
    encoding: Encoding | None = None,
) -> WrittenModel:
    """As `export_hf_directory`, with `transform(name, tensor)` in place of every tensor.

    `transform` returns a tensor of the same shape and any floating type. Of a tensor that is in no
    layer it is given some rows at a time. Tensors of the model's other parts
    (`models.tensor_layout.carried_prefixes`) keep their bytes and see neither. `write_more` may
    write more files into the folder, before it appears under its name. With an `encoding` weights
    are stored in its codes.
    """
    wanted = parse_dtype(dtype)
    output = Path(output)
    durable.refuse_occupied(output)
    shards = _plan(source, wanted, max_shard_size, encoding)
    durable.require_space(output.absolute(), sum(map(_size, shards)))
    total, weight_map = 0, dict[str, str]()
    with durable.publish_directory(output) as folder:
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS if len(shards) == 1 else _shard_name(number, len(shards))
            total += _write_shard(source, folder / name, shard, transform, encoding)
            weight_map |= {part: name for parts in shard.values() for part in parts}
        parameters = sum(torch.Size(source.shape(name)).numel() for name in source.names())
        if len(shards) > 1:
            metadata = {"total_parameters": parameters, "total_size": total}
            durable.write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        _write_small_files(source, folder, _main_type(shards, encoding), encoding)
        if write_more is not None:
            write_more(folder)
    tensors = sum(len(shard) for shard in shards)
    return WrittenModel(output, tensors, parameters, len(shards), total)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type that models are saved in, by itself or by name. Raises `ConfigError`."""
    if dtype is None or dtype in DTYPES.values():
        return dtype if isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str) and (name := SPELLINGS.get(dtype.lower(), dtype)) in DTYPES:
        return DTYPES[name]
    raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")


def _plan(
    source: ModelSource, dtype: torch.dtype | None, max_shard_size: int, encoding: Encoding | None
) -> list[_Shard]:
    """The tensors of each file, in the order of the model; a file holds at least one."""
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size is {max_shard_size}; expected a number of bytes.")
    shards: list[_Shard] = [{}]
    filled, others = 0, carried_prefixes(source.config)
    for name in source.names():
        unchanged = dtype is None or name.startswith(others)
        kind = source.dtype(name) if unchanged else dtype
        assert kind is not None
        parts = {name: (kind, source.shape(name))}
        if encoding is not None and encoding.encodes(name):
            parts = encoding.specs(name)
        size = _size({name: parts})
        if shards[-1] and filled + size > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = parts
        filled += size
    return shards


def _size(shard: _Shard) -> int:
    return sum(
        kind.itemsize * torch.Size(shape).numel()
        for parts in shard.values()
        for kind, shape in parts.values()
    )


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(
    source: ModelSource,
    path: Path,
    shard: _Shard,
    transform: Transform,
    encoding: Encoding | None,
) -> int:
    """Write one file; returns the bytes of its tensors."""
    others = carried_prefixes(source.config)
    specs = {name: spec for parts in shard.values() for name, spec in parts.items()}
    unknown = [name for name in specs if encoding is not None and encoding.is_open(name)]
    written = 0
    with SafetensorsWriter(path, specs, {"format": "pt"}, unknown) as writer:
        for name, parts in shard.items():
            if encoding is not None and encoding.encodes(name):
                written += _write_codes(writer, _encoded(source, name, transform, encoding))
            elif name.startswith(others):
                carried = source.tensor(name)
                writer.write(name, carried)
                written += carried.nbytes
                del carried
            else:
                dtype, shape = parts[name]
                writer.write_parts(name, _dense(source, name, transform, dtype))
                written += dtype.itemsize * torch.Size(shape).numel()
            source.release(name)
    return written


def _write_codes(writer: SafetensorsWriter, ready: dict[str, torch.Tensor]) -> int:
    """Write the tensors of a quantised weight; returns their bytes."""
    for name, tensor in ready.items():
        writer.write(name, tensor)
    return sum(tensor.nbytes for tensor in ready.values())


def _dense(
    source: ModelSource, name: str, transform: Transform, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Tensor `name` as it is written: whole, or in parts if it is of no layer."""
    parts = row_parts(source, name) if outside_layers(name) else _whole(source, name)
    for part in parts:
        changed = transform(name, part)
        del part  # Neither it nor what it becomes stays in memory while the next is made.
        ready = changed.to(dtype)
        del changed
        _require_finite(source, name, ready)
        yield ready
        del ready


def _whole(source: ModelSource, name: str) -> Iterator[torch.Tensor]:
    yield source.tensor(name)


def _encoded(
    source: ModelSource, name: str, transform: Transform, encoding: Encoding
) -> dict[str, torch.Tensor]:
    """The tensors of weight `name` in codes: those of the source where nothing changes it."""
    stored = encoding.stored_parts(name)
    if stored is not None:
        return stored
    tensor = transform(name, source.tensor(name)).to(encoding.dtype)
    _require_finite(source, name, tensor)
    return encoding.parts(name, tensor)


def _require_finite(source: ModelSource, name: str, tensor: torch.Tensor) -> None:
    if not _finite(tensor):
        raise CheckpointError(
            f"{source.path}: tensor {name} holds values that are not finite as {tensor.dtype}. "
            "Nothing was written; the weights or the adapter are damaged, or need a type "
            "with a wider range (bfloat16 or float32)."
        )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite, without a temporary of the tensor's own size."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(2**20))


def _main_type(shards: list[_Shard], encoding: Encoding | None) -> torch.dtype:
    """The type of most weights."""
    if encoding is not None:
        return encoding.dtype
    elements: dict[torch.dtype, int] = {}
    specs = (spec for shard in shards for parts in shard.values() for spec in parts.values())
    for kind, shape in specs:
        elements[kind] = elements.get(kind, 0) + torch.Size(shape).numel()
    return max(elements, key=lambda kind: elements[kind])


def _write_small_files(
    source: ModelSource, folder: Path, dtype: torch.dtype, encoding: Encoding | None
) -> None:
    config = complete_config(source.raw_config, source.config, dtype)
    if encoding is not None:
        config["quantization_config"] = encoding.quantization_config()
    durable.write_json(folder / "config.json", config)
    if source.generation_config:
        durable.write_json(folder / "generation_config.json", source.generation_config)
    pruning = read_pruning(source.path)
    if pruning is not None:  # fine-tuning what is written here must know which heads are pruned
        durable.write_json(folder / PRUNING, carried(pruning))
    write_tokenizer(source, folder)


def write_tokenizer(source: TokenizerSource, folder: Path) -> None:
    """Write the files of a model's tokenizer and its chat templates, byte by byte."""
    for name, content in source.tokenizer_files().items():
        target = folder / name
        names.mkdir(target.parent, exist_ok=True)
        durable.write_bytes(target, content)
