"""Settings of the verbs of `engine data` that write corpora."""

from pathlib import Path

from engine.config.choices import CompareOn, RowShape
from engine.config.data_names import DataNames
from engine.config.row_settings import ChoiceSettings
from engine.config.settings import Settings, setting
from engine.config.tasks.inference import Paths


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


class MadeOutput(Settings):
    """What the verbs share that make rows of something else."""

    output: Path = setting(..., "Output", "file to write: .jsonl, .jsonl.gz or .parquet")
    overwrite: bool = setting(False, "Output", "replace files that exist")
    strict: bool = setting(False, "Data", "fail where something cannot be used")
