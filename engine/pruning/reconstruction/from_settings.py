"""Scores and repairs as the settings of `engine prune` ask for them."""

from __future__ import annotations

import logging
import math
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
from engine.model_sources.quantised.stored_codes import used_weights
from engine.pruning.calibration import (
    TOKENS_PER_BATCH,
    Calibration,
    calibration_examples,
    measured_scores,
)
from engine.pruning.reconstruction.importance import reconstruction_scores
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.memory import (
    calibration_peak,
    scoring_peak,
    weight_bytes,
)
from engine.pruning.reconstruction.repair import Change, HeadRepair
from engine.pruning.reconstruction.sensitivity import PrefixDivergence
from engine.pruning.scores import LayerScores, weight_scores
from models.head_slices import HeadSlices

log = logging.getLogger(__name__)
_FP32 = 4


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
        stream = LayerStream(source, examples, how)
        blank = weight_scores(source, layers, "random")
        measured = whole_model(source, examples, how) if settings.measures_layers else None
        ridge = settings.repair_ridge
        level = settings.form == "structural" and not settings.per_layer
        return reconstruction_scores(
            blank,
            stream,
            settings.grouping,
            ridge,
            measured,
            level=level,
            repairs=settings.repairs,
        )
    if metric in METRICS_WITH_DATA:
        return measured_scores(source, layers, metric, rows(), how)
    return weight_scores(source, layers, metric, seed=settings.seed, through=settings.quantize)


def say_memory(source: ModelSource, examples: Sequence[Example], settings: PruneSettings) -> None:
    """Say what work on the rows will take, and warn where there is less."""
    peak, device = memory_of(source, examples, settings), resolve_device(settings.device)
    log.info("Calibration on %d rows takes about %s", len(examples), gib(peak))
    available = free_memory(device)
    if available < peak:
        log.warning(
            "That is more than the %s that are free: fewer --calibration-rows, --scope global "
            "(which does not need the whole model), or another machine.",
            gib(available),
        )


def memory_of(source: ModelSource, examples: Sequence[Example], settings: PruneSettings) -> int:
    """The most bytes that scoring and repairing on these rows take."""
    config, metric, parts = source.config, settings.importance, settings.parts
    tokens = sum(map(len, examples))
    compute = resolve_dtype(settings.compute_dtype, resolve_device(settings.device)).itemsize
    written = parse_dtype(settings.dtype or type_to_write(source))
    whole = weight_bytes(config, compute, used_weights(source, settings.quantize)[0])
    gaps = settings.target is None and settings.what == "layers"
    streamed = calibration_peak(
        config,
        tokens,
        compute=compute,
        stored=_FP32 if written is None else written.itemsize,
        channels="mlp" in parts or "layers" in parts,
        gaps=math.ceil(settings.share * config.num_hidden_layers) if gaps else None,
    )
    if settings.prunes_heads and metric in ("l2-output", "gradient"):
        gradient, longest = metric == "gradient", max(map(len, examples), default=0)
        batch = longest if gradient else max(longest, min(tokens, TOKENS_PER_BATCH))
        scored = scoring_peak(config, batch, compute=compute, gradient=gradient)
        return max(whole + scored, streamed if settings.repairs else 0)
    beside = settings.target is not None or (
        metric == "l2-reconstruction" and (settings.measures_layers or settings.what == "layers")
    )
    return streamed + whole * beside


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
