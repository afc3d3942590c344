"""Evaluate a saved model: perplexity, sample answers, size and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.dataset import load_rows
from engine.data.examples import build_examples, check_ids
from engine.device import resolve_device, resolve_dtype
from engine.forging.task_score import TaskScore
from engine.forging.verdict import perplexity_interval
from engine.inference.generation import complete, prompt_ids, stop_ids_of
from engine.inference.perplexity import evaluate_rows
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.pruning.keep_pruned import pruned_heads
from engine.pruning.structures.prune_structures import elements
from engine.tokenization.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Judge:
    """The same questions to every model: held-out rows and prompts.

    `prompts` are answered greedily with at most `max_new_tokens`: an answer drawn at random says
    more of the draw than of the model. With a `task` the held-out rows are answered too.
    """

    heldout: Path
    prompts: Sequence[str]
    max_length: int
    device: str
    dtype: str
    max_new_tokens: int = 48
    task: TaskScore | None = None

    def assess(self, model: str | Path) -> dict[str, Any]:
        """Perplexity over trained tokens, samples, speed, and size of the model in a directory."""
        where = resolve_device(self.device)
        source = open_model_source(model)
        tokenizer = load_tokenizer(source)
        examples, _ = build_examples(load_rows(self.heldout), tokenizer, self.max_length)
        check_ids(examples, source.config.vocab_size)
        decoder = build_model(source, device=where, dtype=resolve_dtype(self.dtype, where))
        result, rows = evaluate_rows(decoder, examples)
        answers = [
            complete(
                decoder,
                tokenizer,
                prompt_ids(tokenizer, prompt),
                max_new_tokens=self.max_new_tokens,
                stop_ids=stop_ids_of(source, tokenizer),
            )
            for prompt in self.prompts
        ]
        scored = {}
        if self.task is not None:
            stops = stop_ids_of(source, tokenizer)
            scored["task"] = self.task.measured(decoder, tokenizer, stops, result.perplexity)
        speeds = sorted(answer.tokens_per_second for answer in answers)
        return scored | {
            "model": str(model),
            "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
            "loss": result.loss,
            "tokens": result.tokens,
            "interval": list(perplexity_interval(rows)),
            "row_losses": [list(row) for row in rows],
            "parameters": elements(source),
            "pruned_heads": pruned_heads(source.path),
            "bytes": size_on_disk(Path(model)),
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "samples": [
                {"prompt": prompt, "text": answer.text}
                for prompt, answer in zip(self.prompts, answers, strict=True)
            ],
        }


def size_on_disk(model: Path) -> int | None:
    """Bytes of the files of a model; None for a hub id."""
    if model.is_file():
        return model.stat().st_size
    if not model.is_dir():
        return None
    return sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
