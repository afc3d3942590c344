"""Make the command line of a verb from its tables of settings.

Flags, help, defaults, `--config FILE` and `KEY=VALUE` words are the same for every verb.
"""

import inspect
import json
import shlex
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.core import TyperCommand

from engine.config.data_names.passwords import hide_in_words
from engine.config.explain import Setting
from engine.config.settings import Settings, group_of, is_repeated
from engine.config.sources import Vocabulary, build, gather
from engine.config.training.presets import SUMMARIES
from engine.errors import ConfigError
from engine.storage.home import expanded
from engine.storage.standing import refuse_sources

S = TypeVar("S", bound=Settings)
_FILES = (".yaml", ".yml", ".json")
_OUTPUTS = ("output", "report", "removed", "quarantine", "plot")
"""Settings that name a file which a verb writes."""


@dataclass(frozen=True)
class Call:
    """What the user asked of a verb."""

    given: dict[str, Setting]
    as_json: bool

    def read(self, table: type[S]) -> S:
        """One of the verb's tables, filled in. Raises `ConfigError`."""
        return build(table, self.given)

    def without(self, name: str) -> "Call":
        """The same without a setting, which another of the verb's tables reads in its own way."""
        return replace(self, given={k: v for k, v in self.given.items() if k != name})

    def print_json(self, value: Any) -> bool:
        """Print `value` if one JSON object was asked for; whether it was."""
        if self.as_json:
            print(json.dumps(value))
        return self.as_json


@dataclass(frozen=True)
class Verb:
    """A verb: its tables, and how its words and common options are read.

    `also` are tables whose flags the help leaves out. `words` is the setting that plain words
    belong to; without one a word may name the configuration file. `optional` are settings that
    something else says where they are not given.
    """

    name: str
    tables: tuple[type[Settings], ...] = ()
    also: tuple[type[Settings], ...] = ()
    words: str | None = None
    presets: bool = False
    json: bool = True
    defaults: tuple[tuple[str, Any], ...] = ()
    optional: tuple[str, ...] = ()

    def flags(self) -> dict[str, FieldInfo]:
        """The settings that have a flag, by name."""
        fields = dict(Vocabulary.of(self.name, *self.tables).fields)
        changed = {
            name: FieldInfo.merge_field_infos(fields[name], default=None) for name in self.optional
        }
        return fields | changed

    def read(self, typed: dict[str, Any]) -> Call:
        """Everything that was given, from what was typed. Raises `ConfigError`."""
        config, plain, overrides = typed.pop("config"), list[str](), list[str]()
        known = Vocabulary.of(self.name, *self.tables, *self.also)
        for word in hide_in_words(typed.pop("words") or []):
            if "=" in word and not (self.words and _is_path(word, known)):
                overrides.append(word)
            elif self.words:
                plain.append(word)
            elif config is None and word.endswith(_FILES):
                config = Path(word)
            else:
                raise ConfigError(
                    f"{word!r} is neither a configuration file ({', '.join(_FILES)}; there can be "
                    f"one) nor of the form KEY=VALUE. {_meant(word, known)}"
                )
        preset, as_json = typed.pop("preset", None), typed.pop("as_json", False)
        flags = {key: value for key, value in typed.items() if value not in (None, [], ())}
        if self.words and plain:
            several = is_repeated(known.fields[self.words])
            given_words = [*plain, *flags.get(self.words, [])] if several else plain
            if not several and len(plain) > 1:
                raise ConfigError(
                    f"engine {self.name} takes one {self.words}, and {len(plain)} were named: "
                    f"{', '.join(plain)}. Name one of them; a name with spaces needs quotes."
                )
            flags[self.words] = given_words if several else plain[0]
        given = gather(known, config, preset=preset, flags=flags, overrides=overrides)
        if config is not None:
            outputs = [given[name].value for name in _OUTPUTS if name in given]
            refuse_sources([expanded(str(path)) for path in outputs if path], [config])
        for name, value in self.defaults:
            given.setdefault(name, Setting(value, "default"))
        return Call(given, as_json)


def _meant(word: str, known: Vocabulary) -> str:
    """What a bare word was probably meant as."""
    path, flag = Path(word), ""
    if path.is_dir() or word.endswith(".gguf") or (word.count("/") == 1 and not path.exists()):
        flag = "model"
    elif path.is_file():
        flag = "data"
    elif "prompt" in known.fields:
        flag = "prompt"
    if flag not in known.fields:
        return "Options begin with --."
    return f"Did you mean --{flag} {shlex.quote(word)}?"


def _is_path(word: str, known: Vocabulary) -> bool:
    """Whether a word with an equals sign is a path, which may be missing, and no setting."""
    key = word.partition("=")[0]
    plain = key.replace("-", "_").replace(".", "_").lower()
    return (
        Path(word).exists() or "/" in key or (plain not in known.fields and "." in Path(word).name)
    )


