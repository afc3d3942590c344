"""Settings of the verbs of `engine data` that write corpora."""

from pathlib import Path

from engine.config.choices import RowShape
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


class MadeOutput(Settings):
    """What the verbs share that make rows of something else."""

    output: Path = setting(..., "Output", "file to write: .jsonl, .jsonl.gz or .parquet")
    overwrite: bool = setting(False, "Output", "replace files that exist")
    strict: bool = setting(False, "Data", "fail where something cannot be used")
