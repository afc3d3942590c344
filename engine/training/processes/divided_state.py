"""Full fine-tuning whose parameters and states are divided among processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.distributed.group import Group
from engine.distributed.messages import broadcast_text
from engine.distributed.piece_states import own_parts, piece_states, restore_pieces
from engine.errors import CheckpointError, EngineError
from engine.model_sources.export import export_hf_directory
from engine.model_sources.gathered_source import GatheredSource
from engine.model_sources.interface.model_source import ModelSource
from engine.runs.checkpoints import CheckpointStore, LoadedCheckpoint
from engine.runs.output import TWO_RESULTS, WITHOUT_EMA
from engine.storage import durable
from engine.training.loop import Progress
from engine.training.processes.shard_files import ShardFiles, ShardTensors
from engine.training.saving import RANKS, Collected, Going, RunState
from kernels.runtime.ranks import Ranks
from models.decoder import Decoder
from models.memory.sharded_parameters import ParameterPiece
from models.sharding import finish_gradients, sharded_parameters, trained_pieces
from optim import StepOptimizer
from optim.clip import norm_over_ranks

log = logging.getLogger(__name__)


class DividedStep:
    """What processes do around the passes of a step whose parameters they divide.

    Gradients of layers are summed while backward runs (`ShardedParameters`); `data` are the ranks
    that rows are dealt to.
    """

    def __init__(self, model: Decoder, data: Ranks) -> None:
        self._model, self.data = model, data
        self._ranks = sharded_parameters(model).ranks
        self._gradients: tuple[list[Tensor], list[Tensor]] = [], []

    def begin(self) -> None:
        """Gradients are none."""

    def last_pass(self) -> AbstractContextManager[None]:
        """Every pass is as this one."""
        return nullcontext()

    def finish(self) -> None:
        """Sum what every rank has whole."""
        self._gradients = finish_gradients(self._model)

    def norm(self, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
        """The norm () of all parts; `sums` (F,) become those of all ranks."""
        self._ranks.all_reduce(sums).wait()
        return norm_over_ranks(*self._gradients, self._ranks)

    def gather(self) -> None:
        """What is gathered from now on is what the update has made."""
        self._gradients = [], []
        sharded_parameters(self._model).forget()


@dataclass(frozen=True)
class CollectedShards(Collected):
    """A checkpoint's part of each process."""

    shards: ShardFiles = field(kw_only=True)

    def led(self) -> AbstractContextManager[None]:
        return self.shards.led()

    def follow(self) -> None:
        self.shards.follow()


@dataclass(frozen=True)
class DividedState(RunState):
    """The state of a run of which every process writes its own part (`shard_files`)."""

    ranks: Ranks = field(kw_only=True)
    own: StepOptimizer = field(kw_only=True)

    @property
    def pieces(self) -> list[ParameterPiece]:
        """What this process trains."""
        return trained_pieces(self.model)

    def collected(self, step: int) -> Collected:
        """The files of this process; all must ask for them, and the others follow the first."""
        pieces = self.pieces
        files = {
            "weights": {piece.name: piece.parameter.detach() for piece in pieces},
            "optimizer": piece_states(self.own, pieces),
        }
        if self.average is not None:
            files["ema"] = self.average.state_tensors()
        return CollectedShards({}, {}, shards=ShardFiles(self.ranks, step, files))

    def save(
        self,
        checkpoints: CheckpointStore,
        progress: Progress,
        going: Going,
        source: ModelSource | None = None,
        best: Mapping[str, Any] | None = None,
        collected: Collected | None = None,
    ) -> Path:
        """Write a checkpoint of which each process writes a part; its folder."""
        assert isinstance(collected, CollectedShards)
        counts = {RANKS: self.ranks.size, "skipped": self.own.skipped_steps}
        state = self.facts(progress, going) | counts
        return checkpoints.save(progress.step, {}, state, collected.shards.written_by_all, best)

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        if RANKS not in loaded.state:
            raise CheckpointError(
                f"{loaded.path} was written by a run that did not divide its parameters. Go on "
                "from it without --shard weights."
            )

        if self.average is not None:
            self.average.updates = loaded.state["ema_updates"]

    def take(self, loaded: LoadedCheckpoint) -> None:
        """Nothing yet: `share` lets every process read its part."""
        self._restore(loaded)

    def share(self, group: Group, loaded: LoadedCheckpoint | None) -> None:
        """Every process takes its part of a checkpoint that the first has verified."""
        path = broadcast_text(group.ranks, "" if loaded is None else str(loaded.path))
        told = "" if loaded is None else f"{loaded.state[RANKS]} {loaded.state['skipped']}"
        count, skipped = map(int, broadcast_text(group.ranks, told).split())
        every = partial(self._saved_by_all, Path(path), count)
        try:
            averages = self._averages_of(every)
            restore_pieces(self.own, self.pieces, every("weights"), every("optimizer"))
        except ValueError as error:
            raise CheckpointError(
                f"{path} holds other weights than this run trains: {error}."
            ) from error
        self.own.set_skipped(skipped)
        if self.average is not None:
            self.average.load_state_tensors(averages, self.average.updates)
        sharded_parameters(self.model).forget()

    def _averages_of(
        self, every: Callable[[str], Sequence[Mapping[str, Tensor]]]
    ) -> dict[str, Tensor]:
        """This process's part of the average in a checkpoint."""
        if self.average is None:
            return {}
        return own_parts(self.pieces, self.average.state_tensors(), every("ema"))

    def _saved_by_all(self, path: Path, count: int, kind: str) -> list[ShardTensors]:
        return [ShardTensors(path, kind, rank) for rank in range(count)]

    def follow_output(self, source: ModelSource) -> None:
        """Give the first process the parts of this one, while it writes the model."""
        if self.average is not None:
            self._gathered_source(source).follow()
        with self.output_weights():
            self._gathered_source(source).follow()

    def write_output(self, source: ModelSource, directory: Path) -> Path:
        """The whole model, of which one layer at a time is in memory.

        Of averaged weights, and those of the last step beside it under `WITHOUT_EMA`.
        """
        output, last = directory / "model", directory / f"model{WITHOUT_EMA}"
        try:
            if self.average is not None:
                self._write_model(source, last)
        except (OSError, EngineError):
            with self.output_weights():
                self._gathered_source(source).follow()
            raise
        with self.output_weights():
            self._write_model(source, output)
        if self.average is not None:
            log.info(TWO_RESULTS, output, last)
        return output

    def _write_model(self, source: ModelSource, target: Path) -> None:
        whole = self._gathered_source(source)
        try:
            durable.remove_tree(target)  # of a run that had ended and was resumed
            export_hf_directory(whole, target)
        except (OSError, EngineError):
            whole.finish()
            raise

    def _gathered_source(self, source: ModelSource) -> GatheredSource:
        return GatheredSource(source, self.model, self.stops)
