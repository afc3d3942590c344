"""The recipe: from a `TrainConfig` to a trained adapter (or model) on the disk.

Everything is opened, checked and counted before the weights are read: data, tokenizer, adapter,
device, trackers, the run's directory. The loop itself is `engine.training.loop`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.data.examples import Example
from engine.device import resolve_device, resolve_dtype
from engine.errors import CheckpointError
from engine.inference.perplexity import EvalResult, evaluate_examples
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.from_model import TrainedSource
from engine.model_sources.load_model import build_for
from engine.model_sources.open import open_model_source
from engine.provenance import version
from engine.pruning.keep_pruned import hold_pruned
from engine.runs.directory import RunDirectory
from engine.runs.metrics import MetricsWriter, StepMetrics, peak_memory_bytes, plot_loss
from engine.runs.progress import ProgressReporter
from engine.runs.signals import StopSignals
from engine.runs.trackers import Trackers, require_trackers
from engine.storage import durable
from engine.tokenization.tokenizer import Tokenizer
from engine.training.loop import (
    Progress,
    Trainer,
    TrainerHooks,
    TrainerSettings,
    new_progress,
)
from engine.training.prepare import Prepared, prepare
from engine.training.step import TrainingStep
from engine.training.trainable import (
    BASE_FILE,
    adapter_config,
    check_init_adapter,
    check_policies,
    check_run,
    make_in_backward,
    make_optimizer,
    make_trainable,
    step_settings,
)
from models.adapters import (
    PARTS,
    adapter_tensors,
)
from models.config.model_config import ModelConfig
from models.decoder import Decoder

if TYPE_CHECKING:
    from engine.memory.budget import MemoryBudget
    from engine.memory.estimate import MemoryPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run left. `adapter_path` is None after full fine-tuning, which saves `model/`."""

    run_directory: Path
    adapter_path: Path | None
    metrics: dict[str, Any]
    status: str
    output_path: Path | None = None


def load_teacher(config: TrainConfig, prepared: Prepared, device: torch.device) -> Decoder | None:
    """The model of `config.teacher`, held as the run's own base is; None where there is none.

    Raises `CheckpointError` where its vocabulary is another.
    """
    if config.teacher is None:
        return None
    source = open_model_source(config.teacher)
    theirs, ours = source.config.vocab_size, prepared.model_source.config.vocab_size
    if theirs != ours:
        raise CheckpointError(
            f"The teacher {config.teacher} has a vocabulary of {theirs}, the model one of {ours}; "
            "probabilities can only be compared over the same tokens."
        )
    log.info("learning from %s", config.teacher)
    return build_for(config, source, device, resolve_dtype(config.dtype, device))


def _with_policy(
    config: TrainConfig, prepared: Prepared, device: torch.device, dtype: torch.dtype
) -> tuple[TrainConfig, MemoryPlan | None]:
    """The settings with the checkpointing policy chosen, where they leave it to the machine.

    With them the plan of the largest step, if the choice needed one.
    """
    if config.gradient_checkpointing != "auto":
        check_policies(config, prepared.model_source.config.num_hidden_layers)
        return config, None
    from engine.memory.auto_policy import planned_policy
    from engine.memory.budget import largest_step

    policy, planned = planned_policy(
        prepared.model_source.config, config, device, dtype, largest_step(prepared)
    )
    return config.model_copy(update={"gradient_checkpointing": policy}), planned


def _require_room(config: TrainConfig, model: ModelConfig) -> None:
    """Raises `MemoryPlanError` where no row at all would fit the run's memory budget."""
    if config.memory_budget is not None:
        from engine.memory.budget import require_room

        device = resolve_device(config.device)
        require_room(config, model, device, resolve_dtype(config.dtype, device))


def _budget(
    prepared: Prepared,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    planned: MemoryPlan | None,
) -> MemoryBudget | None:
    """The run's memory budget, if it has one; raises `MemoryPlanError` where it cannot hold."""
    if config.memory_budget is None:
        return None
    from engine.memory.budget import MemoryBudget

    return MemoryBudget(prepared, config, device, dtype, planned)


