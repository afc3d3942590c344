"""Read the stages of a pipeline from its file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.explain import nearest
from engine.config.sources import output_in, read_mapping
from engine.errors import ConfigError, listing
from engine.storage.home import expanded

VERBS = (
    "train", "plan", "eval", "generate", "merge", "quantize", "prune", "forge",
    "export gguf", "export adapter", "bench",
    *(f"data {tool}" for tool in ("validate", "stats", "convert", "split", "dedup", "decontaminate",
      "mix", "pairs", "extract", "docstrings", "synth", "tokenizer")),
)  # fmt: skip
"""Verbs that a stage may run: those that end by themselves."""

OUTPUTS = ("output_dir", "output", "quarantine", "report", "removed")
"""Settings that name what a verb writes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = {"name", "run", "with"}
_TOP = {"output_dir", "variables", "stages"}
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Stage:
    """One verb with its settings."""

    name: str
    verb: str
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """A digest of verb and settings."""
        text = json.dumps([self.verb, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def outputs(self) -> list[Path]:
        """The paths that the settings say will be written."""
        return [expanded(str(self.settings[key])) for key in OUTPUTS if self.settings.get(key)]

    def files(self) -> list[Path]:
        """Regular files that the settings name, read or written; folders are not looked into."""
        named = map(expanded, _texts(self.settings))
        return [path for path in named if os.path.isfile(path)]  # noqa: PTH113 - Path's may raise


def _texts(value: Any) -> Iterator[str]:
    """The texts of a setting, whatever it is made of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


@dataclass(frozen=True)
class Recipe:
    """The stages of a pipeline, in their order, and the directory that belongs to it."""

    output_dir: Path
    stages: tuple[Stage, ...]


def read_recipe(path: Path, output_dir: Path | None = None, given: Sequence[str] = ()) -> Recipe:
    """The pipeline that a YAML file describes.

    `${out}` in a setting is the pipeline's directory: `output_dir`, else the file's own
    `output_dir`, else `runs/` with the file's name. `${name}` is one of the file's `variables`,
    whose value may be `given` anew as name=value. Raises `ConfigError` naming the stage.
    """
    content = read_mapping(path)
    unknown = sorted(set(content) - _TOP)
    if unknown:
        raise ConfigError(
            f"{path}: a pipeline has `output_dir`, `variables` and `stages`; there is also "
            f"{listing(unknown)}."
        )
    directory = output_dir or output_in(path, content)
    listed = content.get("stages")
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"{path}: `stages` is to be a list, each with a `name`, the verb to `run`, and its "
            "settings under `with`."
        )
    variables = _variables(content.get("variables") or {}, given, path) | {"out": str(directory)}
    stages = [_stage(item, f"{path}: stage {n}", variables) for n, item in enumerate(listed, 1)]
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: two stages are named {listing(twice)}; name each differently.")
    return Recipe(directory, tuple(stages))


def _variables(written: Any, given: Sequence[str], path: Path) -> dict[str, str]:
    """The values of the file's variables, those that were given anew in place of its own."""
    if not isinstance(written, Mapping):
        raise ConfigError(f"{path}: `variables` is to be a mapping of names and values.")
    values = {str(name): str(value) for name, value in written.items()}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in values:
            raise ConfigError(
                f"--set {text!r} does not give a variable of {path} a value; write --set "
                f"name=value with one of: {', '.join(values) or 'none, it has no variables'}."
            )
        values[name] = value
    return values


def _stage(item: Any, where: str, variables: Mapping[str, str]) -> Stage:
    if not isinstance(item, Mapping) or not isinstance(item.get("run"), str):
        raise ConfigError(
            f"{where} is to be a mapping with `run`, a verb such as train or `data mix`, and its "
            "settings under `with`."
        )
    unknown = sorted(set(map(str, item)) - _KEYS)
    if unknown:
        raise ConfigError(
            f"{where} has {listing(unknown)} beside `name`, `run` and `with`; settings of the "
            "verb stand under `with`."
        )
    verb = " ".join(item["run"].removeprefix("engine ").split())
    if verb not in VERBS:
        near = nearest(verb, dict.fromkeys(VERBS))
        meant = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{where} runs {verb!r}, which is no verb that a pipeline runs.{meant} These are: "
            f"{', '.join(VERBS)}."
        )
    name = str(item.get("name", verb.replace(" ", "-")))
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where} is named {name!r}; a name has letters, digits, dots, hyphens and underscores."
        )
    settings = item.get("with") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} ({name}): `with` is to be a mapping of the verb's settings.")
    try:
        return Stage(name, verb, {str(k): _filled(v, variables) for k, v in settings.items()})
    except KeyError as error:
        raise ConfigError(
            f"{where} ({name}) uses ${{{error.args[0]}}}, and there is no such variable; known: "
            f"{', '.join(variables)}."
        ) from None


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with variables replaced, in texts within it as well; an unknown one is a KeyError.

    Names of settings within it are texts, as they are on the command line.
    """
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: variables[match[1]], value)
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _filled(item, variables) for key, item in value.items()}
    return value