Run = Callable[[Call], int | None]


def make_app(*commands: tuple[Verb, Run]) -> typer.Typer:
    """An application with these commands; the docstrings of their functions are the help texts."""
    app = typer.Typer(
        add_completion=False, no_args_is_help=len(commands) > 1, rich_markup_mode=None
    )
    for verb, run in commands:
        summary = (inspect.getdoc(run) or "").partition("\n")[0]
        command = app.command(verb.name.split()[-1], cls=_PlainHelp, short_help=summary)
        command(_command(verb, run))
    return app


class _PlainHelp(TyperCommand):
    """Help as plain text under headings, where every option's name is whole at any width."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by their headings; a long name has a line to itself."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=26)


def _command(verb: Verb, run: Run) -> Callable[..., int | None]:
    """`run` as a function with a parameter per option, which is what typer reads."""
    parameters = _parameters(verb)

    def command(**typed: Any) -> int | None:
        return run(verb.read(typed))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = run.__doc__
    return command


def _parameters(verb: Verb) -> list[inspect.Parameter]:
    """What typer makes options of: words, file, preset, JSON, and a flag per setting."""
    metavar, text = "CONFIG.yaml KEY=VALUE", "A configuration file, then settings that win."
    if verb.words is not None:
        field = Vocabulary.of(verb.name, *verb.tables).fields[verb.words]
        metavar, text = f"{verb.words.upper()} KEY=VALUE", f"{field.description}; then settings."
    common = {
        "words": Annotated[list[str] | None, typer.Argument(metavar=metavar, help=text)],
        "config": Annotated[
            Path | None, typer.Option(metavar="PATH", help="Configuration file (YAML).")
        ],
    }
    if verb.presets:
        summaries = "; ".join(f"{name}: {text}" for name, text in SUMMARIES.items())
        text = f"Starting point, under the file and the flags. {summaries}"
        common["preset"] = Annotated[str | None, typer.Option(metavar="NAME", help=text)]
    if verb.json:
        text = "Print one JSON object instead."
        common["as_json"] = Annotated[bool, typer.Option("--json", help=text)]
    known = Vocabulary.of(verb.name, *verb.tables)
    fields = verb.flags()
    must = {group_of(field) for field in fields.values() if field.is_required()}
    groups = {name: group_of(field) for name, field in fields.items()}
    # A table's own settings are what it is about; those that it shares with others come after them.
    own = {name for table in verb.tables for name in table.__annotations__}

    def rank(name: str) -> tuple[bool, bool, bool, bool]:
        group = groups[name]
        return group not in must, group == "Hub", name != "model", name not in own

    ordered = [(name, fields[name]) for name in sorted(fields, key=rank)]
    flags = {name: _annotation(name, field) for name, field in ordered}
    flags |= {
        earlier: _annotation(earlier, known.fields[name], hidden=True)
        for earlier, name in known.renamed.items()
        if name in known.fields
    }
    others = Vocabulary.of(verb.name, *verb.also).fields
    flags |= {
        name: _annotation(name, field, hidden=True)
        for name, field in others.items()
        if name not in flags
    }
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "as_json" else None,
            annotation=annotation,
        )
        for name, annotation in {**common, **flags}.items()
    ]


def _annotation(name: str, field: FieldInfo, hidden: bool = False) -> Any:
    """The annotated type that typer reads an option's form and help from."""
    flag = "--" + name.replace("_", "-")
    kind = bool if field.annotation is bool else list[str] if is_repeated(field) else str
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    option = typer.Option(
        flag,
        help=_help(field),
        rich_help_panel=group_of(field),
        show_default=False,
        hidden=hidden,
        metavar=None if kind is bool else _metavar(field.annotation) + _range(field),
    )
    return Annotated[kind | None, option]


def _help(field: FieldInfo) -> str:
    text, default = str(field.description), field.default
    if is_repeated(field):
        text += "; may repeat"
    if default is PydanticUndefined:
        return f"{text} (required)"
    if isinstance(default, bool):
        return f"{text} (default: {'yes' if default else 'no'})"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} (default: {default})" if default not in (None, "", {}) else text


def _metavar(annotation: Any) -> str:
    """How an option's value is written in the help: a choice, or a word for its type."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_metavar(kind) for kind in get_args(annotation) if kind is not types.NoneType]
        return "|".join(kinds)
    if str(annotation).startswith("typing.Literal"):
        return "[" + "|".join(map(str, get_args(annotation))) + "]"
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return names.get(annotation, "TEXT")


def _range(field: FieldInfo) -> str:
    """The bounds of a number, as ` >=1 <=4096`; bounds that nobody meets are left out."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f" {sign}{value}"
        for limit in field.metadata
        for name, sign in signs.items()
        if (value := getattr(limit, name, None)) is not None and value < 1 << 32
    ]
    return "".join(bounds)
