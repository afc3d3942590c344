"""`engine prune`: score heads, choose some, write the pruned model.

The model's tensors are read one at a time for the scores and once more for the output, which
appears under its name when it is complete: a model directory with `pruning.json` and a heat map.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.choices import METRICS_WITH_DATA
from engine.config.settings import given_settings
from engine.config.tasks.pruning import PruneSettings
from engine.data.sources.resolve import data_files
from engine.errors import ConfigError, listing
from engine.model_sources.export import WrittenModel, write_directory
from engine.model_sources.gguf.source import type_to_write
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import (
    PRUNING,
    HeadMap,
    MaskedSource,
    head_map,
    read_pruning,
    sealed,
)
from engine.model_sources.quantised.fates import say_decoded
from engine.provenance import version
from engine.pruning.apply import PrunedSlices
from engine.pruning.budgets.mixed import prune_to_target
from engine.pruning.cut import cut_source
from engine.pruning.heat_map import HEAT_MAP, draw
from engine.pruning.reconstruction.from_settings import (
    repair_of,
    rows_when_asked,
    say_memory,
    scores_of,
)
from engine.pruning.reconstruction.repair import Change, RepairedSource
from engine.pruning.report import LOADS_IN, MASKED_IN, all_pruned, describe
from engine.pruning.scores import (
    WEIGHTS_WARNING,
    LayerScores,
    prunable_heads,
)
from engine.pruning.selection import Rules, Selection, select
from engine.pruning.structures.prune_structures import prune_structures
from engine.runs.summary import write_summary
from engine.storage import durable
from models.head_slices import HeadSlices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneResult:
    """`record` is what `pruning.json` holds; `written` is None after a mere report.

    `scored` are the scores of the heads, where heads were pruned.
    """

    record: dict[str, Any]
    written: WrittenModel | None
    scored: list[LayerScores] | None = None


def prune(
    model: str | Path,
    output: str | Path | None,
    settings: PruneSettings | None = None,
    *,
    scored: list[LayerScores] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune `model` into the new folder `output`; without one only score and choose.

    The settings are given whole, or one by one as `options`: `fraction=0.1, metric="gradient"`.
    `scored` is what an earlier result of the same model, rows and metric has: heads are then not
    scored again, whatever the fraction.
    Raises `ConfigError` for settings that cannot be met (see `engine.pruning.selection`), and
    `CheckpointError` or `DataError` for files that cannot be used. Nothing is written then.
    """
    started = time.time()
    settings = given_settings(PruneSettings, settings, options)
    _check(settings)
    if output is not None:
        durable.refuse_occupied(Path(output))
    if settings.data:
        data_files(settings.data, settings.query)
    source = open_model_source(model)
    if settings.target is not None or not settings.prunes_heads:
        return _prune_structures(source, output, settings, started)
    layers = prunable_heads(source, settings.heads)
    rules = _rules(settings, source.config.num_hidden_layers)
    if settings.importance in ("l2-weights", "l2-weights-largest", "ov"):
        log.warning(WEIGHTS_WARNING, settings.importance)
    rows = rows_when_asked(source, settings)
    if settings.importance in METRICS_WITH_DATA or (settings.repairs and output is not None):
        say_memory(source, rows(), settings)
    if scored is None:
        scored = scores_of(source, layers, settings, rows)
    choice = select(scored, rules)
    record = describe(scored, rules, choice, settings.importance, settings.form)
    record |= {
        "engine_version": version(),
        "kind": settings.heads,
        "seed": settings.seed,
        "model": str(model),
        "base_digest": source.digest(),
    }
    if settings.per_layer:
        record["per_layer"] = True
    cut_before = bool(source.config.num_attention_heads_per_layer)
    uniform = rules.uniform and settings.heads == "attention"
    if settings.per_layer or (cut_before and not uniform):
        record["loads_in"] = LOADS_IN
    elif settings.form == "mask":
        record["loads_in"] = MASKED_IN
    if _uses_rows(settings):
        record["calibration_rows"] = settings.calibration_rows
        record["data"] = list(settings.data)
    if output is None:
        return PruneResult(record, None, scored)
    changes: Mapping[str, Change] = {}
    if settings.repairs:
        changes, record["repair"] = repair_of(source, scored, choice.heads, settings, rows)
    figures = {"heads": record["heads"], "metric": settings.importance, "mode": settings.form}
    sum_up = _summary(settings, model, Path(output), started, figures)
    say_decoded(source, "written dense")
    return _write((source, changes), Path(output), settings, (scored, choice, record), sum_up)


def _summary(
    settings: PruneSettings, model: str | Path, output: Path, started: float, figures: Any
) -> Callable[[Path], None]:
    """Writes summary.json into a folder."""
    parameters = settings.model_dump(mode="json") | {"model": model, "output": output}

    def sum_up(folder: Path) -> None:
        write_summary(
            folder, "prune", parameters, started=started, metrics=figures, output_path=output
        )

    return sum_up


