"""Another program's configuration as a file of ours: engine import-config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from engine.config.data_names.passwords import hidden, scrub
from engine.config.explain import Setting
from engine.config.programs.detect import translate
from engine.config.programs.translation import Translation
from engine.config.sources import build, read_mapping
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, printable

_LONGEST = 400


def import_config(file: str | Path, program: str | None = None) -> Translation:
    """The settings that another program's configuration asks for, and what it asks in vain.

    Raises `ConfigError` for a file that is no YAML mapping, or of no program that is known.
    """
    path = Path(file)
    given = read_mapping(path)
    if any(isinstance(part, dict) and "_component_" in part for part in given.values()):
        raise ConfigError(
            f"{path} is a configuration of torchtune, whose keys name Python classes. "
            "docs/coming_from.md has its settings beside ours."
        )
    return translate(plain(given), path.parent, program)


def plain(value: Any) -> Any:
    """`value` with what JSON has no form for (bytes, dates, sets, infinity) as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str | None) or (
        isinstance(value, float) and math.isfinite(value)
    ):
        return value
    return str(value)


def as_yaml(translation: Translation, file: str | Path) -> str:
    """A file for `engine train --config`: settings with their origin, then what is missing."""
    lines = [
        f"# Translated from {_in_a_line(str(file))}, a configuration of {translation.program}."
    ]
    for name in TrainConfig.model_fields:
        if name in translation.settings:
            entry = translation.settings[name]
            lines.append(f"{_yaml(name, hidden(entry.value))}  # {scrub(entry.origin)}")
    absent = [name for name in ("model", "data") if name not in translation.settings]
    lines += [
        f"# {name}: must be given, and {_in_a_line(str(file))} does not say it" for name in absent
    ]
    return "\n".join(lines + [f"# {line}".rstrip() for line in notes(translation)]) + "\n"


def notes(translation: Translation) -> list[str]:
    """What somebody should know who compares both files, a line each."""
    missing = [f"  {key}: {why}" for key, why in translation.missing.items()]
    needless = [f"  {key}: {why}" for key, why in translation.needless.items()]
    lines = ["", "Without a counterpart:", *missing] if missing else []
    lines += ["", "Needs nothing here:", *needless] if needless else []
    return [_in_a_line(scrub(line)) for line in lines]


def _in_a_line(text: str) -> str:
    """`text` as a comment that ends where its line does, whatever the names in it hold."""
    return printable(text, _LONGEST).replace("\n", "\\n")


def refusal(translation: Translation) -> str | None:
    """Why `engine train` would not take these settings, if it would not."""
    given = {name: Setting(made.value, made.origin) for name, made in translation.settings.items()}
    try:
        build(TrainConfig, given)
    except ConfigError as error:
        return str(error)
    return None


def _yaml(name: str, value: Any) -> str:
    text = str(yaml.safe_dump(value, default_flow_style=True, width=1 << 16))
    return f"{name}: {text.strip().removesuffix('...').strip()}"
