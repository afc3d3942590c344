"""Compare an adapter with the names and shapes of a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.peft import Adapter
from engine.model_sources.adapter.targets import check_targets
from models.config.model_config import ModelConfig
from models.tensor_layout import NESTED_PREFIX, Layout, path_in_file
from models.tensor_names import expected_tensors

log = logging.getLogger(__name__)

HEAD = "lm_head"
T = TypeVar("T")


def module_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path of every module that has a weight -> its shape; experts one by one, the head always."""
    stored = expected_tensors(model, Layout(model.nested, fused=False))
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in stored.items()
        if name.endswith(".weight")
    }
    return shapes | {HEAD: (model.vocab_size, model.hidden_size)}


def check_fit(adapter: Adapter, model: ModelConfig, name: str | Path) -> None:
    """Compare an adapter's pairs with the modules of `model`, which messages call `name`.

    Raises `CheckpointError` listing modules that are not there, other shapes, and modules that the
    adapter's configuration means without having them.
    """
    names, shapes = ModuleNames(model, adapter), module_shapes(model)
    pairs = names.all(adapter.pairs)
    strays = [module for module in pairs if module not in shapes]
    wrong = [
        f"{module} has {list(shapes[module])}, the adapter [{b.shape[0]}, {a.shape[1]}]"
        for module, (a, b, *_) in pairs.items()
        if module in shapes and shapes[module] != (b.shape[0], a.shape[1])
    ]
    if strays or wrong:
        raise CheckpointError(
            f"The adapter {adapter.path} does not fit the model {name}. Modules that the "
            f"model does not have: {listing(strays) or 'none'}. Of another shape: "
            f"{listing(wrong) or 'none'}. Name the model that the adapter was trained on."
        )
    check_targets(adapter, {module: names.of(module) for module in shapes}, names.path)


class ModuleNames:
    """The model's names of an adapter's modules, which may be those of a text-only model."""

    def __init__(self, model: ModelConfig, adapter: Adapter) -> None:
        self._model = model
        modules = [*adapter.pairs, *adapter.others.modules()]
        self._bare = any(m.startswith(("layers.", "embed_tokens")) for m in modules)
        if self._bare:
            log.warning(
                "%s: its modules are named without 'model.', as of a model without a head; they "
                "are taken for the decoder's", adapter.path,
            )  # fmt: skip

    def path(self, name: str) -> str:
        """The model's name of a module or tensor of the adapter."""
        if self._bare and not name.startswith(HEAD):
            name = f"model.{name}"
        return path_in_file(self._model, name)

    def all(self, values: dict[str, T]) -> dict[str, T]:
        """`values` under the model's names."""
        return {self.path(name): value for name, value in values.items()}

    def of(self, module: str) -> list[str]:
        """All names that a module of the model goes by."""
        text = module.replace(NESTED_PREFIX, "model.") if self._model.nested else module
        return [module, text, *([text.removeprefix("model.")] if self._bare else [])]
