"""Where settings come from: preset, file, flags, `key=value` words.

The later source wins.

Every value remembers its source (`run.yaml:12`, `--learning-rate`, `preset cpu-demo`), so that an
error can say where to look. Two habits of YAML 1.1 are undone: `1e-4` is a number here and not a
string, and `no`, `on` and `yes` are words and not booleans (a field that is a boolean still takes
them). A key that appears twice, in one mapping or under two of its names, is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from engine.config.aliases import ALIASES, GROUPS, HINTS
from engine.config.data_names.passwords import shown_value
from engine.config.explain import Setting, describe, nearest
from engine.config.settings import Settings
from engine.config.spelling import written_path
from engine.config.train_config import TrainConfig
from engine.config.training.presets import OTHER_NAMES, PRESETS
from engine.errors import ConfigError
from engine.storage import strict_yaml
from engine.storage.safe_files import read_given
from engine.storage.strict_yaml import StrictLoader

_LONGEST_FILE = 1 << 20
_PLAIN_MAPPING = "tag:yaml.org,2002:map"


class _Dumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads back: quotes a text that would be something else there."""

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers


S = TypeVar("S", bound=Settings)
V = TypeVar("V")


@dataclass(frozen=True)
class Vocabulary:
    """The settings that a verb knows, by name, and their other names."""

    verb: str
    fields: Mapping[str, FieldInfo]
    renamed: Mapping[str, str]

    @classmethod
    def of(cls, verb: str, *tables: type[Settings]) -> Self:
        """The settings of several tables; of two with one name the first table's counts."""
        fields: dict[str, FieldInfo] = {}
        renamed: dict[str, str] = {}
        for table in tables:
            fields = {**table.model_fields, **fields}
            renamed |= table.renamed
        return cls(verb, fields, renamed)

    def is_mapping(self, key: str) -> bool:
        """Whether `key` names a setting whose value is a mapping, and no group of settings."""
        plain = key.replace("-", "_").lower()
        field = self.fields.get(self.renamed.get(plain, plain))
        return field is not None and isinstance(field.default, dict)

    def field_for(self, key: str, source: str) -> str:
        """The field that `key` names: itself, an alias, or the end of a dotted path in a group.

        Raises `ConfigError` with the nearest name for a key that names nothing.
        """
        plain = key.replace("-", "_").lower()
        candidates = [plain, plain.replace(".", "_")]
        group, _, leaf = plain.rpartition(".")
        if group.split(".")[-1] in GROUPS:
            candidates.append(leaf)
        for candidate in candidates:
            for name in (candidate, self.renamed.get(candidate), ALIASES.get(candidate)):
                if name is not None and name in self.fields:
                    return name
        hint = HINTS.get(leaf) if "method" in self.fields else None
        if hint is None:
            near = nearest(plain, self.fields) or nearest(leaf, self.fields)
            hint = f"`engine {self.verb} --help` lists the settings"
            hint = f"did you mean `{near}`" if near else hint
        head, equals, value = source.partition("=")
        shown = f"{head}={shown_value(head, value)}" if equals else source
        raise ConfigError(f"{shown}: there is no setting `{key}`; {hint}.")


TRAIN = Vocabulary.of("train", TrainConfig)


