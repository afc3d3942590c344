"""`engine train`: from a `TrainConfig` to a trained adapter or model.

Everything is opened, checked and counted before the weights are read: data, tokenizer, adapter,
device, trackers, the run's directory. The loop itself is `engine.training.loop`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config.settings import given_settings
from engine.config.tasks.commands import command_of, next_steps, repeat_heldout
from engine.config.train_config import TrainConfig
from engine.data.examples import shown_stretches
from engine.device import check_threads, resolve_device, resolve_dtype
from engine.exporting.publish import destination, publish_folder
from engine.model_sources.load_model import build_for
from engine.model_sources.quantised.fates import run_fate, say, stored_line
from engine.pruning.keep_pruned import hold_pruned
from engine.runs.directory import RunDirectory, dated
from engine.runs.identity import check_identity
from engine.runs.metrics import peak_memory_bytes, plot_loss, read_metrics
from engine.runs.output import check_earlier, name_run
from engine.runs.signals import StopSignals
from engine.training.adapters.starts import start_pairs, with_start
from engine.training.cpu_dtype import log_choice, with_cpu_dtype
from engine.training.determinism import deterministic
from engine.training.evaluation.best import BestRule, BestSoFar
from engine.training.evaluation.callbacks import CallbackList
from engine.training.evaluation.heldout import (
    Heldout,
    HeldoutAnswers,
    HeldoutRows,
    figures_before,
    told_before,
)
from engine.training.init_adapter import with_init_adapter
from engine.training.loop import Progress, Trainer, TrainerHooks, TrainerSettings
from engine.training.objectives.choose import make_objective
from engine.training.objectives.objective import Objective
from engine.training.objectives.tokens import TOKENS
from engine.training.prepare import Prepared, prepare
from engine.training.reference import RunReference
from engine.training.row_set import RowSet
from engine.training.saving import Going, RunState
from engine.training.step import TrainingStep
from engine.training.trainable import (
    load_teacher,
    lr_shape,
    make_in_backward,
    make_optimizer,
    make_trainable,
    step_settings,
)
from engine.verbs.training.plan import fitted_changes, with_fitted
from engine.verbs.training.run_memory import (
    budget_of,
    explained_memory,
    require_space_for,
    with_policy,
)
from engine.verbs.training.run_reports import RunReports

log = logging.getLogger(__name__)

_SHOWN = 600
"""Characters that the log shows of the first row."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left. `adapter_path` is None after full fine-tuning, which saves `model/`.

    `next` are commands for the next steps: evaluate, generate, merge. `pushed` is the address of
    the upload that was asked for. `history` has the lines of metrics.jsonl, of earlier starts too;
    the evaluation before the first step is that of step 0.
    """

    run_directory: Path
    adapter_path: Path | None
    metrics: dict[str, Any]
    status: str
    output_path: Path | None = None
    next: tuple[str, ...] = ()
    pushed: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)


class _Run:
    """One training run between the opening of its directory and its summary."""

    def __init__(
        self,
        directory: RunDirectory,
        prepared: Prepared,
        stack: ExitStack,
        process: int,
        callbacks: CallbackList,
    ) -> None:
        self.directory, self.prepared, self.stack = directory, prepared, stack
        self.callbacks = callbacks
        self.config = directory.config
        self.device = resolve_device(self.config.device)
        dtype = resolve_dtype(self.config.dtype, self.device)
        settings, planned = with_policy(self.config, prepared, self.device, dtype, process)
        self.budget = budget_of(prepared, settings, self.device, dtype, process, planned)
        plan = planned if self.budget is None else self.budget.planned
        self.planned_bytes = None if plan is None else plan.total
        self.reference = RunReference(prepared, step_settings(settings), self.device, dtype)
        self.reference.measure_another()
        base = prepared.model_source if prepared.init is None else prepared.init.source
        say(base, run_fate(self.config, base))
        base = with_start(self.config, base)
        self.model = build_for(self.config, base, self.device, dtype)
        self.reference.measure("base", self.model)
        self.trainable = make_trainable(self.model, settings, prepared.init)
        first = start_pairs(self.model, self.config, base)
        self.reference.measure("start", self.model)
        self.settings = step_settings(settings)
        self.optimizer = make_optimizer(self.model, self.config)
        self.in_backward = make_in_backward(self.model, self.optimizer, self.config)
        hold_pruned(self.model, self.optimizer, prepared.model_source.path)
        if self.config.cuda_graphs:
            self.model.record_layers()
        self.state = RunState(
            prepared.identity, self.model, self.optimizer, prepared.init, prepared.stops, first
        )
        fresh = Going(settings.gradient_checkpointing, self.config.warmup(prepared.total_steps))
        self.progress, self.going = self.state.resume(directory.checkpoints, fresh)
        self.settings = replace(self.settings, checkpointing=self.going.policy)
        self.heldout = self._heldout()

    def _heldout(self) -> Heldout:
        config, prepared = self.config, self.prepared
        if not config.learns_answers:
            return HeldoutRows(self.model, prepared.heldout, prepared.parts, self.settings)
        answers, reference = prepared.heldout_answers, self.reference.heldout
        objective = make_objective(config, answers, reference) if answers.examples else TOKENS
        return HeldoutAnswers(self.model, answers, objective, self.settings)

    def evaluate_before(self) -> dict[str, float]:
        """Figures of the held-out rows at the start; nothing without such rows.

        A run that goes on has them from its manifest.
        """
        if self.progress.step > 0:
            return told_before(self.directory.recorded())
        if not self.config.eval_at_start:
            return {}
        before = self.heldout.before()
        if before:
            self.callbacks.on_eval(0, figures_before(before))
        return before

    def evaluate_after(self) -> dict[str, Any]:
        """Figures of the held-out rows at the end, with the best evaluation's where one is kept.

        With `load_best_at_end` the model has the weights of the best evaluation from then on.
        """
        best, (step, known) = self.trainer.best, self.trainer.evaluated or (None, None)
        facts = (best.facts() if best is not None else None) or {}
        if facts:
            log.info("best %(metric)s: %(value)g, after step %(step)d", facts)
        restored = self.config.load_best_at_end and facts.get("step") not in (None, step)
        if restored:
            self.state.restore_best(self.directory.checkpoints, facts["step"])
        figures = self.heldout.after(None if restored or step != self.progress.step else known)
        return figures | {f"best_{name}": value for name, value in facts.items()}

    def figures(self, progress: Progress) -> dict[str, Any]:
        """What the summary says of a run that has trained: counts, time and memory."""
        figures: dict[str, Any] = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "skipped_steps": progress.skipped,
            "train_seconds": round(progress.seconds, 3),
            "trainable_parameters": self.trainable,
            **self.prepared.row_counts(),
        }
        if self.model.graphs is not None:
            figures["micro_batches_recorded"] = self.model.graphs.repeated
            figures["micro_batches_launched"] = self.model.graphs.launched
        figures["peak_memory_bytes"] = peak_memory_bytes(self.device)
        return figures if self.budget is None else figures | self.budget.figures()

    def train(self) -> Progress:
        """The loop, with its progress bar, metrics and trackers."""
        config, prepared, directory = self.config, self.prepared, self.directory
        start = self.progress.step
        prepared.go_on(start, self.progress.cursor)
        self.stack.callback(prepared.close)
        reports = RunReports(directory, prepared, self.model, start, self.callbacks, self.stack)

        def save(progress: Progress) -> None:
            reports.sync()
            progress.cursor = prepared.cursor(progress.step)
            facts = None if best is None else best.facts()
            source = prepared.model_source
            path = self.state.save(directory.checkpoints, progress, self.going, source, facts)
            directory.reached_checkpoint()
            reports.saved(progress.step, path)

        rule = BestRule.of(config)
        best = None if rule is None else BestSoFar(rule, self.progress.best)
        hooks = TrainerHooks(
            save,
            reports.step,
            self.heldout.figures if prepared.heldout else None,
            sample=reports.sample,
            ended=lambda: self.callbacks.ended,
        )
        if self.budget is not None:
            watch = partial(self.budget.watch, self.model, self.optimizer)
            hooks = replace(hooks, watch=watch, overrun=self.budget.overrun)
        signals = self.stack.enter_context(StopSignals())
        settings = self._trainer_settings()
        self.trainer = Trainer(
            self._step(), prepared.batches, settings, hooks, signals, self.progress, best
        )
        reached = self.trainer.run()
        if best is not None and best.exhausted:
            log.info(
                "Ended after step %d of %d: %d evaluations brought no better %s",
                *(reached.step, prepared.total_steps, best.state.waited, best.rule.metric),
            )
        return reached

    def _step(self) -> TrainingStep:
        return TrainingStep(
            self.model,
            self.optimizer,
            self.settings,
            self.config.max_grad_norm,
            self.config.seed,
            self._objective(),
            self.in_backward,
        )

    def _objective(self) -> Objective:
        teacher = load_teacher(self.config, self.device)
        return make_objective(self.config, self.prepared.answers, self.reference.trained, teacher)

    def _trainer_settings(self) -> TrainerSettings:
        config, total_steps = self.config, self.prepared.total_steps
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
            go_on=f"`{command_of('resume', self.directory.path)}`",
        )


def train(
    config: TrainConfig | None = None,
    *,
    console: bool = True,
    callbacks: Sequence[object] = (),
    **settings: Any,
) -> TrainResult:
    """Run a fine-tuning from start to end; on any failure the directory's summary says why.

    The settings come as one table, or as keyword arguments; `data` may be rows themselves: a list
    of mappings, a generator, or a function that returns one. `callbacks` are told of steps,
    evaluations, checkpoints and the end (`engine.Callback`). A start that is refused writes nothing
    into a run that stands there. Raises children of `EngineError` for what the user can fix, and
    `Interrupted` (an exit status) when a signal stopped the run after a checkpoint.
    """
    told = CallbackList(callbacks)
    config = given_settings(TrainConfig, config, settings)
    check_threads(config.threads)
    if config.threads:
        torch.set_num_threads(config.threads)
    asked = with_cpu_dtype(with_init_adapter(config))
    process = _process(asked)
    config, rows = with_fitted(asked)
    where = destination(config)
    with RunDirectory(config, console=console) as directory, ExitStack() as stack:
        prepared = _checked(directory.config, process, rows)
        directory.open()
        stack.enter_context(deterministic(resolve_device(config.device), config.deterministic))
        stack.enter_context(explained_memory(directory.config, prepared))
        run = _Run(directory, prepared, stack, process, told)
        directory.begin()
        if asked.fit_memory is not None:
            log.info("chosen for the memory: %s", fitted_changes(asked, config) or "no changes")
        if run.device.type == "cpu":
            log_choice(directory.config.dtype)
        before = run.evaluate_before()
        directory.write_manifest(
            base_digest=prepared.digests["base"],
            digests=prepared.digests,
            dtype=str(run.model.dtype).removeprefix("torch."),
            trainable_parameters=run.trainable,
            rows=prepared.row_count,
            total_steps=prepared.total_steps,
            planned_bytes=run.planned_bytes,
            **before,
        )
        log.info(
            "%s: %d trainable parameters, %d rows, %d steps",
            config.method, run.trainable, prepared.row_count, prepared.total_steps,
        )  # fmt: skip
        first = prepared.examples[0]
        as_text = " ".join(shown_stretches(first, prepared.tokenizer))
        log.info("%s as it is trained (behind '>'): %s", first.source, as_text[:_SHOWN])
        progress = run.train()
        after = run.evaluate_after()
        output = run.state.write_output(prepared.model_source, directory.path)
        figures = run.figures(progress) | before | after
        if config.plot:
            plot_loss(directory.path, before.get("heldout_loss_before"))
        shown = directory.config
        if not prepared.tokenizer.chat_template.reads_clock:
            shown = shown.model_copy(update={"template_date": None})
        commands = next_steps(shown, output)
        directory.write_summary(
            "Success",
            output_path=output,
            metrics=figures,
            next=commands,
            repeat_heldout=repeat_heldout(shown, output),
        )
        log.info("Saved: %s", output)
    adapter = None if config.every_weight else output
    base = None if config.method == "scratch" else config.model
    sent = publish_folder(where, output, base)
    history = [{"step": 0, **figures_before(before)}] if before else []
    history += read_metrics(directory.metrics_path)
    where_saved = directory.path, adapter, figures, "Success", output
    result = TrainResult(*where_saved, tuple(commands), sent, history)
    told.on_end(result)
    return result


def _process(config: TrainConfig) -> int:
    """What this process holds of the device's memory besides tensors, before weights are read."""
    from engine.memory.process import process_bytes

    return process_bytes(resolve_device(config.device))


