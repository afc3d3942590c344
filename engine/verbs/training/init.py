"""`engine init`: a commented configuration for a model, rows and a machine."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.config.tasks.workflow import InitSettings
from engine.config.train_config import TrainConfig
from engine.data.dataset import RowChoice, read_chosen
from engine.data.examples import ExampleSettings, build_examples
from engine.data.preferences import pair_examples
from engine.data.rows import Row
from engine.errors import DataError, EngineError, gib
from engine.memory.run_planner import USABLE, usable_memory
from engine.memory.search import changed, choose
from engine.model_sources.open import open_model_source
from engine.storage.home import expanded
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.training.plan import PlanReport, find_target

_ROWS_PER_STEP = 16
_FEW_ROWS, _FEW_HELDOUT = 2000, 20
_CHARACTERS_PER_TOKEN = 3.5
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """Tokens of every row, sorted; `counted` is False where only characters were known."""

    tokens: list[int]
    counted: bool

    def at(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        return self.tokens[min(len(self.tokens) - 1, math.ceil(share * len(self.tokens)) - 1)]


@dataclass(frozen=True)
class Proposal:
    """Settings, the reason of each that was chosen, and the plan of the run they make."""

    config: TrainConfig
    reasons: dict[str, str]
    report: PlanReport
    steps: int

    def text(self, file: Path) -> str:
        """The configuration as YAML with a comment over every setting."""
        seconds = self.steps * self.report.seconds
        lines = [
            f"# engine train --config {file}",
            f"# Planned: {gib(self.report.plan.total)}, {self.steps:,} steps, about "
            f"{_duration(seconds)} at best. Delete what you do not need: defaults stay.",
        ]
        for name in _ORDER:
            value, default = getattr(self.config, name), TrainConfig.model_fields[name].default
            if value == default and name not in self.reasons:
                continue
            reason = self.reasons.get(name)
            comment = str(TrainConfig.model_fields[name].description)
            comment = f"{comment}. {reason}" if reason else comment
            lines += ["", *textwrap.wrap(comment, 96, initial_indent="# ", subsequent_indent="# ")]
            lines.append(f"{name}: {_value(value)}")
        return "\n".join(lines) + "\n"


_ORDER = (
    "model", "data", "query", "map", "eval_data", "heldout", "bad_lines", "output_dir",
    "objective", "method",
    "lora_rank", "lora_alpha", "target_modules", "learning_rate", "epochs", "max_length", "packing",
    "batch_size", "accumulate", "gradient_checkpointing", "mlp_tile_tokens", "low_memory_decode",
    "loss_chunk_tokens", "head_precision", "embedding_on", "offload", "optimizer_in_backward",
    "memory_budget", "device", "checkpoint_every", "eval_every", "seed",
)  # fmt: skip


def propose(settings: InitSettings) -> Proposal:
    """The settings for a model and rows on a machine, planned to fit it.

    Raises `ConfigError` for a model that is not there, `DataError` for rows that cannot be read,
    and `MemoryPlanError` where nothing fits the memory.
    """
    choice = RowChoice(bad_lines="skip", query=settings.query, columns=settings.map)
    rows, read = read_chosen(settings.data, choice)
    memory, on_gpu, where = _memory(settings)
    pairs = bool(rows) and all(row.is_pair for row in rows)
    lengths = _lengths(settings.model, rows, pairs)
    reasons: dict[str, str] = {}
    given: dict[str, Any] = {
        "model": settings.model,
        "data": settings.data,
        "output_dir": settings.output_dir,
        "method": settings.method,
        "query": settings.query,
        "map": settings.map,
        "device": "cuda" if on_gpu and settings.memory is not None else "auto",
    }
    if pairs:
        given["objective"] = "dpo"
        reasons["objective"] = "The rows are pairs of a chosen and a rejected answer"
    if read.skipped:
        given["bad_lines"] = "skip"
        reasons["bad_lines"] = f"{len(read.skipped)} of {read.read} rows cannot be used"
    if len(rows) >= 3 * _FEW_HELDOUT:
        share = 0.1 if len(rows) < _FEW_ROWS else 0.02
        given["heldout"] = share
        reasons["heldout"] = f"{round(share * len(rows))} of {len(rows):,} rows"
    given["epochs"] = 3 if len(rows) < _FEW_ROWS else 1
    reasons["epochs"] = f"{len(rows):,} rows are {'few' if len(rows) < _FEW_ROWS else 'many'}"
    given["max_length"], reasons["max_length"] = _row_length(lengths)
    batch = max(1, min(_ROWS_PER_STEP, len(rows) // 8))
    given["batch_size"] = min(4, batch)
    given["accumulate"] = max(1, batch // given["batch_size"])
    config = TrainConfig(**given)
    if settings.method == "full":
        config = changed(config, learning_rate=2e-5)
        reasons["learning_rate"] = "every weight moves, so by little"
    elif pairs:
        config = changed(config, learning_rate=2e-5)
        reasons["learning_rate"] = "Preferences move a model by little"
    report, config = _fit(config, memory, where, reasons)
    trained = len(rows) - round(config.heldout * len(rows))
    per_step = config.batch_size * config.accumulate
    reasons["batch_size"] = f"A step has {per_step} rows: batch_size x accumulate"
    steps = config.epochs * math.ceil(trained / per_step)
    config = changed(config, checkpoint_every=max(10, min(100, steps // 4)))
    for name in ("model", "data", "output_dir", "method", "accumulate"):
        reasons.setdefault(name, "")
    return Proposal(config, reasons, report, steps)


def _memory(settings: InitSettings) -> tuple[int | None, bool, str]:
    """The bytes to plan with, whether they are a GPU's, and whose."""
    if settings.memory is not None:
        return int(USABLE * settings.memory), True, f"a GPU of {gib(settings.memory)}"
    if torch.cuda.is_available():
        return usable_memory(gpu=True), True, f"this machine's {torch.cuda.get_device_name(0)}"
    return None, False, "this machine's CPU"