class _Run:
    """One training run between the opening of its directory and its summary."""

    def __init__(self, directory: RunDirectory, prepared: Prepared, stack: ExitStack) -> None:
        self.directory, self.prepared, self.stack = directory, prepared, stack
        self.config = directory.config
        self.device = resolve_device(self.config.device)
        self.digest = prepared.model_source.digest()
        dtype = resolve_dtype(self.config.dtype, self.device)
        settings, planned = _with_policy(self.config, prepared, self.device, dtype)
        self.budget = _budget(prepared, settings, self.device, dtype, planned)
        check_run(self.config, prepared.model_source.config, self.device, dtype)
        init = check_init_adapter(self.config, self.prepared.model_source.config, self.digest)
        self.model = build_for(self.config, prepared.model_source, self.device, dtype)
        self.trainable = make_trainable(self.model, settings, init)
        self.settings = step_settings(settings)
        self.optimizer = make_optimizer(self.model, self.config)
        self.in_backward = make_in_backward(self.model, self.optimizer, self.config)
        hold_pruned(self.model, self.optimizer, prepared.model_source.path)
        if self.config.cuda_graphs:
            self.model.record_layers()
        self.progress = self._resume()

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: the adapter's tensors, or every weight."""
        if self.config.method == "full":
            return dict(self.model.named_parameters())
        return {
            f"{path}.{part}": tensor
            for path, tensors in adapter_tensors(self.model).items()
            for part, tensor in zip(PARTS, tensors, strict=False)
        }

    def _resume(self) -> Progress:
        loaded = self.directory.checkpoints.resume(self.config.resume)
        if loaded is None:
            return new_progress(self.model)
        state = loaded.state
        for key, mine in (("trajectory", self.config.trajectory()), ("base", self.digest)):
            if state.get(key) != mine:
                raise CheckpointError(
                    f"{loaded.path} belongs to another run: {_difference(state.get(key), mine)}. "
                    "Go on with the settings and model it was started with, or start a new run "
                    "in another --output-dir."
                )
        saved = loaded.tensors("weights")
        own = self.weights()
        if saved.keys() != own.keys():
            raise CheckpointError(f"{loaded.path} holds other weights than this run trains.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.optimizer.load_state_tensors(loaded.tensors("optimizer"))
        self.settings = replace(self.settings, checkpointing=state["recompute"])
        log.info("Going on from %s", loaded.path)
        return Progress(**state["progress"])

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the run as it stands."""
        self.directory.checkpoints.save(
            progress.step,
            {
                "weights": {k: v.detach().cpu() for k, v in self.weights().items()},
                "optimizer": {k: v.cpu() for k, v in self.optimizer.state_tensors().items()},
            },
            {
                "progress": progress.state(),
                "trajectory": self.config.trajectory(),
                "recompute": self.settings.checkpointing,
                "base": self.digest,
            },
        )

    def evaluate(self) -> EvalResult:
        return evaluate_examples(self.model, self.prepared.heldout, settings=self.settings)

    def _heldout_figures(self) -> dict[str, float]:
        result = self.evaluate()
        log.info("held-out loss %.4f, perplexity %.2f", result.loss, result.perplexity)
        return {"eval_loss": result.loss, "eval_perplexity": result.perplexity}

    def train(self) -> Progress:
        """The loop, with its progress bar, metrics and trackers."""
        config, prepared, directory = self.config, self.prepared, self.directory
        start = self.progress.step
        metrics = MetricsWriter(directory.metrics_path, start)
        self.stack.callback(metrics.close)
        assert config.run_id is not None
        trackers = self.stack.enter_context(
            Trackers(
                config.report_to,
                directory.path,
                config.run_id,
                config.model_dump(mode="json"),
                first_step=start + 1,
            )
        )
        bar = self.stack.enter_context(
            ProgressReporter(prepared.total_steps, start, log_every=config.log_every)
        )

        def report(line: StepMetrics) -> None:
            metrics.write(line)
            trackers.log(line.step, line.as_dict())
            bar.update(line)

        def save(progress: Progress) -> None:
            metrics.sync()
            self.save(progress)

        hooks = TrainerHooks(save, report, self._heldout_figures if prepared.heldout else None)
        if self.budget is not None:
            hooks = replace(hooks, watch=partial(self.budget.watch, self.model, self.optimizer))
        signals = self.stack.enter_context(StopSignals())
        settings = self._trainer_settings()
        trainer = Trainer(self._step(), prepared.batches, settings, hooks, signals, self.progress)
        return trainer.run()

    def _step(self) -> TrainingStep:
        return TrainingStep(
            self.model,
            self.optimizer,
            self.settings,
            self.config.max_grad_norm,
            self.config.seed,
            load_teacher(self.config, self.prepared, self.device),
            self.in_backward,
        )

    def _trainer_settings(self) -> TrainerSettings:
        config, total_steps = self.config, self.prepared.total_steps
        return TrainerSettings(
            total_steps=total_steps,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            warmup_steps=config.warmup(total_steps),
            nonfinite_limit=config.nonfinite_limit,
            checkpoint_every=config.checkpoint_every,
            eval_every=config.eval_every,
        )

    def write_output(self) -> Path:
        """The adapter with PEFT's names, or after full fine-tuning the whole model."""
        if self.config.method == "full":
            from engine.model_sources.export import export_hf_directory

            target = self.directory.path / "model"
            if target.exists():  # of a run that had ended and was resumed
                shutil.rmtree(target)
            export_hf_directory(TrainedSource(self.prepared.model_source, self.model), target)
            return target
        target = self.directory.adapter_path
        config = adapter_config(self.config, self.prepared.model_source)
        save_adapter(target, config, adapter_tensors(self.model))
        base = {"digest": self.digest, "engine_version": version()}
        durable.write_json(target / BASE_FILE, base)
        return target


def _difference(saved: Any, mine: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return "its base model has other weights"
    keys = [key for key in mine if saved.get(key) != mine[key]]
    return "; ".join(f"{key} was {saved.get(key)!r} and is {mine[key]!r}" for key in keys[:4])


def train(config: TrainConfig, *, console: bool = True) -> TrainResult:
    """Run a fine-tuning from start to end; on any failure the directory's summary says why.

    Raises children of `EngineError` for what the user can mend, and `Interrupted` (an exit status)
    when a signal stopped the run after a checkpoint.
    """
    require_trackers(config.report_to)
    device = resolve_device(config.device)
    check_run(config, None, device, resolve_dtype(config.dtype, device))
    if config.threads:
        torch.set_num_threads(config.threads)
    with RunDirectory(config, console=console) as directory, ExitStack() as stack:
        prepared = prepare(directory.config, partial(_require_room, directory.config))
        run = _Run(directory, prepared, stack)
        directory.write_manifest(
            base_digest=run.digest,
            trainable_parameters=run.trainable,
            rows=len(prepared.examples),
            total_steps=prepared.total_steps,
        )
        log.info(
            "%s: %d trainable parameters, %d rows, %d steps",
            config.method, run.trainable, len(prepared.examples), prepared.total_steps,
        )  # fmt: skip
        before = run.evaluate() if prepared.heldout and run.progress.step == 0 else None
        if before:
            log.info("held-out perplexity before training: %.3f", before.perplexity)
        progress = run.train()
        figures: dict[str, Any] = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "skipped_steps": progress.skipped,
            "train_seconds": round(progress.seconds, 3),
            "trainable_parameters": run.trainable,
            **prepared.row_counts(),
        }
        if before:
            figures["heldout_perplexity_before"] = before.perplexity
        if prepared.heldout:
            after = run.evaluate()
            figures["heldout_perplexity"] = after.perplexity
            figures["heldout_loss"] = after.loss
            log.info("held-out perplexity after training: %.3f", after.perplexity)
        output = run.write_output()
        if run.model.graphs is not None:
            figures["micro_batches_recorded"] = run.model.graphs.repeated
            figures["micro_batches_launched"] = run.model.graphs.launched
        figures["peak_memory_bytes"] = peak_memory_bytes(run.device)
        if run.budget is not None:
            figures |= run.budget.figures()
        if config.plot:
            plot_loss(directory.path)
        directory.write_summary("Success", output_path=output, metrics=figures)
        log.info("Saved: %s", output)
    adapter = None if config.method == "full" else output
    return TrainResult(directory.path, adapter, figures, "Success", output)


def dry_run(config: TrainConfig, rows: int = 2) -> str:
    """The resolved run as text: settings, counts, and the first rows as they will be trained.

    Reads no weights and writes nothing. Raises as `train` would.
    """
    from engine.config.sources import dump_yaml

    require_trackers(config.report_to)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_run(config, None, device, dtype)
    prepared = prepare(config)
    check_init_adapter(config, prepared.model_source.config, prepared.model_source.digest())
    check_run(config, prepared.model_source.config, device, dtype)
    lines = [dump_yaml(config).rstrip(), "", prepared.report.describe()]
    lines.append(
        f"{prepared.total_steps} steps of {config.batch_size} x {config.accumulate} rows on "
        f"{device} in {str(dtype).removeprefix('torch.')}; {len(prepared.heldout)} rows held out"
    )
    for example in prepared.examples[:rows]:
        lines += ["", f"{example.source}:", *_marked(example, prepared.tokenizer)]
    return "\n".join(lines)


def _marked(example: Example, tokenizer: Tokenizer) -> Iterator[str]:
    """The row's text in pieces, those that are trained marked with a leading '>'."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    for trained, ids in runs:
        yield f"{'> ' if trained else '  '}{tokenizer.decode(ids, False)!r}"
