"""Settings of the verbs of `engine data` that write corpora."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from engine.config.choices import CompareOn, RowShape
from engine.config.data_names import ColumnMap, DataNames
from engine.config.row_settings import BadRowSettings, ChoiceSettings
from engine.config.settings import Settings, setting
from engine.config.tasks.inference import Paths
from engine.errors import ConfigError


class CorpusSettings(ChoiceSettings):
    """What the verbs that read rows and write rows share."""

    data: DataNames = setting(
        (), "Data", "rows: files, folders, databases, hub ids, or -", repeat=True
    )
    category: Paths = setting((), "Data", "only rows of this category", repeat=True)
    strict: bool = setting(False, "Data", "fail where a source is stale, or a row left out as bad")
    overwrite: bool = setting(False, "Output", "replace files that exist")


class OneOutput(CorpusSettings):
    """A verb that writes one file of rows."""

    output: Path = setting(..., "Output", "file to write: .jsonl, .jsonl.gz or .parquet")


class ConvertSettings(OneOutput):
    """`engine data convert`."""

    shape: RowShape = setting(
        "auto", "Output", "shape of the rows; auto is prompt and response where that says all"
    )


class SplitSettings(CorpusSettings):
    """`engine data split`."""

    output_dir: Path = setting(
        ..., "Output", "folder for train.jsonl, heldout.jsonl and, if asked for, test.jsonl"
    )
    heldout: float = setting(0.1, "Sides", "share of rows for heldout.jsonl", gt=0, lt=1)
    test: float = setting(0.0, "Sides", "share of rows for test.jsonl", ge=0, lt=1)
    group_by: str | None = setting(
        None, "Sides", "key whose equal values stay on one side, such as source or meta.author"
    )
    threshold: float = setting(
        0.8, "Sides", "rows that share this part of their runs of words stay together", gt=0, le=1
    )
    exact: bool = setting(False, "Sides", "let near-duplicates part; only equal rows stay together")
    seed: int = setting(0, "Sides", "another seed divides otherwise", ge=0)


class DedupSettings(OneOutput):
    """`engine data dedup`."""

    compare: CompareOn = setting("all", "Duplicates", "what makes rows the same")
    threshold: float = setting(
        0.8, "Duplicates", "share of their runs of words that makes rows the same", gt=0, le=1
    )
    exact: bool = setting(False, "Duplicates", "only rows that are equal but for case and spaces")
    removed: Path | None = setting(None, "Output", "file for the rows that are left out (.jsonl)")


class DecontaminateSettings(OneOutput):
    """`engine data decontaminate`."""

    against: DataNames = setting(..., "Held out", "held-out rows", repeat=True, min_length=1)
    ngram: int = setting(13, "Held out", "words in a row that make a row contaminated", ge=5)
    removed: Path | None = setting(None, "Output", "file for the rows that are left out (.jsonl)")


class MixSource(Settings):
    """A source of `engine data mix`."""

    path: DataNames = setting(..., "Mix", "rows", min_length=1)
    name: str | None = setting(None, "Mix", "what the report calls it; by default its path")
    weight: float = setting(
        1.0, "Mix", "how often a row is written; with a total, share beside the others'", gt=0
    )
    rate: float = setting(1.0, "Mix", "share of its rows that is drawn", gt=0, le=1)
    optional: bool = setting(False, "Mix", "go on without it where it does not exist")
    category: Paths = setting((), "Mix", "only rows of this category")
    min_rating: int | None = setting(None, "Mix", "leave out rows rated lower", ge=1, le=5)
    query: str | None = setting(None, "Mix", "SQL query, where the path is a database")
    map: ColumnMap = setting({}, "Mix", "columns by the fields they are")


def _mix_sources(value: Any) -> Any:
    """Names of sources, or mappings with the keys of `MixSource`."""
    if not isinstance(value, list | tuple):
        value = (value,)
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


def _one_source(value: Any) -> Any:
    """A source as its table; `ConfigError` as what pydantic reports."""
    if not isinstance(value, Mapping):
        return value
    try:
        return MixSource(**{str(key): item for key, item in value.items()})
    except ConfigError as error:
        raise ValueError(str(error)) from error


class MixSettings(BadRowSettings):
    """`engine data mix`."""

    sources: Annotated[
        tuple[Annotated[MixSource, BeforeValidator(_one_source)], ...],
        BeforeValidator(_mix_sources),
    ] = setting(
        ..., "Mix", "rows, in the YAML file with path, weight, rate and more", repeat=True,
        min_length=1,
    )  # fmt: skip
    rows: int | None = setting(None, "Mix", "rows to write; by default what weights give", ge=1)
    seed: int = setting(0, "Mix", "another seed draws and orders otherwise", ge=0)
    strict: bool = setting(False, "Data", "fail where a source is stale, or an optional one absent")
    output: Path = setting(..., "Output", "file to write: .jsonl, .jsonl.gz or .parquet")
    report: Path | None = setting(None, "Output", "file for the figures (.json)")
    overwrite: bool = setting(False, "Output", "replace files that exist")


class MadeOutput(Settings):
    """What the verbs share that make rows of something else."""

    output: Path = setting(..., "Output", "file to write: .jsonl, .jsonl.gz or .parquet")
    overwrite: bool = setting(False, "Output", "replace files that exist")
    strict: bool = setting(False, "Data", "fail where something cannot be used")


class PairsSettings(MadeOutput):
    """`engine data pairs`."""

    data: DataNames = setting((), "Pages", "rows to write before those of the pages", repeat=True)
    docs: Paths = setting(..., "Pages", "folder of Markdown, or a page", repeat=True, min_length=1)
    fence: Paths = setting(("python",), "Pages", "language of code to take", repeat=True)
    mode: Literal["code", "prose", "both"] = setting(
        "code", "Pages", "answers are fenced code, the text of sections, or both"
    )
    all_pages: bool = setting(
        False,
        "Pages",
        "also pages that do not say `training_eligible`; never where it is false",
    )


class ExtractSettings(MadeOutput):
    """`engine data extract`."""

    source: Paths = setting(
        ..., "Code", "source file, folder, or installed package", repeat=True, min_length=1
    )
    task: Literal["write", "describe", "both"] = setting(
        "write", "Code", "answers are code for a description, or docstrings for a name"
    )
    fewest_lines: int = setting(3, "Code", "leave out shorter definitions", ge=1)
    most_lines: int = setting(80, "Code", "leave out longer definitions", ge=1)
    private: bool = setting(False, "Code", "also names that begin with an underscore")
    limit: int | None = setting(None, "Code", "most rows", ge=1)


class SynthSettings(MadeOutput):
    """`engine data synth`."""

    templates: Path = setting(..., "Templates", "YAML file with values and templates")
    limit: int = setting(500, "Templates", "most rows", ge=1)
    seed: int = setting(0, "Templates", "another seed chooses and orders otherwise", ge=0)


class TokenizerSettings(ChoiceSettings):
    """`engine data tokenizer`."""

    data: DataNames = setting(
        (), "Data", "rows: files, folders, databases, hub ids, or -", repeat=True
    )
    category: Paths = setting((), "Data", "only rows of this category", repeat=True)
    output_dir: Path = setting(..., "Tokenizer", "new folder, as Hugging Face's models have it")
    vocab_size: int = setting(8192, "Tokenizer", "most ids, special tokens among them", ge=259)
    special: Paths = setting((), "Tokenizer", "further special tokens", repeat=True)
