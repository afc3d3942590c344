"""A model whose files hold codes, as plans see it: shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from engine.memory.simulate.simulated_meter import SimulatedMeter
from engine.model_sources.interface.model_source import ModelSource
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors, is_quantised

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


@dataclass(frozen=True)
class CodeForm:
    """How a file holds one weight in NF4 or in 8-bit rows: its tensors by their field."""

    parts: tuple[tuple[str, Part], ...]
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, codes: NF4Weight | Int8Weight) -> CodeForm:
        """That of a weight as it is stored."""
        block = codes.block_size if isinstance(codes, NF4Weight) else 0
        tensors = {name: part for name, part in vars(codes).items() if isinstance(part, Tensor)}
        parts = tuple((name, (tuple(part.shape), part.dtype)) for name, part in tensors.items())
        return cls(parts, tuple(codes.shape), block, codes.dtype)

    def weight(self) -> NF4Weight | Int8Weight:
        """Such a weight without memory."""
        own = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self.parts
        }
        if not self.block_size:
            return Int8Weight(own["codes"], own["absmax"], self.dtype)
        nested, offset = own.get("nested_absmax"), own.get("nested_offset")
        shape = (own["packed"], own["absmax"], nested, offset, self.shape)
        return NF4Weight(*shape, self.block_size, self.dtype)


@dataclass(frozen=True)
class StoredModel(ModelConfig):
    """A model's shape, and the weights that its files hold in codes, by name."""

    codes: Mapping[str, CodeForm] = field(default_factory=dict, hash=False)

    @property
    def is_even(self) -> bool:
        """Whether the same weights of every layer are in codes."""
        layers: dict[str, set[str]] = {}
        for name in self.codes:
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            layers.setdefault(layer, set()).add(rest)
        kinds = {frozenset(names) for names in layers.values()}
        return len(kinds) <= 1 and len(layers) in (0, self.num_hidden_layers)


def stored_model(source: ModelSource) -> ModelConfig:
    """The source's shape, for plans: with the codes of its files where they hold any."""
    codes = dict[str, CodeForm]()
    for name in source.names():
        stored = source.codes(name) if is_quantised(name) else None
        if stored is not None:
            codes[name] = CodeForm.of(stored)
            source.release(name)
    config = source.config
    if not codes:
        return config
    own = {entry.name: getattr(config, entry.name) for entry in fields(ModelConfig)}
    return StoredModel(**own, codes=codes)


class EmptySource:
    """A model source of which only names, shapes and the stored types are known."""

    def __init__(
        self,
        config: ModelConfig,
        stored: torch.dtype,
        meter: SimulatedMeter,
        resized: Collection[str] = (),
    ) -> None:
        self.config, self._stored, self._meter = config, stored, meter
        self._resized = resized
        self.path, self.raw_config = None, dict[str, object]()
        self._shapes = expected_tensors(config)
        self._codes = config.codes if isinstance(config, StoredModel) else {}

    def names(self) -> list[str]:
        """Names of the file's tensors."""
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file; on a CPU it is mapped and takes no memory.

        Unless it is decoded, or one of those that are `resized` as they are read.
        """
        if name in self._resized and self._meter.gpu is None:
            return torch.empty(self._shapes[name], dtype=self._stored, device="meta")
        if name in self._codes:
            return torch.empty(self._shapes[name], dtype=self._codes[name].dtype, device="meta")
        with self._meter.shapes_only():
            empty = torch.empty(self._shapes[name], dtype=self._stored, device="meta")
        if self._meter.gpu is None:
            self._meter.ignore([empty])
        return empty

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """A weight in the codes of the file, which are mapped; None where it is dense."""
        form = self._codes.get(name)
        if form is None:
            return None
        with self._meter.shapes_only():
            weight = form.weight()
        if self._meter.gpu is None:
            self._meter.ignore([p for p in vars(weight).values() if isinstance(p, Tensor)])
        return weight

    def release(self, name: str) -> None:
        """Nothing is mapped."""
