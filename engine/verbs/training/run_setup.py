"""Put a run together before its first step: plan, model, optimizer, state."""

from __future__ import annotations

import logging
from dataclasses import replace

from engine.config.tasks.commands import command_of
from engine.config.train_config import TrainConfig
from engine.device import resolve_device, resolve_dtype
from engine.distributed.group import ALONE, Group
from engine.distributed.mesh import ALONE_MESH, Mesh
from engine.errors import ConfigError
from engine.model_sources.load_model import build_for
from engine.model_sources.quantised.fates import run_fate, say
from engine.pruning.keep_pruned import hold_pruned, pruned_heads
from engine.runs.checkpoints import CheckpointStore
from engine.training.adapters.starts import start_pairs, with_start
from engine.training.evaluation.heldout import Heldout, HeldoutAnswers, HeldoutRows
from engine.training.evaluation.samples import PromptAnswers
from engine.training.loop import TrainerSettings
from engine.training.objectives.choose import make_objective
from engine.training.objectives.objective import Objective
from engine.training.objectives.tokens import TOKENS
from engine.training.prepare import Prepared
from engine.training.processes.divided_state import DividedState
from engine.training.processes.together import Optimization, resumed_together
from engine.training.reference import RunReference
from engine.training.saving import Going, RunState
from engine.training.step import TrainingStep
from engine.training.trainable import (
    load_teacher,
    lr_shape,
    make_average,
    make_in_backward,
    make_trainable,
    step_settings,
)
from engine.verbs.training.run_memory import budget_of, with_policy
from kernels.runtime.ranks import ONE_RANK
from models.over_ranks import split_context, trained_elements

log = logging.getLogger(__name__)


class RunSetup:
    """A run that is ready for its next step, in the order in which memory is taken.

    The plan and the budget come before any weight; the model, its adapter and the optimizer are
    then made, and take on what a checkpoint says where the run goes on. `config` has its directory.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        process: int,
        checkpoints: CheckpointStore | None = None,
        group: Group = ALONE,
        mesh: Mesh = ALONE_MESH,
    ) -> None:
        self.config, self.prepared, self.mesh = config, prepared, mesh
        self.device = resolve_device(self.config.device)
        dtype = resolve_dtype(self.config.dtype, self.device)
        settings, planned = with_policy(self.config, prepared, self.device, dtype, process)
        self.budget = budget_of(prepared, settings, self.device, dtype, process, planned)
        plan = planned if self.budget is None else self.budget.planned
        self.planned_bytes = None if plan is None else plan.total
        how = step_settings(settings), self.device, dtype, mesh
        self.reference = RunReference(prepared, *how)
        self.reference.measure_another()
        base = prepared.model_source if prepared.init is None else prepared.init.source
        say(base, run_fate(self.config, base))
        base = with_start(self.config, base)
        divided = mesh.weights, mesh.experts
        self.model = build_for(self.config, base, self.device, dtype, *divided)
        self.reference.measure("base", self.model)
        make_trainable(self.model, settings, prepared.init)
        self.trainable = trained_elements(self.model)
        first = start_pairs(self.model, self.config, base)
        self.reference.measure("start", self.model)
        if mesh.context.size > 1:
            split_context(self.model, mesh.context)
        self.optimization = Optimization.of(self.model, self.config, mesh)
        self.optimizer = self.optimization.optimizer
        self.in_backward = make_in_backward(self.model, self.optimizer, self.config)
        self._hold_pruned()
        self.average = make_average(self.model, self.config)
        self._warn_of_long_memory()
        if self.config.cuda_graphs:
            self.model.record_layers()
        known = prepared.identity, self.model, self.optimization.state, prepared.init
        self.state = self._state(RunState(*known, prepared.stops, first, self.average))
        fresh = Going(settings.gradient_checkpointing, self.config.warmup(prepared.total_steps))
        self.progress, self.going = resumed_together(self.state, checkpoints, fresh, group)
        self.settings = replace(step_settings(settings), checkpointing=self.going.policy)
        self.heldout = self._heldout()
        self.answers = self._answers()

    def _state(self, whole: RunState) -> RunState:
        """The state of the run, which processes write together where they divide parameters."""
        weights = self.mesh.weights
        if weights is None or not self.config.every_weight:
            return whole
        known = whole.identity, whole.model, whole.optimizer, whole.init, whole.stops
        average = whole.average
        return DividedState(*known, average=average, ranks=weights, own=self.optimizer)

    def _warn_of_long_memory(self) -> None:
        decay, steps = self.config.ema_decay, self.prepared.total_steps
        if decay is not None and 1.0 / (1.0 - decay) > steps:
            log.warning(
                "ema_decay %g remembers some %d steps, and the run has %d: its result would mostly "
                "be its beginning. A decay of %.3g remembers a fifth of them",
                decay, round(1.0 / (1.0 - decay)), steps, max(0.5, 1.0 - 5.0 / steps),
            )  # fmt: skip

    def _hold_pruned(self) -> None:
        path = self.prepared.model_source.path
        if self.mesh.weights is not None and self.config.every_weight and pruned_heads(path):
            raise ConfigError(
                f"{path} has pruned heads, whose columns stay zero while it is trained, and with "
                "--shard weights --method full no process has a whole column. Leave out --shard "
                "weights, or train an adapter."
            )
        hold_pruned(self.model, self.optimizer, path)

    def _heldout(self) -> Heldout:
        config, prepared = self.config, self.prepared
        if not config.learns_answers:
            rows = self.model, prepared.heldout, prepared.parts, self.settings
            return HeldoutRows(*rows, self.mesh.data)
        answers, reference = prepared.heldout_answers, self.reference.heldout
        objective = make_objective(config, answers, reference) if answers.examples else TOKENS
        what = self.model, answers, objective, self.settings, self.mesh.data
        return HeldoutAnswers(*what, prepared.parts)

    def _answers(self) -> PromptAnswers | None:
        """What answers the prompts, together with processes that have parts of the model."""
        config, prepared = self.config, self.prepared
        if prepared.samples is None:
            return None
        ranks = self.mesh.every if self.mesh.lockstep else ONE_RANK
        what = prepared.samples, self.model, prepared.tokenizer, prepared.stops
        return PromptAnswers(*what, config.batch_size * config.max_length, ranks)

    def step(self) -> TrainingStep:
        """The step of the run; a teacher is read here."""
        return TrainingStep(
            self.model,
            self.optimizer,
            self.settings,
            self.config.max_grad_norm,
            self.config.seed,
            self._objective(),
            self.in_backward,
            self.optimization.parallel,
            self.average,
        )

    def _objective(self) -> Objective:
        teacher = load_teacher(self.config, self.device)
        return make_objective(self.config, self.prepared.answers, self.reference.trained, teacher)

    def trainer_settings(self) -> TrainerSettings:
        """What the loop needs of the run's configuration."""
        config, total_steps = self.config, self.prepared.total_steps
        assert config.output_dir is not None
        return TrainerSettings(
            total_steps=total_steps,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            warmup_steps=self.going.warmup_steps,
            nonfinite_limit=config.nonfinite_limit,
            checkpoint_every=config.checkpoint_every,
            eval_every=config.eval_every,
            min_lr_ratio=config.min_lr_ratio,
            lr_shape=lr_shape(config, total_steps),
            sample_every=config.sample_every,
            go_on=f"`{command_of('resume', config.output_dir)}`",
        )
