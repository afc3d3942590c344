"""The settings of every verb but `engine train`, whose table is `TrainConfig`.

Python, YAML files, `key=value` words, flags and help all read these tables. Nothing here imports
torch, so the command line can show help and report a bad option at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from engine.config.choices import (
    GPU_TFLOPS,
    MAX_SHARD_SIZE,
    ComputeType,
    Granularity,
    HeadKind,
    MergeOnto,
    Metric,
    PruneMode,
    Quantization,
    Scope,
    StoredType,
)
from engine.config.settings import Settings, setting
from engine.config.spelling import (
    BAD_LINES,
    DEVICE,
    DTYPES,
    as_text,
    inner_share,
    json_object,
    layer_numbers,
    none_is_unset,
    one_or_many,
    shard_size,
    spelled,
)
from engine.config.train_config import TrainConfig

Paths = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


class Machine(Settings):
    """Where a model runs and how its weights are stored."""

    quantize: Annotated[Quantization | None, BeforeValidator(none_is_unset)] = setting(
        None, "Machine", "quantise the model's weights as they load: nf4 or int8"
    )
    device: str = setting("auto", "Machine", "auto, cpu or cuda", pattern=DEVICE)
    dtype: Annotated[ComputeType, spelled(DTYPES)] = setting("auto", "Machine", "compute type")


class OneModel(Machine):
    """A model to load, with or without an adapter."""

    renamed: ClassVar[Mapping[str, str]] = {"template_kwargs": "chat_template_kwargs"}

    model: Annotated[str, BeforeValidator(as_text)] = setting(
        ..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1
    )
    adapter: Path | None = setting(None, "Model", "adapter to put on the model")
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Model", 'further variables of the chat template: {"enable_thinking": false}'
    )


class EvalSettings(OneModel):
    """`engine eval`."""

    data: Paths = setting(..., "Data", "JSONL or JSON file(s) of rows", repeat=True, min_length=1)
    batch_size: int | None = setting(
        None, "Data", "rows at a time; bounds memory, not the result", ge=1
    )
    max_length: int = setting(2048, "Data", "longest example in tokens", ge=8)
    min_rating: int | None = setting(None, "Data", "leave out rows rated lower", ge=1, le=5)
    category: str | None = setting(None, "Data", "only rows of this category")
    limit_rows: int | None = setting(None, "Data", "only the first N rows", ge=1)


class Sampling(Settings):
    """How the next token is drawn. `temperature` 0 takes the most likely one.

    The order is Hugging Face's: repetition penalty (Keskar et al. 2019, arXiv 1909.05858), then
    temperature, then the `top_k` most likely, then the smallest set of mass `top_p` (Holtzman et
    al. 2020, arXiv 1904.09751).
    """

    temperature: float = setting(0.0, "Sampling", "0 takes the likeliest token", ge=0)
    top_p: float = setting(1.0, "Sampling", "the likeliest tokens of this mass", gt=0, le=1)
    top_k: int = setting(0, "Sampling", "only the k likeliest; 0 is all", ge=0)
    repetition_penalty: float = setting(1.0, "Sampling", "1 is none", gt=0)
    seed: int = setting(0, "Sampling", "of the drawing")


class GenerateSettings(Sampling, OneModel):
    """`engine generate`."""

    prompt: str = setting(..., "Text", "what to answer; - reads standard input")
    system: str | None = setting(None, "Text", "system message")
    raw: bool = setting(False, "Text", "go on from the prompt, without the chat template")
    max_new_tokens: int = setting(128, "Text", "longest answer", ge=1)
    stop: Paths = setting((), "Text", "end before this text", repeat=True)


class MergeSettings(Settings):
    """`engine merge`."""

    model: str = setting(..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1)
    adapter: Path = setting(..., "Model", "adapter to merge")
    output: Path = setting(..., "Output", "new directory for the merged model")
    onto: MergeOnto = setting(
        "original", "Output", "the weights as they are, or as 4-bit training saw them"
    )
    dtype: Annotated[StoredType | None, spelled(DTYPES)] = setting(
        None, "Output", "type of all tensors; by default each keeps its own"
    )
    max_shard_size: Annotated[int, BeforeValidator(shard_size)] = setting(
        MAX_SHARD_SIZE, "Output", "largest file, in GB (10^9 bytes) or with a unit", ge=1000
    )


class HeadChoice(Settings):
    """How many heads are pruned, which ones, and how."""

    fraction: Annotated[float, AfterValidator(inner_share)] = setting(
        ..., "Heads", "share of the heads to prune, between 0 and 1"
    )
    metric: Metric = setting(
        "l2",
        "Heads",
        "l2: norm of the head's weights; ov: norm of its value-output product; activation and "
        "gradient: measured on --data; random: a baseline",
    )
    scope: Scope = setting("global", "Heads", "rank all heads together, or those of each layer")
    granularity: Granularity = setting(
        "head", "Heads", "single heads, or key/value heads with all that read them"
    )
    min_heads: int = setting(1, "Heads", "heads to leave in every layer", ge=1)
    min_kv_heads: int = setting(1, "Heads", "key/value heads to leave in every layer", ge=1)
    protect: Annotated[tuple[int, ...], BeforeValidator(layer_numbers)] = setting(
        (), "Heads", "layers to leave alone, such as 0,1,-1 (-1 is the last)"
    )
    per_layer: bool = setting(
        False,
        "Heads",
        "with structural: another number from each layer. Only this engine loads it.",
    )
    allow_shortfall: bool = setting(False, "Heads", "prune fewer where the rules allow no more")
    calibration_rows: int = setting(
        64, "Heads", "rows that activation and gradient are measured on", ge=1
    )


class PruneSettings(HeadChoice, Machine):
    """Everything that decides which heads are pruned; `protect` counts from the end below 0.

    With `per_layer` a structural cut may take another number out of each layer; no other program
    loads what is written then.

    `data`, `calibration_rows`, `max_length`, `device` and `dtype` are of the metrics that run the
    model; with `quantize` the values are scored that a model quantised so computes with.
    """

    mode: PruneMode = setting(
        "zero",
        "Heads",
        "zero: same shapes, zeros; mask: whole weights and a mask next to them; structural: "
        "smaller weights, the same in every layer",
    )
    heads: HeadKind = setting(
        "attention", "Heads", "those of attention, or of DeltaNet layers, by their own rules"
    )
    data: Paths = setting((), "Heads", "calibration rows (JSONL or JSON)", repeat=True)
    max_length: int = setting(512, "Heads", "longest calibration row in tokens", ge=8)
    seed: int = setting(0, "Heads", "of the metric random", ge=0)
    max_shard_size: Annotated[int, BeforeValidator(shard_size)] = setting(
        MAX_SHARD_SIZE, "Output", "largest file, in GB (10^9 bytes) or with a unit", ge=1000
    )

    def __init__(self, /, **values: Any) -> None:
        """Takes each setting in any of its spellings, so not as its declared type only."""
        super().__init__(**values)

    @model_validator(mode="after")
    def _per_layer_is_structural(self) -> Self:
        if self.per_layer and (self.mode, self.heads) != ("structural", "attention"):
            raise ValueError(
                "--per-layer lets a structural cut take another number of attention heads out of "
                "each layer: it goes with --mode structural, and not with --heads delta"
            )
        return self


class PruneJob(PruneSettings):
    """`engine prune`: the settings, the model and where the pruned one goes."""

    model: str = setting(..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1)
    output: Path | None = setting(None, "Output", "new directory for the pruned model")
    report_only: bool = setting(False, "Output", "score and choose; write nothing")

    @model_validator(mode="after")
    def _writes_or_reports(self) -> Self:
        if (self.output is None) != self.report_only:
            raise ValueError(
                "give --output for the pruned model, or --report-only to write nothing: one of them"
            )
        return self


class ForgeCycles(Settings):
    """What a job of pruning and recovery does, apart from how it prunes and trains."""

    renamed: ClassVar[Mapping[str, str]] = {"control": "baseline"}

    output_dir: Path = setting(..., "Job", "where everything goes")
    cycles: int = setting(1, "Job", "times to prune and train", ge=1)
    baseline: bool = setting(
        False, "Job", "also train as much without pruning, as a baseline to compare with"
    )
    distill: bool = setting(
        False, "Job", "learn the unpruned model's probabilities, not the tokens"
    )
    keep_pruned: bool = setting(False, "Job", "keep the pruned models that were trained on")
    domain: str | None = setting(
        None,
        "Data",
        "instead of --data: docstrings, a file of rows, or a folder with train.jsonl and "
        "heldout.jsonl",
    )
    heldout: float = setting(0.1, "Data", "share of --data held out", ge=0.001, le=0.9)
    heldout_rows: int | None = setting(None, "Data", "judge by the first N held-out rows", ge=1)
    samples: int = setting(3, "Data", "held-out questions to answer", ge=0)


class ForgeSettings(ForgeCycles):
    """One job, for Python.

    `training` holds model, rows and everything else that a fine-tuning of one cycle needs; its
    output directory is not used. `pruning.fraction` is of the heads that are left, in every cycle.
    """

    training: TrainConfig
    pruning: PruneSettings


class ForgeJob(ForgeCycles, HeadChoice):
    """`engine forge`: one flat table; how to fine-tune comes from `TrainConfig`."""

    model: str = setting(..., "Data", "Hugging Face directory, hub id or .gguf file", min_length=1)
    data: Paths = setting((), "Data", "rows to train on", repeat=True)
    eval_data: Paths = setting((), "Data", "rows held out", repeat=True)
    metric: Metric = setting(
        "activation", "Heads", "what makes a head important; see `engine prune`"
    )
    mode: Literal["zero", "structural"] = setting(
        "zero", "Heads", "zero: same shapes; structural: smaller weights"
    )
    resume: bool = setting(False, "Job", "go on with a job")

    @model_validator(mode="after")
    def _one_source_of_rows(self) -> Self:
        if (self.domain is None) == (not self.data):
            raise ValueError("give rows with --data, or a data set with --domain: one of them")
        return self

    def settings(self, training: TrainConfig) -> ForgeSettings:
        """The job with its fine-tuning, whose seed, length and machine are the pruning's too."""
        chosen = {name: getattr(self, name) for name in HeadChoice.model_fields}
        same = {name: getattr(training, name) for name in ("seed", "max_length", "device", "dtype")}
        own = {name: getattr(self, name) for name in ForgeCycles.model_fields}
        return ForgeSettings(**own, training=training, pruning=PruneSettings(**chosen, **same))


