"""Scores and repairs as the settings of `engine prune` ask for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from engine.config.choices import METRICS_WITH_DATA
from engine.config.tasks.pruning import PruneSettings
from engine.data.examples import Example
from engine.device import resolve_device, resolve_dtype
from engine.errors import gib
from engine.memory.auto_policy import free_memory
from engine.model_sources.export import parse_dtype
from engine.model_sources.gguf.source import type_to_write
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_model
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.calibration import Calibration, calibration_examples, measured_scores
from engine.pruning.reconstruction.importance import reconstruction_scores
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.memory import calibration_peak
from engine.pruning.reconstruction.repair import Change, HeadRepair
from engine.pruning.reconstruction.sensitivity import PrefixDivergence
from engine.pruning.scores import LayerScores, weight_scores
from models.head_slices import HeadSlices

log = logging.getLogger(__name__)


def calibration_of(settings: PruneSettings) -> Calibration:
    """The rows to run, and how the model is loaded for them."""
    return Calibration(
        settings.data,
        settings.query,
        rows=settings.calibration_rows,
        max_length=settings.max_length,
        quantize=settings.quantize,
        device=settings.device,
        dtype=settings.compute_dtype,
    )


Rows = Callable[[], list[Example]]
"""Gives the calibration rows. Raises `DataError` for rows that cannot be used."""


def rows_when_asked(source: ModelSource, settings: PruneSettings) -> Rows:
    """The calibration rows, read once, when they are first asked for."""
    return cache(lambda: calibration_examples(source, calibration_of(settings)))


def scores_of(
    source: ModelSource, layers: Sequence[HeadSlices], settings: PruneSettings, rows: Rows
) -> list[LayerScores]:
    """Scores of every head of `layers`. Raises `DataError` and `CheckpointError`."""
    metric, how = settings.importance, calibration_of(settings)
    if metric == "l2-reconstruction":
        examples = rows()
        say_memory(source, examples, settings, settings.measures_layers)
        stream = LayerStream(source, examples, how)
        blank = weight_scores(source, layers, "random")
        measured = whole_model(source, examples, how) if settings.measures_layers else None
        ridge = settings.repair_ridge
        level = settings.form == "structural" and not settings.per_layer
        return reconstruction_scores(blank, stream, settings.grouping, ridge, measured, level=level)
    if metric in METRICS_WITH_DATA:
        return measured_scores(source, layers, metric, rows(), how)
    return weight_scores(source, layers, metric, seed=settings.seed, through=settings.quantize)


def say_memory(
    source: ModelSource, examples: Sequence[Example], settings: PruneSettings, whole: bool
) -> None:
    """Say what a pass over the rows will take, and warn where the host has less."""
    device = resolve_device(settings.device)
    peak = calibration_peak(
        source.config,
        sum(map(len, examples)),
        compute=resolve_dtype(settings.compute_dtype, device).itemsize,
        stored=2 if settings.dtype in ("bfloat16", "float16") else 4,
        channels=settings.what == "mlp",
        whole=whole,
    )
    log.info("Calibration on %d rows takes about %s", len(examples), gib(peak))
    available = free_memory(device)
    if available < peak:
        log.warning(
            "That is more than the %s that are free: fewer --calibration-rows, --scope global "
            "(which does not need the whole model), or another machine.",
            gib(available),
        )


def whole_model(
    source: ModelSource, examples: Sequence[Example], how: Calibration
) -> PrefixDivergence:
    """The whole model, to be run from any layer on."""
    device = resolve_device(how.device)
    dtype = resolve_dtype(how.dtype, device)
    model = build_model(source, quantization=how.quantize, device=device, dtype=dtype)
    return PrefixDivergence(model, examples)


def repair_of(
    source: ModelSource,
    scored: Sequence[LayerScores],
    chosen: HeadMap,
    settings: PruneSettings,
    rows: Rows,
) -> tuple[dict[str, Change], dict[str, Any]]:
    """New values of what is left by the tensor's name, and what the record says of them."""
    stream = LayerStream(source, rows(), calibration_of(settings))
    dtype = parse_dtype(settings.dtype or type_to_write(source))
    repair = HeadRepair(stream, settings.repair_ridge, dtype)
    repair.run(scored, chosen)
    told = {"method": "least-squares", "ridge": settings.repair_ridge, "layers": repair.told}
    return repair.changes, told | {"tokens": len(stream.states)}
