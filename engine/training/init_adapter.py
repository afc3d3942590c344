"""Train on from an earlier adapter: its settings, and whether it fits."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from engine.config.choices import SAVED_MODULES
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, EngineError
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.fit import check_fit
from engine.model_sources.adapter.peft import Adapter, uniform
from engine.model_sources.adapter.provenance import BASE_FILE, read_base
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.adapter_path import open_adapter
from engine.model_sources.interface.model_source import ModelSource
from engine.storage.home import real
from engine.training.trainable import targets_of
from models.adapters import scale_of
from models.config.model_config import ModelConfig
from models.tensor_names import PROJECTIONS

log = logging.getLogger(__name__)


def with_init_adapter(config: TrainConfig) -> TrainConfig:
    """`config` with the adapter's rank, scale and targets where the user named none.

    An adapter that cannot be read leaves it as it is: the checks of the run say why.
    """
    if config.init_adapter is None or config.every_weight:
        return config
    try:
        adapter = open_adapter(config.init_adapter)
    except EngineError:
        return config
    rank, scale = _rank_and_scale(adapter)
    leaves = {module.rpartition(".")[2] for module in adapter.pairs}
    own: dict[str, Any] = {
        "lora_rank": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,
        "use_dora": adapter.config.use_dora,
        "target_modules": tuple(name for name in PROJECTIONS if name in leaves),
    }
    if {"lora_alpha", "use_rslora"} & config.model_fields_set:
        del own["lora_alpha"], own["use_rslora"]
    if not own["target_modules"]:
        del own["target_modules"]
    whole = _whole_modules(adapter)
    if whole:
        own["modules_to_save"] = whole
    unset = {key: value for key, value in own.items() if key not in config.model_fields_set}
    return config.model_copy(update=unset)


def check_init_adapter(config: TrainConfig, model: ModelConfig) -> Adapter | None:
    """The adapter of `init_adapter`, if there is one and it fits the model and the settings.

    Shapes decide; another name of the base is a warning. Raises `CheckpointError` naming every
    mismatch.
    """
    if config.init_adapter is None:
        return None
    adapter = open_adapter(config.init_adapter)
    check_fit(adapter, model, config.model)
    wrong = _unlike(config, adapter, model)
    if wrong:
        raise _refused(config, wrong)
    name = adapter.config.base_model_name_or_path
    if "digest" not in read_base(adapter.path) and not _same_model(name, config.model):
        log.warning(
            "the adapter names %s as its base, this run trains on %s; their shapes agree",
            name, config.model,
        )  # fmt: skip
    return adapter


def open_init_adapter(
    config: TrainConfig, adapter: Adapter | None, source: ModelSource, digest: str
) -> InitAdapter | None:
    """The checked adapter on `source`, the base whose files have `digest`.

    Raises `CheckpointError` where the adapter records that it was trained on other weights.
    """
    if adapter is None:
        return None
    base = read_base(adapter.path).get("digest")
    if base is not None and base != digest:
        raise CheckpointError(
            f"The adapter {config.init_adapter} was trained on another base "
            f"({adapter.config.base_model_name_or_path}) than {config.model}, whose files differ "
            "from those that it notes. Train on that base, or leave out --init-adapter to start a "
            "new adapter. If the two are the same model in other files, a copy of the adapter "
            f"without its {BASE_FILE} is taken as it is: rm '{adapter.path / BASE_FILE}'."
        )
    adapted = AdaptedSource(source, adapter)
    fixed_tensors = adapted.folded - _trained_again(config, adapted)
    if fixed_tensors:
        log.warning(
            "%d tensors that the adapter holds beside its pairs stay as they are: they are not "
            "trained on, and are saved with the new adapter", fixed_tensors,
        )  # fmt: skip
    _, scale = _rank_and_scale(adapter)
    _, everything = uniform({**adapted.pairs, **adapted.folded_pairs}, adapted.scales, scale)
    pairs = {module: everything[module] for module in adapted.pairs}
    fixed = {module: everything[module] for module in adapted.folded_pairs}
    return InitAdapter(adapted, pairs, fixed, scale)


def _whole_modules(adapter: Adapter) -> tuple[str, ...]:
    """The modules that an adapter holds whole and that can be trained on."""
    leaves = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.others.copies}
    return tuple(module for module in SAVED_MODULES if module in leaves)


def _trained_again(config: TrainConfig, adapted: AdaptedSource) -> int:
    """How many of the adapter's whole tensors the run trains on."""
    leaves = [name.removesuffix(".weight").rpartition(".")[2] for name in adapted.copied]
    return sum(leaf in config.saved_modules for leaf in leaves)


def _refused(config: TrainConfig, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The adapter {config.init_adapter} cannot be trained on from here: {'; '.join(wrong)}. "
        "Give the settings it was trained with, leave them out to take the adapter's, or leave out "
        "--init-adapter to start a new one."
    )


def _rank_and_scale(adapter: Adapter) -> tuple[int, float]:
    """The rank that all pairs fit in, and the factor that most share."""
    ranks = [int(a.shape[0]) for a, *_ in adapter.pairs.values()] or [adapter.config.r]
    return max(ranks), adapter.config.scale


def _unlike(config: TrainConfig, adapter: Adapter, model: ModelConfig) -> list[str]:
    """What of the settings contradicts the adapter."""
    wrong = list[str]()
    rank, scale = _rank_and_scale(adapter)
    if rank != config.lora_rank:
        wrong.append(f"its rank is {rank}, --lora-rank is {config.lora_rank}")
    # An adapter of rsLoRA has the root in its alpha, so the scales are compared.
    if not math.isclose(scale, scale_of(config.lora_rank, config.lora_alpha, config.use_rslora)):
        wrong.append(
            f"its alpha is {scale * rank:g}, this run's {config.lora_alpha:g} "
            f"(rslora {config.use_rslora})"
        )
    if adapter.config.use_dora != config.use_dora:
        wrong.append(f"its use_dora is {adapter.config.use_dora}, this run's {config.use_dora}")
    targets = {path.rpartition(".")[2] for path in adapter.pairs} & set(PROJECTIONS)
    wanted = set(targets_of(config, model))
    if targets != wanted:
        wrong.append(f"it adapts {_listed(targets)}, --target-modules is {_listed(wanted)}")
    ranks = {int(a.shape[0]) for a, *_ in adapter.pairs.values()}
    others = adapter.others
    by_pairs = {m.rpartition(".")[2] for m in (*others.embeddings, *others.rows, *adapter.pairs)}
    twice = sorted(by_pairs & set(config.saved_modules))
    if twice:
        wrong.append(
            f"it adapts {', '.join(twice)} by a pair or by single rows, --modules-to-save is "
            f"{', '.join(config.saved_modules)}"
        )
    changed = adapter.config.initial
    if changed == "kasa" or (changed and len(ranks) > 1):
        wrong.append(f"its initialisation ({changed}) cannot be written again from here")
    return wrong


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _same_model(left: str, right: str) -> bool:
    """Whether two names of a model mean the same: equal paths, or the same last part."""
    if not left:
        return True
    return real(left) == real(right) or (Path(left).name.lower() == Path(right).name.lower())
