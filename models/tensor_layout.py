"""How a model's files name and divide the parameters of the graph.

The graph holds a mixture's experts as two tensors, `mlp.experts.gate_up_proj` (E, 2 I, H) and
`mlp.experts.down_proj` (E, H, I). A file holds the same two ("fused"), or one matrix per expert and
projection: `mlp.experts.J.gate_proj.weight`. The decoder of a model that has other parts too
stands under `model.language_model.` in its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.runtime.simulation import equal_parts_by
from models.config.model_config import ModelConfig
from models.families import FAMILIES

_EXPERTS = ".mlp.experts."
NESTED_PREFIX = "model.language_model."


@dataclass(frozen=True)
class Layout:
    """`nested` names stand under `model.language_model.`; `fused` experts are not divided."""

    nested: bool = False
    fused: bool = False

    @classmethod
    def of_hub(cls, config: ModelConfig) -> Layout:
        """As the family's files on the hub are."""
        return cls(config.nested, FAMILIES[config.model_type].fused_experts)

    @classmethod
    def of_names(cls, config: ModelConfig, names: Iterable[str]) -> Layout:
        """As a file with tensors of these names is; of the hub's files where it has no experts."""
        for name in names:
            _, separator, rest = name.partition(_EXPERTS)
            if separator and not name.startswith(carried_prefixes(config)):
                return cls(config.nested, not rest[:1].isdigit())
        return cls.of_hub(config)

    def path(self, name: str) -> str:
        """The file's name of a module or tensor that the graph calls `name`."""
        if not self.nested or not name.startswith("model."):
            return name
        return NESTED_PREFIX + name.removeprefix("model.")

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The file's tensors of the graph's parameter `name`: consecutive blocks of its rows."""
        stored = self.path(name)
        parent, _, leaf = stored.rpartition(".")
        if self.fused or _EXPERTS not in stored:
            return {stored: shape}
        count, rows, columns = shape
        both = leaf == "gate_up_proj"
        projections = ("gate_proj", "up_proj") if both else (leaf,)
        part = (rows // 2 if both else rows, columns)
        return {
            f"{parent}.{expert}.{projection}.weight": part
            for expert in range(count)
            for projection in projections
        }

    def assemble(self, name: str, shape: tuple[int, ...], read: Callable[[str], Tensor]) -> Tensor:
        """The graph's parameter `name` from the file's tensors; a copy only where it is divided."""
        parts = self.parts(name, shape)
        # One expert's matrix is divided too: its file has two dimensions.
        if shape in parts.values():
            return read(next(iter(parts)))
        whole = torch.empty(0)
        ends = accumulate(part[0] for part in parts.values())
        placed = zip(parts.items(), ends, strict=True)
        for (part, form), end in equal_parts_by(lambda one: one[0][1], placed):
            rows = read(part)
            if end == form[0]:
                whole = rows.new_empty(math.prod(shape[:-1]), shape[-1])
            if rows.dtype != whole.dtype:
                whole = whole.to(torch.promote_types(whole.dtype, rows.dtype))
            whole[end - form[0] : end] = rows
            del rows  # Decoded ones would all be in memory beside the whole.
        return whole.view(shape)

    def divide(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The file's tensors of the graph's parameter `name`, views of `tensor`."""
        parts = self.parts(name, tuple(tensor.shape))
        if tuple(tensor.shape) in parts.values():
            return dict.fromkeys(parts, tensor)
        rows = tensor.reshape(-1, tensor.shape[-1]).split([part[0] for part in parts.values()])
        return dict(zip(parts, rows, strict=True))


def path_in_file(config: ModelConfig, path: str) -> str:
    """The file's name of a module, given that or, as text-only programs write it, the graph's."""
    known = not config.nested or path.startswith(NESTED_PREFIX)
    return path if known else Layout(nested=True).path(path)


def carried_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """Names of tensors that belong to other parts of the model begin with one of these."""
    return FAMILIES[config.model_type].carried
