"""Which projections a run adapts, with which ranks, by PEFT's rules.

`target_modules` is a preset, a list of names or endings of names, or a pattern that has to match a
module's whole name; `layers` and `exclude_modules` leave some of those out. A module's rank and
alpha are those of the first pattern that matches its name or an ending of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.choices import TARGET_PRESETS
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, listing
from engine.model_sources.adapter.config import by_pattern
from engine.model_sources.adapter.targets import is_meant
from models.adapters import PairSize, target_modules
from models.config.model_config import ModelConfig
from models.tensor_layout import Layout
from models.tensor_names import MLP_PROJECTIONS, PROJECTIONS, graph_tensors, projections_of

_EXPERTS = ".mlp.experts."
_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Projected:
    """A projection of the graph: `count` matrices (rows, columns), more than one for experts.

    `path` is the graph's, `stored` that of the model's file; an expert's has no number.
    """

    path: str
    stored: str
    count: int
    rows: int
    columns: int

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it goes by."""
        return (self.stored,) if self.stored == self.path else (self.stored, self.path)

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.path.rpartition(".")[2]

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to a mixture's experts."""
        return _EXPERTS in self.path


Selection = dict[Projected, PairSize]
"""The adapted projections in the graph's order."""


def all_projections(model: ModelConfig) -> list[Projected]:
    """Every projection of a model that can be adapted."""
    layout, result = Layout(model.nested), list[Projected]()
    for name, shape in graph_tensors(model).items():
        if _EXPERTS in name and len(shape) == 3:
            parent, _, leaf = name.rpartition(".")
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for one in leaves:
                path, rows = f"{parent}.{one}", shape[1] // len(leaves)
                result.append(Projected(path, layout.path(path), shape[0], rows, shape[2]))
        path = name.removesuffix(".weight")
        if path != name and path.rpartition(".")[2] in PROJECTIONS:
            result.append(Projected(path, layout.path(path), 1, shape[0], shape[1]))
    return result


def is_plain(config: TrainConfig) -> bool:
    """Whether whole kinds of projections are adapted, in every layer and alike."""
    given = config.target_modules
    names = given in TARGET_PRESETS if isinstance(given, str) else set(given) <= set(PROJECTIONS)
    special = (config.layers, config.exclude_modules, config.rank_pattern, config.alpha_pattern)
    return names and not any(special)


def selection(config: TrainConfig, model: ModelConfig) -> Selection:
    """What the settings adapt of a model.

    Raises `ConfigError` where that is nothing, or not defined for the model's experts.
    """
    return _selection(config, model, all_projections(model))


def _selection(config: TrainConfig, model: ModelConfig, every: list[Projected]) -> Selection:
    raw = peft_keys(config, model)
    sizes = {
        projection: _size(config, projection)
        for projection in every
        if _chosen(raw, projection.names)
    }
    if not sizes:
        raise ConfigError(
            f"--target-modules {_shown(config.target_modules)}, with --layers and "
            f"--exclude-modules, means none of the projections of a {model.model_type} model. "
            f"They are called {every[0].stored} and so on, and end in "
            f"{', '.join(projections_of(model))}."
        )
    _check_experts(config, model, sizes)
    return sizes


def leaves_of(selected: Iterable[Projected]) -> tuple[str, ...]:
    """The last parts of the names of the adapted projections."""
    leaves = {projection.leaf for projection in selected}
    return tuple(name for name in PROJECTIONS if name in leaves)


def check_selection(config: TrainConfig, model: ModelConfig) -> Selection:
    """`selection`, where every name, layer and pattern of the settings means something.

    Raises `ConfigError` naming one that does not.
    """
    listed = config.target_modules
    try:
        if not isinstance(listed, str):
            target_modules([name for name in listed if "." not in name] or "all")
    except ValueError as error:
        raise ConfigError(f"--target-modules: {error}.") from error
    every = all_projections(model)
    names = [name for projection in every for name in projection.names]
    for flag, value in (("target", listed), ("exclude", config.exclude_modules)):
        missing = [] if isinstance(value, str) else [n for n in value if not _named(n, names)]
        if missing:
            raise ConfigError(
                f"--{flag}-modules: a {model.model_type} model has no {', '.join(missing)}; it has "
                f"{', '.join(projections_of(model))}."
            )
    layers_of(config.layers, model.num_hidden_layers)
    selected = _selection(config, model, every)
    _check_patterns(config, selected)
    return selected