def _prune_structures(
    source: ModelSource, output: str | Path | None, settings: PruneSettings, started: float
) -> PruneResult:
    """Parts of other kinds than heads, or of several. Raises as `prune` does."""
    if not settings.data:
        raise ConfigError(
            f"{_asked(settings)} runs the model on calibration rows: name a file of rows with "
            "--data."
        )
    protected = _protected(settings, source.config.num_hidden_layers)
    smaller = prune_structures if settings.target is None else prune_to_target
    left, record = smaller(source, settings, protected)
    record |= {
        "engine_version": version(),
        "model": str(source.path),
        "base_digest": source.digest(),
        "calibration_rows": settings.calibration_rows,
        "data": list(settings.data),
        "repair": {"method": "least-squares", "ridge": settings.repair_ridge}
        if settings.repairs and settings.what != "experts"
        else {"method": "none"},
    }
    if output is None:
        return PruneResult(record, None)
    record, output = sealed(record), Path(output)
    figures = {name: record[name] for name in ("what", "units", "parameters", "metric")}
    sum_up = _summary(settings, source.path, output, started, figures)

    def write_more(folder: Path) -> None:
        durable.write_json(folder / PRUNING, record)
        sum_up(folder)

    say_decoded(source, "written dense")
    dtype = settings.dtype or type_to_write(source)
    written = write_directory(
        left, output, lambda _, tensor: tensor, dtype, settings.max_shard_size, write_more
    )
    log.info("Pruned %s: %s", settings.what, output)
    return PruneResult(record, written)


def _asked(settings: PruneSettings) -> str:
    return f"--what {settings.what}" if settings.target is None else f"--target {settings.target}"


def _check(settings: PruneSettings) -> None:
    """Refuse settings that want rows and have none."""
    metric = settings.importance
    if metric in METRICS_WITH_DATA and not settings.data:
        raise ConfigError(
            f"--metric {metric} runs the model on calibration rows: name a file of rows with "
            "--data, or use --metric l2-weights, which needs none and can be worse than chance."
        )
    if settings.repairs and not settings.data:
        raise ConfigError(
            "--repair least-squares fits what is left to calibration rows: name a file of rows "
            "with --data, or leave --repair out."
        )
    if settings.ranking == "sensitivity" and metric != "l2-reconstruction":
        raise ConfigError(
            f"--scope sensitivity measures what l2-reconstruction leaves of a layer, and --metric "
            f"is {metric}. Use --metric l2-reconstruction, or --scope global or layer."
        )


def _uses_rows(settings: PruneSettings) -> bool:
    return settings.repairs or settings.importance in METRICS_WITH_DATA


def _rules(settings: PruneSettings, layers: int) -> Rules:
    return Rules(
        fraction=settings.share,
        scope=settings.ranking,
        granularity=settings.grouping,
        min_heads=settings.min_heads,
        min_kv_heads=settings.min_kv_heads,
        protected=_protected(settings, layers),
        uniform=settings.form == "structural" and not settings.per_layer,
        regular=settings.per_layer,
        allow_shortfall=settings.allow_shortfall,
    )


def _protected(settings: PruneSettings, layers: int) -> frozenset[int]:
    protected = {index + layers if index < 0 else index for index in settings.protect}
    protected |= set(range(settings.protect_first))
    protected |= set(range(layers - settings.protect_last, layers))
    outside = sorted(index for index in protected if not 0 <= index < layers)
    if outside:
        raise ConfigError(
            f"--protect asks for layers that are not there ({listing(map(str, outside))}); the "
            f"model has layers 0 to {layers - 1}, or -1 for the last."
        )
    return frozenset(protected)


def _write(
    changed: tuple[ModelSource, Mapping[str, Change]],
    output: Path,
    settings: PruneSettings,
    chosen: tuple[list[LayerScores], Selection, dict[str, Any]],
    sum_up: Callable[[Path], None],
) -> PruneResult:
    (source, changes), (scored, choice, record) = changed, chosen
    base, layers = source, [s.heads for s in scored]
    pruned = all_pruned(scored, choice.heads)
    mode = settings.form
    zero = PrunedSlices(source.config, pruned if mode == "zero" else {}).zero
    if mode == "mask" and isinstance(source, MaskedSource):
        source = source.base  # an earlier mask stays one that can be taken off
    if changes:
        source = RepairedSource(source, changes)
    if mode == "structural":
        source, pruned = cut_source(source, scored, choice, settings.per_layer)
    record = sealed(record | {"pruned_heads": head_map(_others(source, layers) | pruned)})

    def write_more(folder: Path) -> None:
        durable.write_json(folder / PRUNING, record)
        title = f"{settings.importance}: {choice.removed_heads} heads pruned"
        draw(scored, choice.heads, title, folder / HEAT_MAP)
        sum_up(folder)

    dtype = settings.dtype or type_to_write(base)
    written = write_directory(source, output, zero, dtype, settings.max_shard_size, write_more)
    log.info("Pruned %d heads: %s", choice.removed_heads, output)
    return PruneResult(record, written, scored)


def _others(source: ModelSource, layers: Sequence[HeadSlices]) -> HeadMap:
    """Pruned heads of layers of the other kind."""
    earlier = read_pruning(source.path)
    mine = {heads.layer for heads in layers}
    heads_of = {} if earlier is None else earlier.heads
    return {layer: heads for layer, heads in heads_of.items() if layer not in mine}