class TrainOptions(Settings):
    """What `engine train` does with its `TrainConfig`."""

    dry_run: bool = setting(False, "Run", "show the resolved run and the first rows, then end")


class PlanSettings(Settings):
    """What `engine plan` shows of a `TrainConfig`."""

    renamed: ClassVar[Mapping[str, str]] = {"card": "gpu"}

    max_context: bool = setting(False, "Plan", "the longest row for GPUs of 6 to 141 GB")
    gpu: str | None = setting(
        None, "Plan", f"for the time: {', '.join(GPU_TFLOPS)}, or its TFLOP/s as a number"
    )
    sizes: bool = setting(False, "Plan", "the models known by name, and their parameters")


class BenchSettings(Settings):
    """`engine bench`."""

    ops: Paths = setting((), "Measurement", "ops to measure; all by default", repeat=True)
    model: Paths = setting(
        (),
        "Measurement",
        "whose shapes; by default llama-3.1-8b, qwen3-8b, qwen3-4b and llama-3.3-70b, on a CPU "
        "smollm2-135m",
        repeat=True,
    )
    tokens: int = setting(0, "Measurement", "tokens at once; 0 chooses", ge=0)
    device: str = setting("auto", "Measurement", "auto, cpu or cuda", pattern=DEVICE)
    budget: float = setting(0.2, "Measurement", "seconds to spend on one timing", ge=0)
    compile: bool = setting(False, "Measurement", "also time torch.compile of the plain form")
    against: Paths = setting(
        (), "Measurement", "module with `baselines(op, work)`, such as bench.peers", repeat=True
    )
    output: Path | None = setting(None, "Output", "folder for ops.json and roofline.png")


