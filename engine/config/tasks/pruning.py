"""Settings of `engine prune` and `engine forge`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from engine.config.choices import (
    MAX_SHARD_SIZE,
    METRICS_OF,
    PRUNABLES,
    ComputeType,
    Granularity,
    HeadKind,
    Metric,
    Prunable,
    PruneMode,
    RepairMethod,
    Scope,
    StoredType,
)
from engine.config.data_names import DataNames
from engine.config.settings import Settings, setting
from engine.config.spelling import (
    DTYPES,
    METRIC_NAMES,
    budget,
    inner_share,
    layer_numbers,
    optional,
    parts_of_a_model,
    shard_size,
    spelled,
)
from engine.config.tasks.inference import Machine
from engine.config.train_config import TrainConfig

DEFAULT_RIDGE = 1e-3


class HeadChoice(Settings):
    """How many heads are pruned, which ones, and how."""

    fraction: Annotated[float | None, AfterValidator(optional(inner_share))] = setting(
        None, "Heads", "share of the heads, channels, layers or experts to prune, between 0 and 1"
    )
    target: Annotated[str | None, BeforeValidator(budget)] = setting(
        None,
        "Heads",
        "instead of --fraction: what is to be left of the whole, params=0.8 of its parameters or "
        "latency=0.8 of the time of its ops on this machine. Needs --data",
    )
    what: Annotated[str, BeforeValidator(parts_of_a_model)] = setting(
        "heads",
        "Heads",
        "heads; kv-groups: key/value heads with all that read them; mlp: channels of dense "
        "feed-forward parts, as many of each layer; layers: whole ones; experts: as many of each "
        "mixture. With --target several, such as heads,mlp,layers: each gives up what the model "
        "misses least",
        expected=", ".join(PRUNABLES),
    )
    metric: Annotated[Metric | None, spelled(METRIC_NAMES)] = setting(
        None,
        "Heads",
        "l2-reconstruction: error on --data once the rest made up for it; l2-output: size of what "
        "the head adds on --data; l2-weights: norm of its weights, which can be worse than chance; "
        "l2-weights-largest: an experiment, the largest go; gradient: change of the loss on "
        "--data; ov: norm of the value-output product; cosine: how little a layer turns what it "
        "reads; routed-mass: the router's weights on an expert; random: a baseline. By default "
        "l2-reconstruction with --data, else l2-weights",
    )
    scope: Scope | None = setting(
        None,
        "Heads",
        "sensitivity: layers give up what the model misses least, measured on --data; global: rank "
        "all heads together; layer: the same share from each. By default sensitivity for "
        "l2-reconstruction, layer for l2-weights-largest, else global",
    )
    granularity: Granularity = setting(
        "head", "Heads", "single heads, or key/value heads with all that read them"
    )
    min_heads: int = setting(1, "Heads", "heads to leave in every layer", ge=1)
    min_kv_heads: int = setting(1, "Heads", "key/value heads to leave in every layer", ge=1)
    protect: Annotated[tuple[int, ...], BeforeValidator(layer_numbers)] = setting(
        (), "Heads", "layers to leave alone, such as 0,1,-1 (-1 is the last)"
    )
    protect_first: int = setting(
        0, "Heads", "first layers to leave alone, beside --protect", ge=0, le=1024
    )
    protect_last: int = setting(0, "Heads", "last layers to leave alone", ge=0, le=1024)
    per_layer: bool = setting(
        False,
        "Heads",
        "with structural: another number from each layer. Only this engine loads it.",
    )
    allow_shortfall: bool = setting(False, "Heads", "prune fewer where the rules allow no more")
    calibration_rows: int = setting(
        256,
        "Heads",
        "the first rows of --data, which are measured and repaired on; fewer take less time, and "
        "repairs fit them too well",
        ge=1,
    )
    repair: RepairMethod | None = setting(
        None,
        "Repair",
        "least-squares: update what is left to give on --data what the whole layer gave; by "
        "default where there is --data",
    )
    repair_ridge: float = setting(
        DEFAULT_RIDGE,
        "Repair",
        "how strongly a repair draws towards the weights as they were: a share of the mean square "
        "of what they read",
        ge=0,
        le=1e6,
    )


class PruneSettings(HeadChoice, Machine):
    """Everything that decides which heads are pruned; `protect` counts from the end below 0.

    With `per_layer` a structural cut may take another number out of each layer; no other program
    loads what is written then.

    `data`, `query`, `calibration_rows`, `max_length`, `device` and `compute_dtype` are of the
    metrics that run the model; with `quantize` the values are scored that a model quantised so
    computes with. `dtype` is what is written.
    """

    mode: PruneMode | None = setting(
        None,
        "Heads",
        "zero: same shapes, zeros; mask: whole weights and a mask next to them; structural: "
        "smaller weights, the same in every layer. By default zero for heads, structural for "
        "channels and layers",
    )
    heads: HeadKind = setting(
        "attention", "Heads", "those of attention, or of DeltaNet layers, by their own rules"
    )
    data: DataNames = setting((), "Heads", "calibration rows (JSONL or JSON)", repeat=True)
    query: str | None = setting(
        None, "Heads", "SQL query whose rows are read, where --data is the URL of a database"
    )
    max_length: int = setting(512, "Heads", "longest calibration row in tokens", ge=8)
    seed: int = setting(0, "Heads", "of the metric random", ge=0)
    compute_dtype: Annotated[ComputeType, spelled(DTYPES)] = setting(
        "auto", "Machine", "compute type of the metrics that run the model"
    )
    dtype: Annotated[StoredType | None, spelled(DTYPES)] = setting(  # type: ignore[assignment]
        None,
        "Output",
        "type of all tensors; by default each keeps its own, or bfloat16 for all where a GGUF file "
        "stores them quantised",
    )
    max_shard_size: Annotated[int, BeforeValidator(shard_size)] = setting(
        MAX_SHARD_SIZE, "Output", "largest file, in GB (10^9 bytes) or with a unit", ge=1000
    )

    def __init__(self, /, **values: Any) -> None:
        """Takes each setting in any of its spellings, so not as its declared type only."""
        super().__init__(**values)

    @property
    def importance(self) -> Metric:
        """The metric, chosen by whether there are calibration rows where none was named."""
        if self.metric is None and self.what == "experts":
            return "routed-mass"
        return self.metric or ("l2-reconstruction" if self.data else "l2-weights")

    @property
    def form(self) -> PruneMode:
        """The mode, chosen by what is pruned where none was named."""
        return self.mode or ("zero" if self.prunes_heads and not self.target else "structural")

    @property
    def parts(self) -> tuple[Prunable, ...]:
        """The parts of the model that are pruned."""
        named = self.what.split(",")
        return tuple(part for part in PRUNABLES if part in named)

    @property
    def share(self) -> float:
        """The fraction of a job that has one."""
        assert self.fraction is not None
        return self.fraction

    @property
    def prunes_heads(self) -> bool:
        """Whether heads go, alone or in groups."""
        return self.what in ("heads", "kv-groups")

    @property
    def grouping(self) -> Granularity:
        """What of the heads goes as a whole."""
        return "kv-group" if self.what == "kv-groups" else self.granularity

    @property
    def ranking(self) -> Scope:
        """How heads of different layers are compared."""
        by_metric: dict[Metric, Scope] = {
            "l2-reconstruction": "sensitivity", "l2-weights-largest": "layer"
        }  # fmt: skip
        return self.scope or by_metric.get(self.importance, "global")

    @property
    def measures_layers(self) -> bool:
        """Whether layers are compared by what the model misses; not where all give up the same."""
        return self.ranking == "sensitivity" and (self.form != "structural" or self.per_layer)

    @property
    def repairs(self) -> bool:
        """Whether what is left is to be updated."""
        return self.repair == "least-squares" or (self.repair is None and bool(self.data))

    @model_validator(mode="after")
    def _fits_what_is_pruned(self) -> Self:
        for part in self.parts:
            known = METRICS_OF[part]
            if self.metric is not None and self.metric not in known:
                raise ValueError(
                    f"--metric {self.metric} does not rank {part}; expected one of "
                    f"{', '.join(known)}"
                )
        if not self.prunes_heads and self.form != "structural":
            raise ValueError(
                f"--what {self.what} makes smaller weights: leave out --mode {self.mode}, or "
                "prune heads"
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.fraction is None) == (self.target is None):
            raise ValueError(
                "give --fraction, a share of the heads, channels, layers or experts, or --target, "
                "a share of the whole model's parameters or time: one of them"
            )
        if len(self.parts) > 1 and self.target is None:
            raise ValueError(
                f"--what {self.what} shares one budget: give --target params=0.8, or one part"
            )
        if self.target is not None and (self.form != "structural" or self.per_layer):
            raise ValueError(
                "--target makes a smaller model that every program loads: leave out --per-layer "
                f"and --mode {self.form}"
            )
        if {"heads", "kv-groups"} <= {*self.parts}:
            raise ValueError("--what takes heads or kv-groups, which are heads too: one of them")
        return self

    @model_validator(mode="after")
    def _per_layer_is_structural(self) -> Self:
        if self.target is not None and self.heads != "attention":
            raise ValueError("--target takes heads of attention: leave out --heads delta")
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
    baseline_seeds: int = setting(
        1,
        "Job",
        "with a baseline: train it with so many seeds, to tell what chance does to a training",
        ge=1,
        le=100,
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
    gates: Path | None = setting(
        None,
        "Data",
        "gates file (YAML), as for engine eval: every model answers the held-out rows, too, and "
        "its answers are checked",
    )


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
    data: DataNames = setting((), "Data", "rows to train on", repeat=True)
    eval_data: DataNames = setting((), "Data", "rows held out", repeat=True)
    mode: Literal["zero", "structural"] | None = setting(
        None,
        "Heads",
        "zero: same shapes; structural: smaller weights, the default for channels and layers",
    )
    resume: bool = setting(False, "Job", "go on with a job")

    @model_validator(mode="after")
    def _one_source_of_rows(self) -> Self:
        if (self.domain is None) == (not self.data):
            raise ValueError("give rows with --data, or a data set with --domain: one of them")
        return self

    def settings(self, training: TrainConfig) -> ForgeSettings:
        """The job with its fine-tuning, whose seed, length and machine are the pruning's too."""
        chosen = {name: getattr(self, name) for name in (*HeadChoice.model_fields, "mode")}
        same = {name: getattr(training, name) for name in ("seed", "max_length", "device")}
        same["compute_dtype"] = training.dtype
        own = {name: getattr(self, name) for name in ForgeCycles.model_fields}
        return ForgeSettings(**own, training=training, pruning=PruneSettings(**chosen, **same))