def _checked(config: TrainConfig, process: int, rows: RowSet | None) -> Prepared:
    """Everything that can be known before a weight is read; `config` has its directory and date.

    `rows` are those that were read to plan the run.
    """
    check_earlier(config)
    with deterministic(resolve_device(config.device), config.deterministic):
        prepared = prepare(config, partial(require_space_for, config, process), rows)
    check_identity(prepared.identity)
    return prepared


def dry_run(config: TrainConfig, rows: int = 2) -> str:
    """The resolved run as text: settings, counts, and the first rows as they will be trained.

    Each stretch of tokens has a line; those that are trained begin with '>'.
    Reads no weights and writes nothing. Raises as `train` would.
    """
    from engine.config.sources import dump_yaml

    config = with_cpu_dtype(with_init_adapter(config))
    process = _process(config)
    config, planned = with_fitted(config)
    config = dated(name_run(config))
    prepared = _checked(config, process, planned)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    lines = [dump_yaml(config).rstrip(), "", prepared.rows.report.describe()]
    lines.append(
        f"{prepared.total_steps} steps of {config.batch_size} x {config.accumulate} rows on "
        f"{device} in {str(dtype).removeprefix('torch.')}; {len(prepared.heldout)} rows held out"
    )
    line = stored_line(prepared.model_source, run_fate(config, prepared.model_source))
    lines += [line] if line else []
    for example in prepared.examples[:rows]:
        lines += ["", f"{example.source}:", *shown_stretches(example, prepared.tokenizer)]
    return "\n".join(lines)