class StatusSettings(Settings):
    """`engine status`."""

    run: str = setting("", "Run", "run directory, or a run's name under runs/; else the newest")
    tail: int = setting(0, "Run", "also show the log's last lines", ge=0)


class DataSettings(Settings):
    """`engine data validate` and `engine data stats`."""

    data: Paths = setting((), "Data", "data files, or a folder with a train.jsonl", repeat=True)
    model: str | None = setting(None, "Data", "also render and tokenise as for this model")
    max_length: int = setting(2048, "Data", "longest example in tokens", ge=2)
    min_rating: int | None = setting(
        None, "Data", "leave out rows rated lower, or not at all", ge=1, le=5
    )
    category: Paths = setting((), "Data", "only rows of this category", repeat=True)
    bad_lines: str = setting(
        "fail",
        "Data",
        "fail: stop at a bad row; skip, or skip:5%: leave it out and count it",
        pattern=BAD_LINES,
    )


class PreviewSettings(DataSettings):
    """`engine data preview`."""

    row: int = setting(1, "Data", "the first row to show, counted from 1", ge=1)
    count: int = setting(1, "Data", "rows to show", ge=1)
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Data", 'further variables of the chat template: {"enable_thinking": false}'
    )


class DocstringSettings(Settings):
    """`engine data docstrings`."""

    output_dir: Path = setting(..., "Data", "where train.jsonl and heldout.jsonl go")
    limit: int | None = setting(None, "Data", "most rows of both together", ge=2)
    heldout_fraction: float = setting(0.15, "Data", "share of modules to hold out", ge=0, le=0.9)
