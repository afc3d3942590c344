"""Write a model as a GGUF file, tensor by tensor.

The container is the `gguf` package's, the numbers are ours. Memory holds one tensor of the model
and some rows of its new form; the file appears under its name when it is complete, of several the
first one last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.exporting.gguf_layout import GGUFTensor, layout
from engine.exporting.gguf_metadata import architecture, shape_metadata
from engine.exporting.gguf_types import FLOATS, FileType, bytes_of, file_type, format_of
from engine.exporting.gguf_vocabulary import vocabulary
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import outside_layers, row_parts, split_rows
from engine.storage import durable
from kernels.gguf import FORMATS, quantize
from models.tensor_layout import Layout
from models.tensor_names import graph_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

_AS_16_BIT = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WrittenGGUF:
    """The files written, their tensors (of an adapter: pairs) and how many have each format.

    `pushed` is the address of their upload.
    """

    files: list[Path]
    tensors: int
    total_bytes: int
    formats: dict[str, int]
    pushed: str | None = None


def require_gguf() -> None:
    """Raises `ConfigError` where the `gguf` package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "GGUF files are written with the `gguf` package, which is not installed. "
            "Run: pip install 'engine-trainer[gguf]'"
        ) from error


def write_gguf(
    source: ModelSource,
    output: Path,
    type_name: str,
    *,
    importance: Mapping[str, Tensor] | None = None,
    max_file_size: int = 0,
    name: str | None = None,
    more: Callable[[Path, str], None] | None = None,
) -> WrittenGGUF:
    """Write the model as `output`, a new `.gguf` file of a type of `FILE_TYPES`.

    `importance` holds the mean square of each input of a parameter of the graph: (columns,), of
    experts (E, columns).
    `max_file_size` in bytes divides the model into files `NAME-00001-of-0000N.gguf`; 0 does not.
    `more(folder, first)` writes what is to stand beside `first`, the file to open, into a folder.

    Raises `ConfigError` for a model that llama.cpp has no form of, an occupied output or an unknown
    type, and `CheckpointError` for weights that are not finite or a disk that refuses.
    """
    require_gguf()
    kind = file_type(type_name)
    config = source.config
    output = output.absolute()
    if output.suffix != ".gguf":
        raise ConfigError(f"{output} should end in .gguf, as llama.cpp and Ollama ask for.")
    tensors = layout(config)
    formats = {tensor.name: format_of(tensor, config, kind) for tensor in tensors}
    sizes = {t.name: bytes_of(t.shape, formats[t.name]) for t in tensors}
    durable.require_space(output, sum(sizes.values()))
    metadata = model_metadata(source, kind, name or output.stem)
    with durable.publish_files(output) as folder:
        writer = metadata_writer(
            folder / output.name, architecture(config), metadata, max_file_size
        )
        for tensor in tensors:
            _declare(writer, tensor, formats[tensor.name], sizes[tensor.name])
        files = [output.with_name(path.name) for path in writer.format_shard_names(writer.path)]
        for file in files:
            durable.refuse_occupied(file)
        with closing(writer):
            _write(writer, source, tensors, formats, importance or {})
        if more is not None:
            more(folder, files[0].name)
    counted = {form: list(formats.values()).count(form) for form in sorted(set(formats.values()))}
    total = sum(os.path.getsize(file) for file in files)  # noqa: PTH202
    return WrittenGGUF(files, len(tensors), total, counted)


def model_metadata(source: ModelSource, kind: FileType, name: str) -> dict[str, Any]:
    """Key -> value of the whole file."""
    arch = architecture(source.config)
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": kind.number,
        "general.quantization_version": 2,
    }
    keys |= {f"{arch}.{key}": value for key, value in shape_metadata(source.config).items()}
    return keys | {f"tokenizer.{key}": value for key, value in vocabulary(source).items()}


def metadata_writer(
    path: Path, arch: str, metadata: Mapping[str, Any], max_file_size: int = 0
) -> GGUFWriter:
    """The package's writer of a file, with its metadata."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch, split_max_size=max_file_size)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    return writer


def _declare(writer: GGUFWriter, tensor: GGUFTensor, form: str, size: int) -> None:
    from gguf import GGMLQuantizationType

    number = FLOATS[form] if form in FLOATS else FORMATS[form].number
    plain = np.dtype(np.float16)  # any type but uint8, which would say that the shape is in bytes
    writer.add_tensor_info(tensor.name, tensor.shape, plain, size, GGMLQuantizationType(number))


def _write(
    writer: GGUFWriter,
    source: ModelSource,
    tensors: list[GGUFTensor],
    formats: Mapping[str, str],
    importance: Mapping[str, Tensor],
) -> None:
    """Write the header and then every tensor, read one at a time."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stored = Layout.of_names(source.config, source.names())
    shapes = graph_tensors(source.config)
    for tensor in tensors:
        weights = importance.get(tensor.parameter or "")
        if weights is not None and tensor.columns_move:
            weights = tensor.make(weights.view(1, -1)).view(-1)
        if tensor.parameter is not None and outside_layers(tensor.parameter):
            rows = map(tensor.make, row_parts(source, stored.path(tensor.parameter)))
        else:
            rows = map(tensor.make, _whole(source, stored, tensor.parameter, shapes))
        parts = _InParts(rows, tensor.shape, formats[tensor.name], weights)
        try:
            writer.write_tensor_data(cast("np.ndarray[Any, Any]", parts))
        except ValueError as error:
            raise CheckpointError(f"{source.path}: tensor {tensor.parameter}: {error}.") from error
        if tensor.parameter is not None:
            for part in stored.parts(tensor.parameter, shapes[tensor.parameter]):
                source.release(part)


def _whole(
    source: ModelSource, stored: Layout, name: str | None, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Tensor]:
    """The graph's parameter `name`; nothing for a tensor that is made of none."""
    yield torch.empty(0) if name is None else stored.assemble(name, shapes[name], source.tensor)


class _InParts:
    """The bytes of a tensor in a format, made while they are written.

    It stands for an array where the package writes one: `nbytes` and `tofile` are what it asks for.
    """

    def __init__(
        self, rows: Iterable[Tensor], shape: tuple[int, ...], form: str, importance: Tensor | None
    ) -> None:
        """`rows` are the tensor's: all of them at once or some after others."""
        self._rows, self._importance, self._form = rows, importance, form
        self.nbytes = bytes_of(shape, form)

    def tofile(self, file: BinaryIO) -> None:
        """Write all parts. Raises `ValueError` for values that the format does not hold."""
        for tensor in self._rows:
            self._write(tensor, file)
            del tensor  # Else it stays in memory while the next is made.

    def _write(self, tensor: Tensor, file: BinaryIO) -> None:
        # Experts are parts of their own, for some lie apart in a tensor of gate and up.
        for number, matrix in enumerate(tensor.unbind() if tensor.dim() == 3 else (tensor,)):
            weights = self._importance
            if weights is not None and weights.dim() == 2:
                weights = weights[number]
            for part in split_rows(matrix):
                file.write(encoded(part, self._form, weights).data)


def encoded(tensor: Tensor, form: str, importance: Tensor | None) -> np.ndarray[Any, Any]:
    """A vector or matrix in a format of the file, as an array. Raises `ValueError`."""
    if form not in FLOATS:
        return quantize(tensor, form, importance).numpy()
    wanted = _AS_16_BIT.get(form, torch.float32)
    made = tensor.to(wanted).contiguous()
    if not torch.isfinite(made).all():
        raise ValueError(f"it holds values that are not finite as {form}; choose bf16 or f32")
    return made.view(torch.uint8).numpy() if form == "bf16" else made.numpy()