def _check_patterns(config: TrainConfig, selected: Selection) -> None:
    """Patterns that match nothing are misspelt; PEFT would pass over them."""
    names = [name for projection in selected for name in projection.names]
    given = (("rank", config.rank_pattern), ("alpha", config.alpha_pattern))
    for flag, patterns in given:
        for pattern in patterns:
            if all(by_pattern({pattern: True}, name, None) is None for name in names):
                raise ConfigError(
                    f"--{flag}-pattern: {pattern!r} matches none of the modules that are adapted, "
                    f"such as {names[0]}. Patterns match a module's name or an ending of it."
                )


def _check_experts(config: TrainConfig, model: ModelConfig, selected: Selection) -> None:
    """What is not defined for the experts of a mixture."""
    experts = any(projection.is_expert for projection in selected)
    if experts and not is_plain(config):
        raise ConfigError(
            "--layers, --exclude-modules, --rank-pattern, --alpha-pattern and patterns of modules "
            f"are not for the experts of a {model.model_type} model, which PEFT adapts in all "
            "layers alike. Adapt the attention alone with --target-modules attn, or leave them out."
        )
    sparse = any(model.sparse_layers) and any(p.leaf in MLP_PROJECTIONS for p in selected)
    if config.use_dora and sparse:
        raise ConfigError(
            f"use_dora is not defined for the experts of a {model.model_type} model: they are "
            "parameters of many matrices, for which PEFT refuses DoRA, so that no program could "
            "load the adapter. Adapt the attention alone with --target-modules attn, or leave "
            "--use-dora out."
        )


def peft_keys(config: TrainConfig, model: ModelConfig) -> dict[str, Any]:
    """The settings as the keys of PEFT's configuration that choose modules."""
    given = config.target_modules
    if given in TARGET_PRESETS or not isinstance(given, str):
        names = target_modules(given) if isinstance(given, str) else given
        given = tuple(names)
    return {
        "target_modules": given if isinstance(given, str) else list(given),
        "exclude_modules": _as_listed(config.exclude_modules),
        "layers_to_transform": layers_of(config.layers, model.num_hidden_layers) or None,
    }


def _as_listed(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _chosen(raw: Mapping[str, Any], names: Iterable[str]) -> bool:
    return any(is_meant(raw, name, "settings") for name in names)


def _size(config: TrainConfig, projection: Projected) -> PairSize:
    """Rank and alpha of a projection: of the first pattern that matches one of its names."""
    rank: int | None = None
    alpha: float | None = None
    for name in projection.names:
        rank = by_pattern(config.rank_pattern, name, None) if rank is None else rank
        alpha = by_pattern(config.alpha_pattern, name, None) if alpha is None else alpha
    return PairSize(
        config.lora_rank if rank is None else int(rank),
        config.lora_alpha if alpha is None else float(alpha),
    )


def layers_of(text: str | None, count: int) -> list[int]:
    """Numbers of the layers in `8-31,3` or `16-`, of `count`. Raises `ConfigError` beyond them."""
    numbers: set[int] = set()
    for part in (text or "").split(",") if text else []:
        first, dash, last = part.partition("-")
        end = int(last) if last else count - 1 if dash else int(first)
        if int(first) > end or end >= count:
            raise ConfigError(
                f"--layers {text}: the model has the layers 0 to {count - 1}, and {part} is not "
                "among them."
            )
        numbers |= set(range(int(first), end + 1))
    return sorted(numbers)


def layers_are_alike(config: TrainConfig, model: ModelConfig) -> bool:
    """Whether every layer is adapted as the others of its kind are."""
    if config.every_weight or is_plain(config):
        return True
    by_layer: dict[int, dict[str, PairSize]] = {n: {} for n in range(model.num_hidden_layers)}
    for projection, size in selection(config, model).items():
        match = _LAYER.fullmatch(projection.path)
        if match is not None:
            by_layer[int(match[2])][match[3]] = size
    return all(own == by_layer[number % model.period] for number, own in by_layer.items())


def adapted_elements(selected: Selection, use_dora: bool) -> int:
    """Elements of all pairs, under DoRA with their magnitudes."""
    return sum(
        p.count * (size.rank * (p.rows + p.columns) + (p.rows if use_dora else 0))
        for p, size in selected.items()
    )


def _named(ending: str, names: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for name in names)


def _shown(value: str | tuple[str, ...]) -> str:
    return repr(value) if isinstance(value, str) else listing(list(value))