def load_config(
    file: Path | str | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> TrainConfig:
    """The `TrainConfig` made of all sources, the later ones winning; raises as `gather` does."""
    given = gather(TRAIN, file, preset=preset, flags=flags, overrides=overrides)
    return build(TrainConfig, given)


def gather(
    known: Vocabulary,
    file: Path | str | None = None,
    *,
    preset: str | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Setting]:
    """Every value that was given, by field name, the later sources winning.

    `flags` holds field names with what the user typed; `overrides` holds `key=value` or
    `group.key=value` texts whose values are read as YAML. Raises `ConfigError` for an unreadable
    file and for an unknown key, with a suggestion.
    """
    written = read_file(Path(file), known) if file is not None else {}
    named = written.pop("preset", None)
    if preset is None and named is not None:
        preset = str(named.value)
    settings: dict[str, Setting] = {}
    if preset is not None:
        source = f"preset {preset}"
        settings |= {key: Setting(value, source) for key, value in find_preset(preset).items()}
    settings |= written
    for key, value in (flags or {}).items():
        source = "--" + key.replace("_", "-")
        field = known.renamed.get(key, key)
        first = settings.get(field)
        if first is not None and first.source.startswith("--"):
            raise ConfigError(
                f"{first.source} and {source} are two names of one setting; give it once."
            )
        settings[field] = Setting(value, source)
    for text in overrides:
        settings |= _read_override(text, known)
    limit = settings.get("max_steps")
    if limit and limit.source.startswith("preset ") and "epochs" in settings:
        # Someone who asks for three epochs does not want the preset's end after 60 steps.
        del settings["max_steps"]
    return settings


def build(table: type[S], given: Mapping[str, Setting]) -> S:
    """The table filled with its part of what was given.

    Raises `ConfigError` naming every value that cannot be used, with its source.
    """
    own = {name: setting.value for name, setting in given.items() if name in table.model_fields}
    try:
        return table(**own)
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise ConfigError(describe(error.__cause__, table.model_fields, given)) from None


def find_preset(name: str) -> dict[str, Any]:
    """The settings of a preset. Raises `ConfigError` for a name that there is none of."""
    name = OTHER_NAMES.get(name, name)
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        meant = f" Did you mean {near}?" if near else ""
        raise ConfigError(f"There is no preset {name!r}.{meant} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def read_file(path: Path, known: Vocabulary = TRAIN) -> dict[str, Setting]:
    """The settings in a YAML (or JSON) file, by field name. Raises `ConfigError`."""
    return _read(path, lambda loader, node: _collect(_walk(loader, node, (), known), path, known))


def read_mapping(path: Path) -> dict[str, Any]:
    """The values of a YAML (or JSON) file as they are, whatever its keys. Raises `ConfigError`."""

    def values(loader: StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
        return {str(key): value for key, value in loader.construct_document(node).items()}

    return _read(path, values)


def output_in(path: Path, content: Mapping[str, Any]) -> Path:
    """The `output_dir` of a file's values, else `runs/` with the file's name.

    Raises `ConfigError` where it is no path.
    """
    written = content.get("output_dir")
    try:
        return written_path(str(written)) if written else Path(f"runs/{path.stem}")
    except ValueError as error:
        raise ConfigError(f"{path}: `output_dir` = {str(written)!r}: {error}.") from None


def _read(
    path: Path, use: Callable[[StrictLoader, yaml.MappingNode], dict[str, V]]
) -> dict[str, V]:
    """What `use` makes of the mapping in a YAML file. Raises `ConfigError`."""
    try:
        data = read_given(path, _LONGEST_FILE)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # also of a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"The configuration file {path} cannot be read: {reason}.") from None
    if len(data) > _LONGEST_FILE:
        raise ConfigError(f"{path} is over 1 MiB, too long for a configuration file.")
    try:
        loader = StrictLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1 should hold `key: value` lines and holds something else.")
        return use(loader, node)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML that can be read: {error}.") from None
    finally:
        loader.dispose()


def _walk(
    loader: StrictLoader, node: yaml.MappingNode, above: tuple[str, ...], known: Vocabulary
) -> Iterator[tuple[str, Any, int]]:
    """Dotted key, value and line of every leaf under `node`."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            kind = "list" if isinstance(key_node, yaml.SequenceNode) else "mapping"
            raise ValueError(f"a {kind} stands for the name of a setting in line {line}")
        path = (*above, str(key_node.value))
        group = isinstance(value_node, yaml.MappingNode) and value_node.tag == _PLAIN_MAPPING
        # An empty mapping may stand for a value too, which is then no value of its setting.
        if group and not known.is_mapping(path[-1]) and (value_node.value or path[-1] in GROUPS):
            yield from _walk(loader, value_node, path, known)
        else:
            value = loader.construct_object(value_node, deep=True)
            yield ".".join(path), value, line


def _collect(
    leaves: Iterator[tuple[str, Any, int]], path: Path, known: Vocabulary
) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for key, value, line in leaves:
        source = f"{path}:{line}"
        preset = key == "preset" and "method" in known.fields
        field = key if preset else known.field_for(key, source)
        if field in settings:
            first = settings[field].source
            raise ConfigError(
                f"{source}: `{key}` sets {field}, which {first} has set already; remove one."
            )
        settings[field] = Setting(value, source)
    return settings


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{where}: this is not YAML: {what}. Expected `key: value` lines."


def _read_override(text: str, known: Vocabulary) -> dict[str, Setting]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"The override {text!r} is not of the form key=value; an example is lora_rank=8."
        )
    try:
        value = strict_yaml.load(raw, StrictLoader)
    except (yaml.YAMLError, ValueError):
        value = raw
    if isinstance(value, dict):
        value = raw
    return {known.field_for(key.strip(), text): Setting(value, text)}


def dump_yaml(config: TrainConfig) -> str:
    """The configuration without its verbs, as YAML that `load_config` reads back."""
    return str(yaml.dump(config.stored(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