def _fit(
    config: TrainConfig, memory: int | None, where: str, reasons: dict[str, str]
) -> tuple[PlanReport, TrainConfig]:
    """The plan on the machine, with what had to change for its memory."""
    target = find_target(config)
    if memory is None:
        planned, choice = target.plan(config), None
    else:
        choice = choose(config, memory, target.plan)
        planned = choice.plan
        config = changed(planned.config, memory_budget=None)
        for name in choice.changes:
            reasons[name] = f"Chosen for {where}"
    return PlanReport(target, planned, None, target.rate(), 0.0), config


def _lengths(model: str, rows: Sequence[Row], pairs: bool) -> Lengths:
    """Tokens of the rows by the model's own tokenizer, where it is at hand.

    Of `pairs` it is the longer of both sequences that counts.
    """
    if expanded(model).exists():
        try:
            tokenizer = load_tokenizer(open_model_source(model))
            if pairs:
                both, _ = pair_examples(rows, tokenizer, ExampleSettings(_LONGEST, bad_rows="skip"))
                longer = [max(pair.split, len(pair) - pair.split) for pair in both]
                return Lengths(sorted(longer), counted=True)
            examples, _ = build_examples(rows, tokenizer, _LONGEST, bad_rows="skip")
            return Lengths(sorted(len(example) for example in examples), counted=True)
        except DataError:
            raise
        except EngineError:
            pass  # a folder with a config.json alone: planned for, and its rows are estimated
    characters = (sum(len(str(message)) for message in row.messages) for row in rows)
    return Lengths(sorted(1 + int(n / _CHARACTERS_PER_TOKEN) for n in characters), counted=False)


def _row_length(lengths: Lengths) -> tuple[int, str]:
    """`max_length`: the longest row, or where few rows are far longer than all others, theirs."""
    longest, most = lengths.tokens[-1], lengths.at(0.99)
    chosen = longest if longest <= 2 * most else most
    chosen = max(64, 64 * math.ceil(chosen / 64))
    cut = sum(length > chosen for length in lengths.tokens)
    reason = f"The longest row has {longest:,} tokens, half have up to {lengths.at(0.5):,}"
    reason += "" if lengths.counted else ", as far as their characters tell"
    return chosen, reason + (f"; {cut} are cut" if cut else "")


def _value(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = value[0] if len(value) == 1 else list(value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(yaml.safe_dump(value, default_flow_style=True, width=1 << 16))
    return text.strip().removesuffix("...").strip()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
