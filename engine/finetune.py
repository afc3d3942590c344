"""The recipe: from a `TrainConfig` to a trained adapter (or model) on the disk.

Everything is opened, checked and counted before the weights are read: data, tokenizer, adapter,
device, trackers, the run's directory. The loop itself is `engine.trainer`.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config import TrainConfig
from engine.data.dataset import load_rows
from engine.data.examples import Example, Report, build_examples, check_ids
from engine.data.loader import Batch, BatchPlan, collate, split_heldout
from engine.data.rows import Row
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.device import resolve_device, resolve_dtype
from engine.errors import CheckpointError, ConfigError
from engine.evaluate import EvalResult, evaluate_examples
from engine.formats import durable
from engine.formats.adapter import AdapterConfig, load_adapter, save_adapter
from engine.formats.checkpoint import Checkpoint, open_checkpoint
from engine.load import build_model
from engine.metrics import MetricsWriter, StepMetrics, peak_memory_bytes, plot_loss
from engine.progress import ProgressReporter
from engine.run_directory import RunDirectory
from engine.signals import StopSignals
from engine.trackers import Trackers, require_trackers
from engine.trainer import Progress, Trainer, TrainerSettings, new_progress
from models.decoder import Decoder
from models.lora import adapter_tensors, add_lora, load_adapter_tensors, target_modules
from optim import AdamW8bit, param_groups

if TYPE_CHECKING:
    from engine.budget import MemoryBudget

log = logging.getLogger(__name__)
BASE_FILE = "base.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run left. `adapter_path` is None after full fine-tuning, which saves `model/`."""

    run_directory: Path
    adapter_path: Path | None
    metrics: dict[str, Any]
    status: str
    output_path: Path | None = None


@dataclass
class Prepared:
    """Everything of a run that needs no weights."""

    config: TrainConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    examples: list[Example]
    heldout: list[Example]
    plan: BatchPlan
    report: Report
    steps_per_epoch: int = field(init=False)
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.steps_per_epoch = math.ceil(self.plan.steps_per_epoch / config.accumulate)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch

    def batches(self, step: int) -> tuple[list[Batch], float]:
        """The micro-batches of a step, counted from 0, and the epoch reached after it."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.config.accumulate
        last = min(first + self.config.accumulate, self.plan.steps_per_epoch)
        batches = [
            collate([self.examples[row] for row in self.plan.batch(epoch, micro)])
            for micro in range(first, last)
        ]
        return batches, epoch + last / self.plan.steps_per_epoch


def prepare(config: TrainConfig) -> Prepared:
    """Open the model's files and tokenise the data; no weight is read.

    Raises `ConfigError`, `CheckpointError` or `DataError`.
    """
    checkpoint = open_checkpoint(config.model, config.revision)
    tokenizer = load_tokenizer(checkpoint)
    rows = load_rows(list(config.data), config.min_rating, config.category)[: config.limit_rows]
    held_rows = load_rows(list(config.eval_data)) if config.eval_data else []
    if config.heldout:
        rows, held_rows = split_heldout(rows, config.heldout, config.seed)
    rows = [_with_system(row, config.system_prompt) for row in rows]
    held_rows = [_with_system(row, config.system_prompt) for row in held_rows]
    examples, report = build_examples(rows, tokenizer, config.max_length)
    heldout: list[Example] = []
    if held_rows:
        heldout, _ = build_examples(held_rows, tokenizer, config.max_length)
    check_ids([*examples, *heldout], checkpoint.config.vocab_size)
    plan = BatchPlan(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        packing=config.packing,
        max_length=config.max_length,
    )
    return Prepared(config, checkpoint, tokenizer, examples, heldout, plan, report)


def _with_system(row: Row, prompt: str | None) -> Row:
    """The row with a system message in front, unless it has one."""
    if prompt is None or any(message["role"] == "system" for message in row.messages):
        return row
    return replace(row, messages=[{"role": "system", "content": prompt}, *row.messages])


def check_init_adapter(config: TrainConfig, digest: str) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The tensors of `init_adapter`, if there is one and it is of this base, rank and targets.

    Raises `CheckpointError` naming every mismatch.
    """
    if config.init_adapter is None:
        return None
    found, tensors = load_adapter(config.init_adapter)
    wrong = []
    base = _base_digest(config.init_adapter)
    if base is not None and base != digest:
        wrong.append(f"it was trained on another base ({found.base_model_name_or_path})")
    elif base is None and not _same_model(found.base_model_name_or_path, config.model):
        wrong.append(f"its base is {found.base_model_name_or_path}, this run's {config.model}")
    if found.r != config.lora_rank:
        wrong.append(f"its rank is {found.r}, --lora-rank is {config.lora_rank}")
    if found.lora_alpha != config.lora_alpha or found.use_rslora != config.use_rslora:
        wrong.append(
            f"its alpha is {found.lora_alpha:g} (rslora {found.use_rslora}), this run's "
            f"{config.lora_alpha:g} (rslora {config.use_rslora})"
        )
    targets = {path.rsplit(".", 1)[-1] for path in tensors}
    wanted = set(_targets(config))
    if targets != wanted:
        wrong.append(f"it adapts {_listed(targets)}, --target-modules is {_listed(wanted)}")
    if wrong:
        raise CheckpointError(
            f"The adapter {config.init_adapter} cannot be trained on from here: "
            f"{'; '.join(wrong)}. Give the settings it was trained with, or leave out "
            "--init-adapter to start a new one."
        )
    return tensors


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _base_digest(adapter: Path) -> str | None:
    import json

    path = adapter / BASE_FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text())["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it to go on by the base's name alone."
        ) from error


