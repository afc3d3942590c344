"""What a reference model thinks of answers, measured once and stored.

Preferences need two numbers of the reference per example, which never change: they are measured
before the first step, so that a step is one forward and one backward pass of the policy, and no
second model is in memory. A file holds them under a SHA-256 of all that decides them: one that is
damaged, or of anything else, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.batches.sequences import AnswerSet
from engine.errors import CheckpointError
from engine.inference.perplexity import TOKENS_PER_BATCH
from engine.storage import durable, names
from engine.storage.cache_folder import cache_folder, keep_newest
from engine.storage.home import expanded
from engine.storage.safe_files import read_regular
from engine.training.objectives.evaluation import indices_by_tokens
from kernels.runtime.ranks import ONE_RANK, Ranks, host_maxima
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.sequences import batch_log_probs

log = logging.getLogger(__name__)

_MOST_FILES = 64
_DIGEST = 32


@torch.no_grad()
def reference_log_probs(
    model: Decoder,
    answers: AnswerSet,
    indices: Sequence[int],
    settings: StepSettings,
    judged: bool,
    ranks: Ranks = ONE_RANK,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Tensor:
    """(examples, 2) in fp64 and host memory: log p of chosen and rejected answer by `model`.

    Of judged answers it is that of the answer, and of its prompt with another one's answer. Rows
    other than `indices` are NaN. The batches are dealt to `ranks`, which all have the result.
    """
    table = torch.zeros(len(answers.examples), 2, dtype=torch.float64)
    quiet = replace(settings, router_loss=0.0, dropout_seed=None)
    was_training = model.training
    model.eval()

    def measured(batch: PackedBatch) -> Tensor:
        return batch_log_probs(model, batch, quiet)[0].double().cpu()

    groups = list(indices_by_tokens(answers, indices, tokens_per_batch))
    for first in range(0, len(groups), ranks.size):  # all run as many passes
        group = groups[first + ranks.rank] if first + ranks.rank < len(groups) else []
        rows = torch.tensor(group, dtype=torch.int64)
        given = answers.batch(group) if group else PackedBatch.idle()
        if judged:
            table[rows, 0] = measured(given)
            table[rows, 1] = measured(answers.mismatched(group) if group else given)
        else:
            table[rows] = measured(given).view(-1, 2)
    model.train(was_training)
    ranks.all_reduce(table).wait()
    unread = torch.ones(len(table), dtype=torch.bool)
    unread[torch.tensor(indices, dtype=torch.int64)] = False
    table[unread] = torch.nan
    return table


def cache_of(setting: str) -> Path | None:
    """The folder of stored values, by `--reference-cache`; None where there is to be none."""
    if setting == "none":
        return None
    return cache_folder("reference") if setting == "auto" else expanded(setting)


def stored_or_made(
    folder: Path | None,
    facts: Mapping[str, object],
    shape: tuple[int, int],
    make: Callable[[], Tensor],
    ranks: Ranks = ONE_RANK,
) -> Tensor:
    """What is stored under `facts`, which decide all values; else what `make` gives, stored.

    All of `ranks` make it together where any of them has it not.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{key}.reference"
    stored = _read(path, shape)
    (missing,) = host_maxima(ranks, float(stored is None))
    if stored is not None and not missing:
        return stored
    table = make()
    if stored is None:
        _write(path, table)
    return table


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    if not os.path.lexists(path):
        return None
    size = 8 * shape[0] * shape[1]
    try:
        data = read_regular(path, size + _DIGEST)
    except CheckpointError as error:
        log.warning("The reference is asked again: %s", error)
        return None
    body = data[:-_DIGEST]
    if len(body) != size or hashlib.sha256(body).digest() != data[-_DIGEST:]:
        log.warning("%s is damaged; the reference is asked again", path)
        return None
    log.info("the reference's log-probabilities come from %s", path)
    return torch.from_numpy(np.frombuffer(body, dtype="<f8").reshape(shape).copy())


def _write(path: Path, table: Tensor) -> None:
    """Store values. A disk that refuses is a warning: they are measured again then."""
    body = table.numpy().astype("<f8").tobytes()
    try:
        names.mkdir(path.parent, parents=True, exist_ok=True)
        with durable.replacing(path) as out:
            out.write(body)
            out.write(hashlib.sha256(body).digest())
        keep_newest(path.parent, path.suffix, _MOST_FILES)
    except (OSError, CheckpointError) as error:
        log.warning("The reference's log-probabilities were not stored in %s: %s", path, error)
