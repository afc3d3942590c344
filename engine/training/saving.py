"""Save a run: checkpoints, and in the end the adapter or model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.distributed.group import Group
from engine.distributed.messages import broadcast_tensors
from engine.errors import CheckpointError
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.adapter.provenance import write_base
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.export import export_hf_directory, write_tokenizer
from engine.model_sources.from_model import TrainedSource
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.stops import GENERATION_CONFIG, adapter_stops, with_stops
from engine.model_sources.quantised.stored_codes import used_weights
from engine.provenance import version
from engine.runs.checkpoints import CheckpointStore, LoadedCheckpoint
from engine.runs.identity import RunIdentity, require_same_run, warmup_of
from engine.runs.output import TWO_RESULTS, WITHOUT_EMA
from engine.storage import durable
from engine.training.adapters.starts import as_plain
from engine.training.adapters.written import adapter_config
from engine.training.loop import Progress, new_progress
from engine.training.trainable import whole_parameters
from kernels.elementwise.dropout import GENERATOR
from models.adapters import PARTS, adapter_tensors
from models.decoder import Decoder
from models.over_ranks import (
    adapter_paths,
    expert_ranks,
    gathered_adapter,
    gathered_experts,
    own_experts,
)
from models.tensor_layout import path_in_file
from models.weight_average import WeightAverage

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Pairs = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Going:
    """How a run goes on, whatever the machine or a new length would choose by now."""

    policy: str
    warmup_steps: int


RANKS = "ranks"
"""What a checkpoint's state calls the number of processes that wrote parts of it."""


class StoredState(Protocol):
    """What a checkpoint holds of an optimizer, or of those of several processes."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as named tensors."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError if it is of other parameters."""


@dataclass(frozen=True)
class Collected:
    """What a checkpoint needs that several processes have between them.

    `pairs` are those of divided experts as they are trained, `evaluated` as evaluations see them.
    """

    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    pairs: Pairs | None = None
    evaluated: Pairs | None = None

    def led(self) -> AbstractContextManager[None]:
        """Around what the first process does to write it, while the others `follow`."""
        return nullcontext()

    def follow(self) -> None:
        """What other processes do while the first one writes."""


Resumed = tuple[Progress, Going, LoadedCheckpoint | None]