def _same_model(left: str, right: str) -> bool:
    """Whether two names of a model mean the same: equal paths, or the same last part."""
    if not left:
        return True
    return Path(left).resolve() == Path(right).resolve() or Path(left).name == Path(right).name


def _targets(config: TrainConfig) -> tuple[str, ...]:
    try:
        return target_modules(config.target_modules)
    except ValueError as error:
        raise ConfigError(f"--target-modules: {error}.") from error


def make_trainable(
    model: Decoder, config: TrainConfig, init: dict[str, tuple[Tensor, Tensor]] | None
) -> int:
    """Turn on what `config.method` trains and return the number of trainable parameters.

    `config.gradient_checkpointing` must be a level, not auto.
    """
    if config.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=_targets(config),
            use_rslora=config.use_rslora,
            seed=config.seed,
        )
        if init is not None:
            load_adapter_tensors(model, init)
    model.set_recompute(config.gradient_checkpointing)
    model.loss_chunk_rows = config.loss_chunk_rows
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_optimizer(model: Decoder, config: TrainConfig) -> AdamW8bit:
    """AdamW over the trainable parameters; norms and biases do not decay."""
    return AdamW8bit(
        param_groups(model.named_parameters(), config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        min_8bit_size=4096 if config.optimizer == "adamw8bit" else 1 << 62,
    )


def adapter_config(config: TrainConfig, checkpoint: Checkpoint) -> AdapterConfig:
    """What `adapter_config.json` says of this run's adapter."""
    local = Path(config.model).exists()
    return AdapterConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(_targets(config)),
        base_model_name_or_path=str(checkpoint.path.resolve()) if local else config.model,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
    )


def _with_recompute(
    config: TrainConfig, prepared: Prepared, device: torch.device, dtype: torch.dtype
) -> TrainConfig:
    """The settings with the recompute level chosen, where they leave it to the machine."""
    if config.gradient_checkpointing != "auto":
        return config
    from engine.budget import largest_step
    from engine.recompute import resolve_recompute

    level = resolve_recompute(
        prepared.checkpoint.config, config, device, dtype, largest_step(prepared)
    )
    return config.model_copy(update={"gradient_checkpointing": level})


