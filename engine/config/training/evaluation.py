"""Settings about evaluations while training: best checkpoint, early stopping, sampled answers."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.config.numbers import is_count
from engine.config.settings import Settings, setting
from engine.config.spelling import none_is_unset

EVAL = "eval_"
"""What the names of all figures of an evaluation begin with."""
LOSS = f"{EVAL}loss"
_METRIC = r"[\w./:+@-]+"
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|seconds|bytes|(^|_)(kl|nll|error)")


def metric_name(value: Any) -> Any:
    """The name of a figure as metrics.jsonl has it: `loss` is `eval_loss`."""
    if value is True or str(value).lower() == "true":
        return LOSS
    value = None if value is False or str(value).lower() == "false" else none_is_unset(value)
    if not isinstance(value, str):
        return value
    name = value.strip()
    if not re.fullmatch(_METRIC, name):
        raise ValueError("should be the name of a figure of an evaluation, such as eval_loss")
    return name if name.startswith(EVAL) else EVAL + name


def metric_is_greatest(name: str) -> bool:
    """Whether the greatest value of a figure is the best, by its name."""
    return _LOWER_IS_BETTER.search(name.partition("/")[0].removeprefix(EVAL)) is None


def patience(value: Any) -> Any:
    """`"3"` and `"3,0.01"` as (3, 0.0) and (3, 0.01)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    value = none_is_unset(value)
    if value is None or not isinstance(value, str):
        return value
    count, _, delta = value.partition(",")
    try:
        least = float(delta or 0.0)
        if not is_count(count.strip()) or int(count) < 1 or not 0 <= least < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(
            "should be a number of evaluations and the least improvement that counts, such as 3 or "
            "3,0.01"
        ) from None
    return int(count), least


class EvaluationSettings(Settings):
    """What a run evaluates while it trains, and what becomes of the figures."""

    eval_every: int = setting(
        0,
        "Evaluation",
        "steps between evaluations of the held-out rows; 0 for start and end",
        ge=0,
    )
    eval_at_start: bool = setting(
        True, "Evaluation", "evaluate the held-out rows before the first step too"
    )
    eval_ema: bool = setting(
        False,
        "Evaluation",
        "evaluations and sampled answers while training are of the averaged weights (--ema-decay)",
    )
    save_best: Annotated[str | None, BeforeValidator(metric_name)] = setting(
        None,
        "Evaluation",
        "keep the checkpoint with the best value of this figure beside the newest ones: eval_loss, "
        "eval_loss/category/NAME, or another that an evaluation has",
    )
    greater_is_better: bool | None = setting(
        None,
        "Evaluation",
        "whether the greatest value of that figure is the best; by default its name says so: a "
        "loss, a perplexity and an error are to be low",
    )
    early_stopping: Annotated[tuple[int, float] | None, BeforeValidator(patience)] = setting(
        None,
        "Evaluation",
        "end after so many evaluations without improvement, and the least change that counts as "
        "one: 3 or 3,0.01; by the figure of --save-best, else eval_loss",
    )
    load_best_at_end: bool = setting(
        False, "Evaluation", "the result has the weights of the best evaluation, not the last"
    )
    sample_every: int = setting(
        0,
        "Evaluation",
        "steps between answers to the prompts of --sample-prompts; they are answered at the start "
        "and at the end too, into samples.jsonl",
        ge=0,
    )
    sample_prompts: Path | None = setting(
        None,
        "Evaluation",
        "JSON Lines of prompts to answer: texts, or objects with `prompt` or `messages`",
    )
    sample_max_new_tokens: int = setting(
        128, "Evaluation", "longest such answer in tokens", ge=1, le=65_536
    )
    sample_temperature: float | None = setting(
        None,
        "Evaluation",
        "0 takes the likeliest token; by default as generation_config.json says. Every prompt has "
        "a seed of its own, the same at every step",
        ge=0,
        le=100,
    )

    @property
    def best_metric(self) -> str | None:
        """The figure that best checkpoint and early stopping go by; None without either."""
        asked = self.early_stopping is not None or self.load_best_at_end
        return self.save_best or (LOSS if asked else None)

    @property
    def best_is_greatest(self) -> bool:
        """Whether a greater value of that figure is a better one."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return metric_is_greatest(self.best_metric or LOSS)