@dataclass(frozen=True)
class RunState:
    """The part of a run that a checkpoint holds: weights, optimizer, and which run it is.

    `init` is an earlier adapter that is trained on; `stops` are the ids that the rows teach as the
    end of an answer. `first` are the pairs that the base is without (`adapters.starts`). With an
    `average` of the weights that is the result.
    """

    identity: RunIdentity
    model: Decoder
    optimizer: StoredState
    init: InitAdapter | None = None
    stops: tuple[int, ...] = ()
    first: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    average: WeightAverage | None = None

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return self.identity.config

    @property
    def evaluates_output(self) -> bool:
        """Whether evaluations while training are of the weights that are the result."""
        return self.average is None or self.config.eval_ema

    def output_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights of the result: their average, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that evaluations while training are of."""
        return self.output_weights() if self.config.eval_ema else nullcontext()

    def on_evaluated(self, call: Callable[P, T]) -> Callable[P, T]:
        """`call` with the model as evaluations while training see it."""

        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.evaluated_weights():
                return call(*args, **kwargs)

        return inside

    def gathered(self) -> Pairs | None:
        """The pairs of all processes where they divide the experts; all must ask for them."""
        return gathered_adapter(self.model) if expert_ranks(self.model).size > 1 else None

    def weights(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: the adapter's tensors, or every weight.

        Of experts that processes divide, those of this one, or all `pairs` that were gathered.
        """
        if self.config.every_weight:
            return dict(self.model.named_parameters())
        named = {
            f"{path}.{part}": tensor
            for path, tensors in (pairs or adapter_tensors(self.model)).items()
            for part, tensor in zip(PARTS, tensors, strict=False)
        }
        return named | {
            name: parameter.data
            for name, parameter in whole_parameters(self.model, self.config).items()
        }

    def save(
        self,
        checkpoints: CheckpointStore,
        progress: Progress,
        going: Going,
        source: ModelSource | None = None,
        best: Mapping[str, Any] | None = None,
        collected: Collected | None = None,
    ) -> Path:
        """Write a checkpoint of the run as it stands; its folder.

        `best` says which step was the best so far, by which metric and value. Where that is this
        one and `source` is given, the adapter stands in the checkpoint too, as other programs read
        it. `collected` is what was asked for already.
        """
        state = self.collected(progress.step) if collected is None else collected
        extra: Callable[[Path], None] | None = None
        if best and best["step"] == progress.step and source and not self.config.every_weight:
            extra = partial(self._add_adapter, source, state.evaluated)
        return checkpoints.save(
            progress.step,
            {
                "weights": {k: v.detach().cpu() for k, v in self.weights(state.pairs).items()},
                "optimizer": _on_host(state.optimizer),
                **({"ema": _on_host(state.average)} if state.average else {}),
            },
            self.facts(progress, going),
            extra,
            best,
        )

    def facts(self, progress: Progress, going: Going) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {
            "progress": progress.state(),
            "trajectory": self.config.trajectory(),
            "checkpointing": going.policy,
            "warmup_steps": going.warmup_steps,
            "base": self.identity.digests["base"],
            "dropout": GENERATOR,
            "stop_token_ids": list(self.stops),
            **({} if self.average is None else {"ema_updates": self.average.updates}),
        }

    def collected(self, step: int) -> Collected:
        """What processes have between them; all must ask for it."""
        pairs, average = self.gathered(), self._averages()
        evaluated = pairs
        if average and self.config.eval_ema:
            with self.output_weights():
                evaluated = self.gathered()
        return Collected(self.optimizer.state_tensors(), average, pairs, evaluated)

    def _averages(self) -> dict[str, Tensor]:
        """The average of all processes' weights, where there is one; all must ask for it."""
        if self.average is None:
            return {}
        return gathered_experts(self.model, self.average.state_tensors())

    def resume(self, checkpoints: CheckpointStore, going: Going) -> Resumed:
        """Where the run goes on, its weights and optimizer restored, as `--resume` asks for.

        With it how it goes on, as the checkpoint says, or `going` for a fresh start, and the
        checkpoint. Raises `CheckpointError` for a checkpoint of another run.
        """
        loaded = checkpoints.resume(self.config.resume)
        if loaded is None:
            return new_progress(self.model), going, None
        require_same_run(loaded.state, self.identity, loaded.path)
        self.take(loaded)
        state = loaded.state
        log.info("Going on from %s", loaded.path)
        if self.config.lora_dropout > 0.0 and state.get("dropout") != GENERATOR:
            log.warning(
                "%s was written by a version that drew dropout masks by another generator (%s, now "
                "%s): what follows is trained as well, but not to the bits of the run that stopped",
                *(loaded.path, state.get("dropout", "earlier"), GENERATOR),
            )
        # Earlier versions wrote the policy under "recompute".
        policy = state.get("checkpointing") or state["recompute"]
        going = Going(policy, warmup_of(state, self.identity))
        return Progress(**state["progress"]), going, loaded

    def take(self, loaded: LoadedCheckpoint) -> None:
        """Take the weights and the optimizer's state of a checkpoint. Raises `CheckpointError`."""
        self._restore(loaded)
        self.optimizer.load_state_tensors(loaded.tensors("optimizer"))

    def share(self, group: Group, loaded: LoadedCheckpoint | None) -> None:
        """Give every process the trained weights of the first, and their average.

        The first has them of a checkpoint, from which it gives others the experts that they have.
        """
        averages, own, pairs = self._averages(), self.weights(), self.gathered()
        whole = own if pairs is None else self.weights(pairs)
        names = sorted(whole)
        with torch.no_grad():
            if pairs is not None and loaded is not None:
                for name, tensor in loaded.tensors("weights").items():
                    whole[name].copy_(tensor)
                for name, tensor in loaded.tensors("ema").items() if averages else ():
                    averages[name].copy_(tensor)
            given = [*(whole[name] for name in names), *averages.values()]
            broadcast_tensors(group.ranks, given)
            if pairs is None:
                return
            for name, tensor in own.items():
                tensor.copy_(whole[name])
            if self.average is not None:
                parts = own_experts(self.model, averages)
                self.average.load_state_tensors(parts, self.average.updates)

    def take_best(self, group: Group, checkpoints: CheckpointStore, step: int) -> None:
        """All processes take the weights of the checkpoint of `step`. Raises `CheckpointError`."""
        loaded = None
        if group.leads:
            loaded = checkpoints.load(checkpoints.path_of(step))
            self._restore(loaded)
        self.share(group, loaded)

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        if RANKS in loaded.state:
            raise CheckpointError(
                f"{loaded.path} was written by {loaded.state[RANKS]} processes that divided the "
                "parameters. Go on from it with --shard weights, on any number of processes."
            )
        saved = loaded.tensors("weights")
        own = self.weights()
        if saved.keys() != own.keys() | self._names_of_experts():
            raise CheckpointError(f"{loaded.path} holds other weights than this run trains.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        if self.average is not None:
            averages = own_experts(self.model, loaded.tensors("ema"))
            self.average.load_state_tensors(averages, loaded.state["ema_updates"])

    def _names_of_experts(self) -> set[str]:
        """The names of all experts' tensors, where processes divide them."""
        if expert_ranks(self.model).size == 1:
            return set()
        own = adapter_tensors(self.model)
        others = (path for path in adapter_paths(self.model) if path not in own)
        return {f"{path}.{part}" for path in others for part in PARTS[:2]}

    def follow_output(self, source: ModelSource) -> None:
        """What other processes do while the first one is in `write_output`."""
        self._gathered_output()

    def _gathered_output(self) -> tuple[Pairs | None, Pairs | None]:
        """The pairs of all processes, those of the last step and those of the result."""
        last = self.gathered()
        if self.average is None:
            return last, last
        with self.output_weights():
            return last, self.gathered()

    def write_output(self, source: ModelSource, directory: Path) -> Path:
        """The adapter with PEFT's names, or after full fine-tuning the whole model.

        Of averaged weights, and those of the last step beside it under `WITHOUT_EMA`.
        """
        pairs, averaged = self._gathered_output()
        if self.average is None:
            return self._write_result(source, directory, pairs=pairs)
        last = self._write_result(source, directory, WITHOUT_EMA, pairs)
        with self.output_weights():
            output = self._write_result(source, directory, pairs=averaged)
        log.info(TWO_RESULTS, output, last)
        return output

    def _write_result(
        self, source: ModelSource, directory: Path, ending: str = "", pairs: Pairs | None = None
    ) -> Path:
        if self.config.every_weight:
            target = directory / f"model{ending}"
            durable.remove_tree(target)  # of a run that had ended and was resumed
            export_hf_directory(TrainedSource(source, self.model, self.stops), target)
            return target
        return self._write_adapter(source, directory, ending, pairs)

    def _add_adapter(self, source: ModelSource, pairs: Pairs | None, folder: Path) -> None:
        with self.evaluated_weights():
            self._write_adapter(source, folder, pairs=pairs)

    def _write_adapter(
        self, source: ModelSource, directory: Path, ending: str = "", pairs: Pairs | None = None
    ) -> Path:
        target = directory / f"adapter{ending}"
        settings, tensors = as_plain(
            adapter_config(self.config, source, self.init), self._adapter_tensors(pairs), self.first
        )
        earlier = None if self.init is None else self.init.source.adapter
        save_adapter(target, settings, tensors, earlier, self._whole_tensors(source))
        averaged = {} if ending or self.average is None else {"ema_decay": self.average.decay}
        write_base(target, self._base_record(source) | averaged)
        earlier_stops = () if earlier is None else adapter_stops(earlier.path)
        generation = with_stops(source, (*earlier_stops, *self.stops))
        if generation:
            durable.write_json(target / GENERATION_CONFIG, generation)
        write_tokenizer(source, target)
        return target

    def _whole_tensors(self, source: ModelSource) -> dict[str, Tensor]:
        """What is saved whole in the adapter, by the file's names.

        A tied matrix stands there twice, for PEFT makes two copies of what is tied.
        """
        whole = whole_parameters(self.model, self.config)
        if whole and self.model.lm_head is None:
            whole = whole | {"lm_head.weight": whole["model.embed_tokens.weight"]}
        return {path_in_file(source.config, name): value.data for name, value in whole.items()}

    def _adapter_tensors(self, pairs: Pairs | None) -> dict[str, tuple[Tensor, ...]]:
        """The trained pairs, and those that an earlier adapter has on what is not trained."""
        trained = dict(pairs or adapter_tensors(self.model))
        return trained if self.init is None else trained | self.init.fixed

    def _base_record(self, source: ModelSource) -> dict[str, Any]:
        """On what the adapter was trained: which weights, quantised how, computed in what."""
        kind, nested = None, False
        if self.config.method == "qlora":
            kind, nested = used_weights(source, "nf4", self.config.double_quant)
        return {
            "digest": self.identity.digests["base"],
            "quantization": kind,
            "double_quant": nested if kind == "nf4" else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "engine_version": version(),
        }


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