def _budget(
    prepared: Prepared, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> MemoryBudget | None:
    """The run's memory budget, if it has one; raises `MemoryPlanError` where it cannot hold."""
    if config.memory_budget is None:
        return None
    from engine.budget import MemoryBudget

    return MemoryBudget(prepared, config, device, dtype)


class _Run:
    """One training run between the opening of its directory and its summary."""

    def __init__(self, directory: RunDirectory, prepared: Prepared, stack: ExitStack) -> None:
        self.directory, self.prepared, self.stack = directory, prepared, stack
        self.config = directory.config
        self.device = resolve_device(self.config.device)
        self.digest = prepared.checkpoint.digest()
        dtype = resolve_dtype(self.config.dtype, self.device)
        settings = _with_recompute(self.config, prepared, self.device, dtype)
        self.budget = _budget(prepared, settings, self.device, dtype)
        init = check_init_adapter(self.config, self.digest)
        self.model = build_model(
            prepared.checkpoint,
            quantization="nf4" if self.config.method == "qlora" else None,
            double_quant=self.config.double_quant,
            device=self.device,
            dtype=dtype,
        )
        self.trainable = make_trainable(self.model, settings, init)
        self.optimizer = make_optimizer(self.model, self.config)
        self.progress = self._resume()

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: the adapter's pairs, or every weight."""
        if self.config.method == "full":
            return dict(self.model.named_parameters())
        return {
            f"{path}.lora_{kind}": tensor
            for path, pair in adapter_tensors(self.model).items()
            for kind, tensor in zip("AB", pair, strict=True)
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
        self.model.set_recompute(state["recompute"])
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
                "recompute": self.model.recompute,
                "base": self.digest,
            },
        )

    def evaluate(self) -> EvalResult:
        return evaluate_examples(self.model, self.prepared.heldout)

    def _held_figures(self) -> dict[str, float]:
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

        trainer = Trainer(
            self.model,
            self.optimizer,
            prepared.batches,
            TrainerSettings(
                total_steps=prepared.total_steps,
                learning_rate=config.learning_rate,
                lr_schedule=config.lr_schedule,
                warmup_steps=config.warmup(prepared.total_steps),
                max_grad_norm=config.max_grad_norm,
                seed=config.seed,
                nonfinite_limit=config.nonfinite_limit,
                checkpoint_every=config.checkpoint_every,
                eval_every=config.eval_every,
            ),
            save=save,
            report=report,
            evaluate=self._held_figures if prepared.heldout else None,
            signals=self.stack.enter_context(StopSignals()),
            progress=self.progress,
            watch=self._watch(),
        )
        return trainer.run()

    def _watch(self) -> Callable[[Sequence[Batch]], AbstractContextManager[None]] | None:
        if self.budget is None:
            return None
        return partial(self.budget.watch, self.model, self.optimizer)

    def write_output(self) -> Path:
        """The adapter with PEFT's names, or after full fine-tuning the whole model."""
        if self.config.method == "full":
            from engine.formats.export import export_hf_directory

            target = self.directory.path / "model"
            if target.exists():  # of a run that had ended and was resumed
                shutil.rmtree(target)
            export_hf_directory(_Trained(self.prepared.checkpoint, self.model), target)
            return target
        target = self.directory.adapter_path
        config = adapter_config(self.config, self.prepared.checkpoint)
        save_adapter(target, config, adapter_tensors(self.model))
        durable.write_json(target / BASE_FILE, {"digest": self.digest})
        return target


def _difference(saved: Any, mine: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return "its base model has other weights"
    keys = [key for key in mine if saved.get(key) != mine[key]]
    return "; ".join(f"{key} was {saved.get(key)!r} and is {mine[key]!r}" for key in keys[:4])


class _Trained:
    """A checkpoint whose tensors are a model's parameters, for the writer of directories."""

    def __init__(self, source: Checkpoint, model: Decoder) -> None:
        self._source = source
        self._tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


def train(config: TrainConfig, *, console: bool = True) -> TrainResult:
    """Run a fine-tuning from start to end; on any failure the directory's summary says why.

    Raises children of `EngineError` for what the user can mend, and `Interrupted` (an exit status)
    when a signal stopped the run after a checkpoint.
    """
    require_trackers(config.report_to)
    resolve_dtype(config.dtype, resolve_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    with RunDirectory(config, console=console) as directory, ExitStack() as stack:
        prepared = prepare(directory.config)
        log.info("%s", prepared.report.describe())
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
        }
        if before:
            figures["heldout_perplexity_before"] = before.perplexity
        if prepared.heldout:
            after = run.evaluate()
            figures["heldout_perplexity"] = after.perplexity
            figures["heldout_loss"] = after.loss
            log.info("held-out perplexity after training: %.3f", after.perplexity)
        output = run.write_output()
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
    from engine.config_sources import dump_yaml

    require_trackers(config.report_to)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    prepared = prepare(config)
    check_init_adapter(config, prepared.checkpoint.digest())
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
