"""`engine train`: every setting of `TrainConfig` as a flag, a file, overrides, then the run.

The flags, their help and their defaults are made from `TrainConfig`, so the three cannot disagree.
"""

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.config.presets import SUMMARIES
from engine.config.sources import load_config
from engine.config.train_config import TrainConfig, group_of
from engine.errors import ConfigError
from engine.runs.startup import importing

# The run directory's own log shows its lines on the console.
OPENS_LOG = True

app = typer.Typer(add_completion=False)

_REPEATED = frozenset({"data", "eval_data"})
_FILES = (".yaml", ".yml", ".json")


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml KEY=VALUE",
            help="A configuration file, then settings that win over everything else.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Starting point, under the file and the flags. "
            + "; ".join(f"{name}: {text}" for name, text in SUMMARIES.items())
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved run and the first rows, then end.")
    ] = False,
    **flags: Any,
) -> int:
    """Fine-tune a model: NF4 base with LoRA (qlora), 16-bit base with LoRA (lora), or every weight.

    Settings come from --preset, then the file, then flags, then KEY=VALUE words; the last wins.
    """
    file, overrides = _sort_words(words or [], config)
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    settings = load_config(file, preset=preset, flags=given, overrides=overrides)
    with importing():
        from engine import finetune

    if dry_run:
        print(finetune.dry_run(settings))
        return 0
    result = finetune.train(settings)
    if result.adapter_path is not None:
        print(f"Trained adapter saved to: {result.adapter_path}")
    return 0 if result.status == "Success" else 1


def _sort_words(words: list[str], config: Path | None) -> tuple[Path | None, list[str]]:
    """Tell the configuration file from the overrides. Raises `ConfigError`."""
    overrides: list[str] = []
    for word in words:
        if "=" in word:
            overrides.append(word)
        elif config is None and word.endswith(_FILES):
            config = Path(word)
        else:
            raise ConfigError(
                f"{word!r} is neither a configuration file ({', '.join(_FILES)}; there can be one) "
                "nor of the form KEY=VALUE. Options begin with --."
            )
    return config, overrides


def _with_settings(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with a keyword parameter per setting, which is what typer makes options of."""
    own = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(name, field),
        )
        for name, field in TrainConfig.model_fields.items()
    ]
    signature = inspect.Signature([*own, *settings], return_annotation=int)

    def with_settings(*args: Any, **kwargs: Any) -> int:
        return command(*args, **kwargs)

    with_settings.__signature__ = signature  # type: ignore[attr-defined]
    with_settings.__annotations__ = {p.name: p.annotation for p in [*own, *settings]}
    with_settings.__doc__ = command.__doc__
    return with_settings


def _annotation(name: str, field: FieldInfo) -> Any:
    """The annotated type that typer reads an option's form and help from."""
    flag = "--" + name.replace("_", "-")
    kind = bool if field.annotation is bool else list[str] if name in _REPEATED else str
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    option = typer.Option(
        flag,
        help=_help(field),
        rich_help_panel=group_of(name),
        show_default=False,
        metavar=None if kind is bool else _metavar(field.annotation),
    )
    return Annotated[kind | None, option]


def _help(field: FieldInfo) -> str:
    text, default = str(field.description), field.default
    if default is PydanticUndefined:
        return f"{text} (required)"
    if isinstance(default, bool):
        return f"{text} (default: {'yes' if default else 'no'})"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} (default: {default})" if default not in (None, "") else text


def _metavar(annotation: Any) -> str:
    """How an option's value is written in the help: a choice, or a word for its type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _metavar(get_args(annotation)[0])
    if str(annotation).startswith("typing.Literal"):
        return "[" + "|".join(map(str, get_args(annotation))) + "]"
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return names.get(annotation, "TEXT")


app.command(name="train")(_with_settings(train))
