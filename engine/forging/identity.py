"""What decides a job's results, and how earlier versions wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from engine.config.spelling import METRIC_NAMES
from engine.config.tasks.pruning import ForgeSettings, PruneSettings
from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.sources.resolve import data_files
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.runs.identity import digest_files

RENAMED = {**TrainConfig.renamed, **ForgeSettings.renamed}
"""Earlier names of settings, which an older job's directory has."""


def identity(settings: ForgeSettings) -> dict[str, Any]:
    """What decides the results of a job, as JSON has it."""
    names = ("cycles", "baseline", "heldout", "heldout_rows", "samples", "domain", "distill")
    training = {"output_dir", "run_id", "resume"}
    model = open_model_source(settings.training.model, settings.training.revision)
    pruning = settings.pruning
    if not pruning.data:  # calibration rows are those of the training
        pruning = pruning.model_copy(update={"data": ("-",)})
    chosen: dict[str, str] = {
        "metric": pruning.importance,
        "scope": pruning.ranking,
        "mode": pruning.form,
        "repair": "least-squares" if pruning.repairs else "none",
    }
    result = {
        "training": settings.training.model_dump(mode="json", exclude=training),
        "pruning": settings.pruning.model_dump(mode="json") | chosen,
        **{name: getattr(settings, name) for name in names},
        "model_digest": model.digest(),
        **_contents(settings, model),
    }
    return result | ({"baseline_seeds": settings.baseline_seeds} if settings.baseline else {})


def _contents(settings: ForgeSettings, model: ModelSource) -> dict[str, str]:
    """Digests of what is read anew by later stages, or was read by the first one alone."""
    training, pruning, tokenizer = settings.training, settings.pruning, hashlib.sha256()
    named = (
        (training.data if training.data != NO_DATA else (), training.query),
        (training.eval_data, training.eval_query),
        (pruning.data, pruning.query),
    )
    rows = [file for names, query in named if names for file in data_files(names, query)]
    for name, data in sorted(model.tokenizer_files().items()):
        tokenizer.update(f"\0{name}\0{len(data)}\0".encode() + data)
    return {
        "rows_digest": digest_files(rows),
        "tokenizer_digest": tokenizer.hexdigest(),
    }


def upgraded(before: dict[str, Any], now: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The identity of a job that an earlier version began, as this one would write it.

    What that version did not note is taken to be as it is `now`.
    """
    result = dict(before)
    for name in ("rows_digest", "tokenizer_digest"):
        if now is not None and name not in result:
            result[name] = now[name]
    pruning = result.get("pruning")
    if isinstance(pruning, dict) and "repair" not in pruning:
        fields = PruneSettings.model_fields
        added = {name: fields[name].default for name in _SINCE} | {"repair": "none"}
        metric = pruning.get("metric")
        result["pruning"] = added | pruning | {"metric": METRIC_NAMES.get(str(metric), metric)}
    if isinstance(result.get("pruning"), dict):
        result["pruning"] = {"target": None} | result["pruning"]
    if result.get("baseline"):
        result.setdefault("baseline_seeds", 1)
    return result


_SINCE = ("what", "protect_first", "protect_last", "repair_ridge")
"""Settings of pruning that earlier versions did not have, with what they did as the default."""
