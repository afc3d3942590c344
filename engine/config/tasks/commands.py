"""Commands for the next step, with real paths, to be pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.settings import is_repeated
from engine.config.tasks.inference import EvalSettings
from engine.config.train_config import TrainConfig


def command(verb: str, options: Mapping[str, Any]) -> str:
    """`engine VERB --option value ...`, quoted for a shell; options without a value are left out.

    A list gives its option once for each item, True the bare option and False `--no-option`.
    """
    words = ["engine", verb]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None and item != {}:
                text = json.dumps(item) if isinstance(item, dict) else str(item)
                words += [flag, text]
    return shlex.join(words)


def command_of(verb: str, directory: Path) -> str:
    """`engine VERB DIRECTORY`, quoted for a shell."""
    return shlex.join(["engine", verb, str(directory)])


def train_command(config: TrainConfig, **changes: Any) -> str:
    """The `engine train` of these settings, with `changes`; defaults are left out."""
    options: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if value == field.default and not field.is_required():
            continue
        if isinstance(value, tuple) and not is_repeated(field):
            value = ",".join(map(str, value))
        elif name == "map":
            value = _columns(config)
        options[name] = value
    return command("train", options | changes)


def continued(config: TrainConfig, run: Path, steps: int | None = None) -> str:
    """The command that trains on from a run's result, in a new directory, for so many steps."""
    result = run / ("model" if config.every_weight else "adapter")
    target = run.with_name(f"{run.name}-2")
    if config.every_weight:
        asked: dict[str, Any] = {"model": result}
    else:
        asked = {"model": config.model, "init_adapter": result}
    asked = {"config": run / "config.yaml"} | asked
    return command(
        "train", asked | {"output_dir": target, "run_id": target.name, "max_steps": steps}
    )


def repeat_heldout(config: TrainConfig, output: Path) -> str | None:
    """The `engine eval` that gives the run's held-out figure again; None without such rows.

    None too where these are preferences, which only the run itself judges.
    """
    if config.learns_answers or not (config.eval_data or config.heldout):
        return None
    split = not config.eval_data
    options: dict[str, Any] = {
        **_model(config, output),
        "quantize": "nf4" if config.method == "qlora" else None,
        "data": config.data if split else config.eval_data,
        "max_length": config.max_length,
        **_rows(config, config.query if split else config.eval_query),
        "heldout": config.heldout if split else None,
        "seed": config.seed if split else None,
        "min_rating": config.min_rating if split else None,
        "category": config.category if split else None,
        "limit_rows": config.limit_rows if split else None,
        "system_prompt": config.system_prompt,
        "chat_template_kwargs": config.chat_template_kwargs,
        "template_date": config.template_date,
        "double_quant": config.double_quant,
        "head_precision": config.head_precision,
        "loss_chunk_tokens": config.loss_chunk_tokens,
        "mlp_tile_tokens": config.mlp_tile_tokens,
        "dtype": config.dtype,
        "device": config.device,
    }
    return command("eval", _told(options))


def next_steps(config: TrainConfig, output: Path) -> list[str]:
    """What one does after a run: evaluate, ask, and merge an adapter."""
    evaluated = repeat_heldout(config, output)
    if evaluated is None and not config.learns_answers:
        rows = {"data": config.data, **_rows(config, config.query)}
        evaluated = command("eval", _model(config, output) | _told(rows))
    asked = command("generate", _model(config, output) | {"prompt": "Hello!"})
    steps = [asked] if evaluated is None else [evaluated, asked]
    if not config.every_weight:
        merged = output.with_name("merged")
        steps.append(command("merge", _model(config, output) | {"output": merged}))
    return steps


def _rows(config: TrainConfig, query: str | None) -> dict[str, Any]:
    """How rows are read and what of them is trained, as the run had it."""
    return {
        "query": query,
        "map": _columns(config) or None,
        "bad_lines": config.bad_lines,
        "max_row_bytes": config.max_row_bytes,
        "train_on": config.train_on,
        "thinking": config.thinking,
    }


def _columns(config: TrainConfig) -> str:
    return ",".join(f"{name}={column}" for name, column in config.map.items())


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not what `engine eval` does without them."""
    defaults = {name: field.default for name, field in EvalSettings.model_fields.items()}
    return {k: v for k, v in options.items() if v != defaults.get(k)}


def _model(config: TrainConfig, output: Path) -> dict[str, Any]:
    if config.every_weight:
        return {"model": output}
    return {"model": config.model, "adapter": output}
