"""Which model a run's reference is, and its log-probabilities of the rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.data.batches.sequences import AnswerSet
from engine.distributed.mesh import ALONE_MESH, Mesh
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.load_model import build_for, divides_vocabulary
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.fates import run_fate, say
from engine.provenance import version
from engine.training.objectives.reference import cache_of, reference_log_probs, stored_or_made
from engine.training.prepare import Prepared
from models.decoder import Decoder
from models.layers.context import StepSettings

log = logging.getLogger(__name__)

Stage = Literal["another model", "base", "start"]
"""When the reference is at hand: before the run's model, before its adapter, before its steps."""


def stage_of(config: TrainConfig) -> Stage | None:
    """Which model the reference is; None for an objective without one."""
    if not config.has_reference:
        return None
    if config.reference not in (None, "base"):
        return "another model"
    started = config.method in ("full", "scratch") or config.init_adapter is not None
    return "start" if started and config.reference is None else "base"


@dataclass
class RunReference:
    """Log-probabilities of the rows of a run and of those that are held out, (examples, 2) each.

    They are measured by `measure`, which is called at every stage and acts at the right one.
    """

    prepared: Prepared
    settings: StepSettings
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh = ALONE_MESH
    trained: Tensor | None = None
    heldout: Tensor | None = None

    def measure_another(self) -> None:
        """Where the reference is another model: load it, measure, and let it go."""
        config = self.prepared.config
        if stage_of(config) != "another model" or config.reference is None:
            return
        source = open_model_source(config.reference)
        log.info("preferences are measured against %s", config.reference)
        say(source, run_fate(config, source))
        model = None

        def loaded() -> Decoder:
            nonlocal model
            placed = self.device, self.dtype, self.mesh.weights
            model = model or build_for(config, source, *placed)
            return model

        self._measure(loaded)

    def measure(self, stage: Stage, model: Decoder) -> None:
        """Measure `model` where it is the reference at this stage."""
        if stage_of(self.prepared.config) == stage:
            self._measure(lambda: model)

    def _measure(self, model: Callable[[], Decoder]) -> None:
        prepared = self.prepared
        self.trained = self._table(model, prepared.answers, prepared.trained_rows())
        rows = list(range(len(prepared.heldout)))
        if rows:
            self.heldout = self._table(model, prepared.heldout_answers, rows)

    def _table(self, model: Callable[[], Decoder], answers: AnswerSet, rows: list[int]) -> Tensor:
        judged = self.prepared.config.objective == "kto"

        def made() -> Tensor:
            log.info("the reference reads %d rows once", len(rows))
            what = model(), answers, rows, self.settings, judged
            return reference_log_probs(*what, self.mesh.every)

        facts = self._facts() | {"rows": answers.digest(rows), "judged": judged}
        folder = cache_of(self.prepared.config.reference_cache)
        return stored_or_made(folder, facts, (len(answers.examples), 2), made, self.mesh.every)

    def _facts(self) -> dict[str, object]:
        """What decides the values beside the rows."""
        prepared, config = self.prepared, self.prepared.config
        stage = stage_of(config)
        adapter = prepared.init if stage == "start" else None
        weights = self.mesh.weights
        heads = weights.size if weights is not None and divides_vocabulary(config) else 1
        return {
            "stage": stage,
            "model": prepared.digests["reference" if stage == "another model" else "base"],
            "adapter": None if adapter is None else _digest(adapter),
            "method": config.method,
            "double_quant": config.double_quant,
            "head_precision": config.head_precision,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "version": version(),
            # Sums over a divided vocabulary are rounded otherwise.
            **({} if heads == 1 else {"ranks": heads}),
        }


def _digest(adapter: InitAdapter) -> str:
    """SHA-256 of an adapter's tensors and factors."""
    digest = hashlib.sha256(repr(adapter.scale).encode())
    for module, parts in sorted({**adapter.fixed, **adapter.pairs}.items()):
        digest.update(f"\0{module}\0".encode())
        for part in parts:
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
