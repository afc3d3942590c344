"""`TrainConfig`: every setting of a training run.

One flat table serves the Python API, the YAML file, the command line's flags and its help. The
fields carry the group they are shown under; `engine.config.sources` reads files, flags, presets and
`key=value` overrides into it.

Nothing here imports torch, so the command line can show help and report a bad option at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, field_validator, model_validator

from engine.config.choices import (
    DETERMINISTIC,
    ComputeType,
    EmbeddingOn,
    HeadPrecision,
    LogLevel,
    Offload,
    Streaming,
    Tracker,
)
from engine.config.data_names import DataNames
from engine.config.publishing import Publishing
from engine.config.recipes.adapter import AdapterSettings
from engine.config.recipes.loss import TokenLossSettings
from engine.config.recipes.optimizer import OptimizerSettings
from engine.config.recipes.preference import ObjectiveSettings
from engine.config.recipes.schedule import ScheduleSettings
from engine.config.recipes.scratch import WholeModelSettings
from engine.config.row_settings import RowSettings
from engine.config.rules import Facts, broken
from engine.config.settings import setting
from engine.config.spelling import (
    DEVICE,
    DEVICES,
    DTYPES,
    POLICY,
    PRECISIONS,
    ChunkTokens,
    FolderOrWord,
    SizeToFit,
    checkpointing_policies,
    comma_list,
    iso_date,
    json_object,
    minus_one_is_none,
    size_in_bytes,
    spelled,
)
from engine.config.training.distributed import DistributedSettings
from engine.config.training.evaluation import EvaluationSettings
from engine.config.trajectory import KNOWN_OTHERWISE, NOT_TRAJECTORY
from engine.storage.home import expanded

VERBS = ("resume", "overwrite")
"""Settings that say what to do now, and are no part of what a run is."""
NO_DATA = ("-",)
"""Stands for the rows where a plan is made without any; elsewhere it is standard input."""


class TrainConfig(
    RowSettings,
    EvaluationSettings,
    ObjectiveSettings,
    TokenLossSettings,
    ScheduleSettings,
    OptimizerSettings,
    AdapterSettings,
    WholeModelSettings,
    DistributedSettings,
    Publishing,
):
    """The settings of one run. Raises `ConfigError` naming every setting that cannot be used."""

    renamed: ClassVar[Mapping[str, str]] = {
        "mlp_tile_rows": "mlp_tile_tokens",
        "loss_chunk_rows": "loss_chunk_tokens",
        "decode_singly": "low_memory_decode",
    }

    model: str = setting(..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1)
    revision: str | None = setting(None, "Model", "branch, tag or commit of a hub id")
    data: DataNames = setting(
        ...,
        "Data",
        "rows to train on: file, folder, pattern, URL of a database, id of a hub's data set, or - "
        "for standard input; NAME=0.5 reads half of its rows in an epoch, NAME=2 all twice",
        repeat=True,
        min_length=1,
    )
    eval_data: DataNames = setting((), "Data", "held-out rows, never trained on", repeat=True)
    eval_query: str | None = setting(
        None, "Data", "SQL query whose rows are held out, where --eval-data is a database"
    )
    heldout: float = setting(0.0, "Data", "fraction of the rows to hold out instead", ge=0, lt=1)
    category: str | None = setting(None, "Data", "only rows of this category")
    limit_rows: int | None = setting(None, "Data", "only the first N rows", ge=1)
    streaming: Annotated[Streaming, spelled({"true": "on", "false": "off"})] = setting(
        "auto",
        "Data",
        "read and tokenise rows while training, in little memory; auto: where the files are large",
    )
    token_cache: FolderOrWord = setting(
        "auto", "Data", "folder for rows that are tokenised, to be used again; auto, or none"
    )
    system_prompt: str | None = setting(
        None, "Data", "system message put before rows that have none"
    )

    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Data", 'further variables of the chat template: {"enable_thinking": false}'
    )

    template_date: Annotated[str | None, BeforeValidator(iso_date)] = setting(
        None,
        "Data",
        "what the chat template takes for the present, such as 2026-01-31; by default the start",
    )

    output_dir: Path | None = setting(None, "Run", "run directory; by default runs/<run-id>")
    run_id: str | None = setting(
        None,
        "Run",
        "name of the run; by default the time and the model",
        pattern=r"^[\w.+-]+$",
        expected="letters, digits and any of . _ + - without spaces",
    )
    resume: str | None = setting(
        None,
        "Run",
        "auto, or a run or checkpoint directory: go on from there, to the same bits on a CPU, and "
        "on a GPU with --deterministic",
        min_length=1,
    )
    overwrite: bool = setting(False, "Run", "replace an earlier run in the same directory")
    checkpoint_every: int = setting(
        100, "Run", "steps between checkpoints; 0 for one at the end", ge=0
    )
    keep_checkpoints: int = setting(2, "Run", "how many of the newest checkpoints to keep", ge=2)
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(comma_list)] = setting(
        (), "Run", "trackers to report to: tensorboard, wandb"
    )
    plot: bool = setting(True, "Run", "draw the loss curve at the end (needs the extra `plot`)")
    log_level: LogLevel = setting(
        "INFO", "Run", "what the console shows; the log file always holds DEBUG"
    )
    log_every: int = setting(
        10, "Run", "steps between lines when the console is not a terminal", ge=1
    )

    epochs: int = setting(1, "Steps and batches", "passes over the data", ge=1, le=100_000)
    max_steps: Annotated[int | None, BeforeValidator(minus_one_is_none)] = setting(
        None, "Steps and batches", "stop after this many steps, whatever --epochs says", ge=1
    )
    batch_size: int = setting(4, "Steps and batches", "examples per micro-batch", ge=1, le=65_536)
    accumulate: int = setting(1, "Steps and batches", "micro-batches per step", ge=1, le=65_536)
    max_length: int = setting(
        2048,
        "Steps and batches",
        "longest example in tokens; longer ones are cut",
        ge=8,
        le=1 << 20,
    )
    packing: bool = setting(
        False, "Steps and batches", "fill micro-batches of --batch-size x --max-length tokens"
    )
    gradient_checkpointing: Annotated[str, BeforeValidator(checkpointing_policies)] = setting(
        "auto",
        "Memory",
        "what backward recomputes: none, selective, full, or by layer as in full:20,none; auto: as "
        "little as memory allows",
        pattern=rf"^(auto|({POLICY}:[1-9][0-9]{{0,3}},)*{POLICY}(:[1-9][0-9]{{0,3}})?)$",
        expected="auto, none, selective or full, or policies by layer such as full:20,none",
    )
    mlp_tile_tokens: int | None = setting(
        None, "Memory", "tokens at a time in the feed-forward part", ge=16, le=1 << 20
    )
    keep_decoded: str = setting(
        "auto",
        "Memory",
        "last layers whose decoded weights stay: a number, none, or auto for as many as fit",
        pattern=r"^(auto|none|[0-9]{1,4})$",
        expected="auto, none or a number of layers such as 8",
    )
    low_memory_decode: bool = setting(
        False, "Memory", "decode one weight at a time, not a group of them"
    )
    loss_chunk_tokens: ChunkTokens = setting(
        "auto",
        "Memory",
        "trained tokens per chunk of the loss; auto: 1,024 or a multiple on a GPU, 64 MiB on a CPU",
    )
    head_precision: Annotated[HeadPrecision, spelled(PRECISIONS)] = setting(
        "16bit", "Memory", "frozen output head: the compute type, or 8-bit rows"
    )
    embedding_on: Annotated[EmbeddingOn, spelled({"cpu": "host"})] = setting(
        "device",
        "Memory",
        "where a frozen embedding is; host: a batch's rows are copied",
    )
    offload: Annotated[tuple[Offload, ...], BeforeValidator(comma_list)] = setting(
        (),
        "Memory",
        "what a GPU keeps in host memory: checkpoints (inputs), weights",
    )
    optimizer_in_backward: bool = setting(
        False,
        "Memory",
        "method full: update each layer as its gradients come, so that they never exist all at "
        "once; needs --max-grad-norm 0 and --accumulate 1",
    )
    cuda_graphs: bool = setting(
        False,
        "Memory",
        "repeat recorded launches of the layers, for small models that wait for the host",
    )
    memory_budget: Annotated[int | None, BeforeValidator(size_in_bytes)] = setting(
        None, "Memory", "most memory to use, such as 8GiB; refused if it cannot hold"
    )
    fit_memory: SizeToFit = setting(
        None, "Memory", "take the fastest memory settings within a size, or auto: this machine's"
    )

    device: str = setting("auto", "Machine", "auto, cpu or cuda", pattern=DEVICE, expected=DEVICES)
    dtype: Annotated[ComputeType, spelled(DTYPES)] = setting(
        "auto",
        "Machine",
        "compute type; auto is bfloat16 where the GPU multiplies it, else float16, and on a CPU "
        "the faster of float32 and bfloat16 for adapters",
    )
    seed: int = setting(
        42, "Machine", "of the data order, dropout and the adapter", ge=0, lt=1 << 63
    )
    deterministic: bool = setting(False, "Machine", DETERMINISTIC)
    threads: int | None = setting(None, "Machine", "CPU threads", ge=1, le=4096)

    def __init__(self, /, **values: Any) -> None:
        """Takes each setting in any of its spellings, so not as its declared type only."""
        super().__init__(**values)

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("resume", mode="before")
    @classmethod
    def _resume_flag(cls, value: Any) -> Any:
        """`true` means auto and `false` means none, as other trainers spell it; ~ is a home."""
        if isinstance(value, bool):
            return "auto" if value else None
        return str(expanded(value)) if isinstance(value, Path | str) and value else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        facts = Facts()
        for rule in broken(self, facts):
            raise ValueError(rule.text(self, facts))
        return self

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the weights: a resumed run must have the same ones."""
        return self.model_dump(mode="json", exclude=set(NOT_TRAJECTORY))

    def other_trajectory(self, saved: Mapping[str, Any], names: bool) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from a `saved` trajectory's, with both values.

        What was added since it was saved had its default then. The length of a run is left out,
        and so are the names of what it reads unless `names` asks for them: digests know better.
        """
        length = {"epochs", "max_steps", "template_date"}
        ignored = length | {"threads"} if names else KNOWN_OTHERWISE
        mine = self.trajectory()
        fields = type(self).model_fields
        before = {key: saved.get(key, fields[key].default) for key in mine}
        before = {key: list(v) if isinstance(v, tuple) else v for key, v in before.items()}
        return {
            key: (before[key], value)
            for key, value in mine.items()
            if key not in ignored and before[key] != value
        }

    def stored(self) -> dict[str, Any]:
        """The settings as a run's records hold them: JSON values, without `VERBS`."""
        return self.model_dump(mode="json", exclude=set(VERBS))
