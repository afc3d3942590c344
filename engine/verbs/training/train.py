"""`engine train`: from a `TrainConfig` to a trained adapter or model.

Everything is opened, checked and counted before the weights are read: data, tokenizer, adapter,
device, trackers, the run's directory. The loop itself is `engine.training.loop`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config.settings import given_settings
from engine.config.tasks.commands import next_steps, repeat_heldout
from engine.config.train_config import TrainConfig
from engine.data.examples import shown_stretches
from engine.device import check_threads, resolve_device, resolve_dtype
from engine.distributed.dealing import Dealer
from engine.distributed.follower import FollowedDirectory
from engine.distributed.group import Group, after_restart, joined, launched, leads
from engine.distributed.mesh import Mesh, MeshSizes, lay_out
from engine.distributed.messages import all_or_none, broadcast_text
from engine.exporting.publish import destination, publish_folder
from engine.model_sources.quantised.fates import run_fate, stored_line
from engine.runs.directory import RunDirectory, dated
from engine.runs.identity import check_identity
from engine.runs.metrics import peak_memory_bytes, plot_loss, read_metrics
from engine.runs.output import check_earlier, name_run
from engine.runs.signals import PASSED_ON, StopSignals, are_passed_on
from engine.training.cpu_dtype import log_choice, with_cpu_dtype
from engine.training.determinism import deterministic
from engine.training.evaluation.best import BestRule, BestSoFar
from engine.training.evaluation.callbacks import CallbackList
from engine.training.evaluation.heldout import figures_before, told_before
from engine.training.init_adapter import with_init_adapter
from engine.training.loop import Progress, Trainer, TrainerHooks
from engine.training.prepare import Prepared, prepare
from engine.training.processes.started import train_in_processes
from engine.training.processes.together import agreed, over_ranks
from engine.training.row_set import RowSet
from engine.verbs.training.plan import fitted_changes, with_fitted
from engine.verbs.training.run_memory import explained_memory, require_space_for
from engine.verbs.training.run_reports import NoReports, RunReports
from engine.verbs.training.run_setup import RunSetup

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
        group: Group,
        mesh: Mesh,
    ) -> None:
        self.directory, self.prepared, self.stack = directory, prepared, stack
        self.callbacks, self.group = callbacks, group
        self.config = directory.config
        checkpoints = directory.checkpoints if group.leads else None
        self.setup = RunSetup(self.config, prepared, process, checkpoints, group, mesh)
        self.progress, self.heldout = self.setup.progress, self.setup.heldout

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
        state = self.setup.state
        if restored:
            state.take_best(self.group, self.directory.checkpoints, facts["step"])
        if restored or step != self.progress.step or not state.evaluates_output:
            known = None
        with state.output_weights():
            figures = self.heldout.after(known)
        return figures | {f"best_{name}": value for name, value in facts.items()}

    def figures(self, progress: Progress) -> dict[str, Any]:
        """What the summary says of a run that has trained: counts, time and memory."""
        setup, graphs = self.setup, self.setup.model.graphs
        figures: dict[str, Any] = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "skipped_steps": progress.skipped,
            "train_seconds": round(progress.seconds, 3),
            "trainable_parameters": setup.trainable,
            **({} if setup.average is None else {"ema_updates": setup.average.updates}),
            **self.prepared.row_counts(),
        }
        if graphs is not None:
            figures["micro_batches_recorded"] = graphs.repeated
            figures["micro_batches_launched"] = graphs.launched
        figures["peak_memory_bytes"] = peak_memory_bytes(setup.device)
        return figures if setup.budget is None else figures | setup.budget.figures()

    def train(self) -> Progress:
        """The loop, with its progress bar, metrics and trackers."""
        config, prepared, directory = self.config, self.prepared, self.directory
        setup, start = self.setup, self.progress.step
        prepared.go_on(start, self.progress.cursor)
        self.stack.callback(prepared.close)
        group, reports = self.group, self._reports(start)

        def save(progress: Progress) -> None:
            progress.cursor = prepared.cursor(progress.step)
            all_or_none(group, partial(write, progress))

        def write(progress: Progress) -> None:
            state = setup.state.collected(progress.step)
            if not group.leads:
                state.follow()
                return
            with state.led():
                reports.sync()
                facts = None if best is None else best.facts()
                source, store = prepared.model_source, directory.checkpoints
                path = setup.state.save(store, progress, setup.going, source, facts, state)
            directory.reached_checkpoint()
            reports.saved(progress.step, path)

        rule = BestRule.of(config)
        best = None if rule is None else BestSoFar(rule, self.progress.best)
        hooks = TrainerHooks(
            save,
            lambda line: reports.step(over_ranks(group, line)),
            setup.state.on_evaluated(self.heldout.figures) if prepared.heldout else None,
            sample=setup.state.on_evaluated(reports.sample),
            ended=lambda: self.callbacks.ended,
            agree=partial(agreed, group),
        )
        if setup.budget is not None:
            watch = partial(setup.budget.watch, setup.model, setup.optimization, setup.average)
            hooks = replace(hooks, watch=watch, overrun=setup.budget.overrun)
        twice = launched() or are_passed_on()
        signals = self.stack.enter_context(StopSignals(PASSED_ON if twice else 0.0))
        settings = setup.trainer_settings()
        self.trainer = Trainer(
            setup.step(), prepared.batches, settings, hooks, signals, self.progress, best
        )
        reached = self.trainer.run()
        if best is not None and best.exhausted:
            log.info(
                "Ended after step %d of %d: %d evaluations brought no better %s",
                *(reached.step, prepared.total_steps, best.state.waited, best.rule.metric),
            )
        return reached

    def _reports(self, start: int) -> RunReports | NoReports:
        if not self.group.leads:
            return NoReports(self.setup.answers, start)
        told = self.prepared, self.setup.answers, start, self.callbacks, self.stack
        return RunReports(self.directory, *told)


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
    if config.gpus > 1 and not launched():
        return _in_processes(config, console, told)
    if config.threads:
        torch.set_num_threads(config.threads)
    with joined(config.device, config.ddp_timeout) as group:
        return _train(config, group, console, told)


def _in_processes(config: TrainConfig, console: bool, told: CallbackList) -> TrainResult:
    """Train in processes of this machine, and tell what they left."""
    destination(config)  # refused here, before any process starts
    told.refuse("--gpus above 1, whose processes know nothing of this one's objects")
    config = dated(name_run(config))
    facts = train_in_processes(config, console)
    assert config.output_dir is not None
    output, metrics = Path(facts["output"]), facts["metrics"]
    left = _Left(output, metrics, facts["next"], told_before(metrics), facts["pushed"])
    return _result(config, config.output_dir, left)


def _train(config: TrainConfig, group: Group, console: bool, told: CallbackList) -> TrainResult:
    """The run as one process of its group has it."""
    asked, config, rows = all_or_none(group, partial(_resolved, config, group))
    if not group.is_alone:
        config = TrainConfig(**json.loads(broadcast_text(group.ranks, config.model_dump_json())))
    sizes = MeshSizes(config.context_parallel, config.expert_parallel, config.shard == "weights")
    mesh = lay_out(group, sizes)
    process = _process(config)
    where = all_or_none(group, lambda: destination(config) if group.leads else None)
    with _directory(config, group, console) as directory, ExitStack() as stack:
        prepared = all_or_none(group, partial(_checked, directory.config, process, rows))
        if not group.is_alone:
            prepared.dealer = Dealer.of(config, prepared.model_source.config, mesh)
        all_or_none(group, directory.open)
        stack.enter_context(deterministic(resolve_device(config.device), config.deterministic))
        stack.enter_context(explained_memory(directory.config, prepared))
        started = partial(_Run, directory, prepared, stack, process, told, group, mesh)
        run = all_or_none(group, started)
        all_or_none(group, directory.begin)
        if asked.fit_memory is not None:
            log.info("chosen for the memory: %s", fitted_changes(asked, config) or "no changes")
        if run.setup.device.type == "cpu":
            log_choice(directory.config.dtype)
        before = run.evaluate_before()
        directory.write_manifest(
            base_digest=prepared.digests["base"],
            digests=prepared.digests,
            dtype=str(run.setup.model.dtype).removeprefix("torch."),
            trainable_parameters=run.setup.trainable,
            rows=prepared.row_count,
            total_steps=prepared.total_steps,
            planned_bytes=run.setup.planned_bytes,
            **before,
        )
        log.info(
            "%s: %d trainable parameters, %d rows, %d steps",
            config.method, run.setup.trainable, prepared.row_count, prepared.total_steps,
        )  # fmt: skip
        first = prepared.examples[0]
        as_text = " ".join(shown_stretches(first, prepared.tokenizer))
        log.info("%s as it is trained (behind '>'): %s", first.source, as_text[:_SHOWN])
        progress = run.train()
        after = run.evaluate_after()
        if not group.leads:
            all_or_none(group, partial(run.setup.state.follow_output, prepared.model_source))
            return TrainResult(directory.path, None, after, "Success")
        writes = partial(run.setup.state.write_output, prepared.model_source, directory.path)
        output = all_or_none(group, writes)
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
    sent = publish_folder(where, output, None if config.method == "scratch" else config.model)
    result = _result(config, directory.path, _Left(output, figures, commands, before, sent))
    told.on_end(result)
    return result


@dataclass(frozen=True)
class _Left:
    """What a run left: the output, its figures, those before the first step, where it was sent."""

    output: Path
    metrics: dict[str, Any]
    commands: Sequence[str]
    before: Mapping[str, float]
    pushed: str | None


def _result(config: TrainConfig, directory: Path, left: _Left) -> TrainResult:
    history = [{"step": 0, **figures_before(left.before)}] if left.before else []
    history += read_metrics(directory / "metrics.jsonl")
    adapter = None if config.every_weight else left.output
    told = left.metrics, "Success", left.output, tuple(left.commands), left.pushed
    return TrainResult(directory, adapter, *told, history)


def _resolved(config: TrainConfig, group: Group) -> tuple[TrainConfig, TrainConfig, RowSet | None]:
    """The settings as asked for, as the machine decides them, and rows that were read for that.

    The first process of a group decides for all; the others return what they were given.
    """
    if not group.leads:
        return config, config, None
    if config.shard != "none":  # what is gathered is as it is stored
        config = config.model_copy(update={"keep_decoded": "none"})
    asked = with_cpu_dtype(with_init_adapter(after_restart(config)))
    fitted, rows = with_fitted(asked)
    return asked, fitted if group.is_alone else dated(name_run(fitted)), rows


def _directory(config: TrainConfig, group: Group, console: bool) -> RunDirectory:
    if group.leads:
        return RunDirectory(config, console=console)
    return FollowedDirectory(config)


def _process(config: TrainConfig) -> int:
    """What this process holds of the device's memory besides tensors, before weights are read."""
    from engine.memory.process import process_bytes

    return process_bytes(resolve_device(config.device))


def _checked(config: TrainConfig, process: int, rows: RowSet | None) -> Prepared:
    """Everything that can be known before a weight is read; `config` has its directory and date.

    `rows` are those that were read to plan the run.
    """
    if leads():
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
