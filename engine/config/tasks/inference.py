"""Settings of eval, generate and merge, which run one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from engine.config.choices import (
    DETERMINISTIC,
    AnswerObjective,
    ComputeType,
    GGUFType,
    HeadPrecision,
    Quantization,
)
from engine.config.data_names import DataNames
from engine.config.given_adapters import Adapters
from engine.config.numbers import or_most
from engine.config.publishing import Publishing
from engine.config.recipes.preference import OBJECTIVE_NAMES, WITH_REFERENCE
from engine.config.row_settings import RowSettings
from engine.config.settings import Settings, setting
from engine.config.spelling import (
    DEVICE,
    DEVICES,
    DTYPES,
    PRECISIONS,
    ChunkTokens,
    as_text,
    comma_list,
    iso_date,
    json_object,
    none_is_unset,
    one_or_many,
    shard_size,
    spelled,
)

TokenId = Annotated[int, Field(ge=0)]
Paths = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


class Machine(Settings):
    """Where a model runs and how its weights are stored."""

    quantize: Annotated[Quantization | None, BeforeValidator(none_is_unset)] = setting(
        None, "Machine", "quantise the model's weights as they load: nf4 or int8"
    )
    device: str = setting("auto", "Machine", "auto, cpu or cuda", pattern=DEVICE, expected=DEVICES)
    dtype: Annotated[ComputeType, spelled(DTYPES)] = setting("auto", "Machine", "compute type")


class OneModel(Machine):
    """A model to load, with or without an adapter."""

    renamed: ClassVar[Mapping[str, str]] = {"template_kwargs": "chat_template_kwargs"}

    model: Annotated[str, BeforeValidator(as_text)] = setting(
        ..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1
    )
    adapter: Adapters = setting(
        (),
        "Model",
        "adapter to put on the model; PATH=0.5 weighs it, and several are added up",
        repeat=True,
    )
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Model", 'further variables of the chat template: {"enable_thinking": false}'
    )
    deterministic: bool = setting(False, "Machine", DETERMINISTIC)


class EvalSettings(OneModel, RowSettings):
    """`engine eval`."""

    data: DataNames = setting(
        (), "Data", "rows: files, folders, databases, hub ids, or -; or else --tasks", repeat=True
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(comma_list)] = setting(
        (), "Harness", "tasks of the LM Evaluation Harness, with commas between them, not --data"
    )
    include_path: Annotated[tuple[Path, ...], BeforeValidator(one_or_many)] = setting(
        (), "Harness", "folder with tasks of your own", repeat=True
    )
    num_fewshot: int | None = setting(
        None, "Harness", "solved examples before each question; by default the task's own", ge=0
    )
    limit: int | None = setting(None, "Harness", "only the first N questions of each task", ge=1)
    apply_chat_template: bool = setting(
        False, "Harness", "ask every question through the model's chat template"
    )
    batch_size: int | None = setting(
        None, "Data", "rows at a time; bounds memory, not the result", ge=1
    )
    max_length: int = setting(2048, "Data", "longest example in tokens", ge=8)
    category: str | None = setting(None, "Data", "only rows of this category")
    limit_rows: int | None = setting(None, "Data", "only the first N rows", ge=1)
    heldout: float = setting(
        0.0,
        "Data",
        "only the rows that `engine train --heldout` would hold out",
        ge=0,
        lt=1,
    )
    seed: int = setting(42, "Data", "of the choice of held-out rows", ge=0, lt=1 << 63)
    system_prompt: str | None = setting(
        None, "Data", "system message put before rows that have none"
    )
    template_date: Annotated[str | None, BeforeValidator(iso_date)] = setting(
        None, "Data", "what the chat template takes for the present, such as 2026-01-31"
    )
    double_quant: bool = setting(True, "Machine", "quantise the NF4 scales again")
    head_precision: Annotated[HeadPrecision, spelled(PRECISIONS)] = setting(
        "16bit", "Machine", "output head: the compute type, or 8-bit rows"
    )
    loss_chunk_tokens: ChunkTokens = setting(
        "auto", "Machine", "evaluated tokens per chunk of the loss; auto as in training"
    )
    mlp_tile_tokens: int | None = setting(
        None, "Machine", "tokens at a time in the feed-forward part", ge=16, le=1 << 20
    )
    objective: Annotated[AnswerObjective, spelled(OBJECTIVE_NAMES)] = setting(
        "sft",
        "Preferences",
        "sft: the perplexity of the rows; else rows are preferences, and their rewards, accuracy "
        "and loss are this objective's",
    )
    beta: float | None = setting(
        None, "Preferences", "as in training; by default 0.1, of simpo 2", gt=0, le=1000
    )
    reference: str | None = setting(
        None,
        "Preferences",
        "dpo, ipo, kto: the model that answers are measured against; by default the model without "
        "its adapter",
    )
    gates: Path | None = setting(
        None, "Gates", "YAML file of limits that the model's answers and perplexity have to meet"
    )
    strict: bool = setting(
        False, "Gates", "end with status 3 if a gate fails; ENGINE_EVAL_STRICT=1 says the same"
    )
    output_dir: Path | None = setting(
        None, "Gates", "where results go: by default the adapter's run, else this folder"
    )

    @model_validator(mode="after")
    def _rows_or_tasks(self) -> Self:
        """Rows have a perplexity, tasks have scores; settings of one mean nothing to the other."""
        if bool(self.data) == bool(self.tasks):
            raise ValueError("give either `data`, for a perplexity, or `tasks` of the harness")
        of_rows = {"category", "limit_rows", "heldout", *RowSettings.model_fields}
        of_rows |= {"loss_chunk_tokens", "mlp_tile_tokens", "gates", "strict", "output_dir"}
        of_rows |= {"objective", "beta", "reference"}
        of_tasks = {"include_path", "num_fewshot", "limit", "apply_chat_template"}
        idle = sorted((of_rows if self.tasks else of_tasks) & self.model_fields_set)
        if idle:
            asked = "tasks" if self.tasks else "data"
            raise ValueError(f"{', '.join(idle)}: no setting of an evaluation by `{asked}`")
        if self.objective == "sft" and (self.beta is not None or self.reference is not None):
            raise ValueError("beta and reference are of preferences: give objective too")
        if self.reference is not None and self.objective not in WITH_REFERENCE:
            raise ValueError(f"objective {self.objective} has no reference; leave reference out")
        if self.objective != "sft" and self.gates is not None:
            raise ValueError("gates judge perplexity and answers, not preferences")
        return self


class Sampling(Settings):
    """How the next token is drawn. `temperature` 0 takes the most likely one.

    `engine.inference.processors` has what each setting does, in the order of transformers. Biases
    and penalties, bad words and the least length hold at temperature 0 too.
    """

    temperature: float = setting(0.0, "Sampling", "0 takes the likeliest token", ge=0)
    top_p: float = setting(1.0, "Sampling", "the likeliest tokens of this mass", gt=0, le=1)
    top_k: Annotated[int, BeforeValidator(or_most)] = setting(
        0, "Sampling", "only the k likeliest; 0 is all", ge=0
    )
    min_p: float = setting(
        0.0, "Sampling", "only tokens at least this share as likely as the likeliest", ge=0, le=1
    )
    typical_p: float = setting(
        1.0, "Sampling", "tokens of this mass whose information is typical", gt=0, le=1
    )
    repetition_penalty: float = setting(1.0, "Sampling", "1 is none", gt=0)
    presence_penalty: float = setting(
        0.0, "Sampling", "off the score of every token in the answer", ge=-2, le=2
    )
    frequency_penalty: float = setting(
        0.0, "Sampling", "off a token's score each time it is in the answer", ge=-2, le=2
    )
    no_repeat_ngram_size: int = setting(
        0, "Sampling", "no run of this many tokens comes twice; 0 is off", ge=0
    )
    min_new_tokens: int = setting(0, "Sampling", "no stop token before this many", ge=0)
    logit_bias: Annotated[dict[TokenId, float], BeforeValidator(json_object)] = setting(
        {}, "Sampling", 'added to the scores of token ids: {"17": -100}'
    )
    bad_words_ids: Annotated[
        tuple[Annotated[tuple[TokenId, ...], Field(min_length=1)], ...],
        FailFast(),
        BeforeValidator(json_object),
    ] = setting((), "Sampling", "runs of token ids that never come: [[17], [4, 8]]")
    seed: int = setting(0, "Sampling", "of the drawing", ge=-(2**63), lt=2**64)


class GenerateSettings(Sampling, OneModel):
    """`engine generate`. Sampling that is not given is that of generation_config.json, if any."""

    prompt: str | None = setting(None, "Text", "what to answer; - reads standard input")
    data: Path | None = setting(
        None, "Text", "file of rows to answer, each a text or with `prompt` or `messages`"
    )
    output: Path | None = setting(
        None, "Text", "JSONL file of answers to --data; goes on where a stopped one ended"
    )
    num_samples: int = setting(
        1, "Text", "answers to each prompt, of different seeds", ge=1, le=100_000
    )
    system: str | None = setting(None, "Text", "system message")
    raw: bool = setting(False, "Text", "go on from the prompt, without the chat template")
    max_new_tokens: int = setting(128, "Text", "longest answer", ge=1)
    stop: Paths = setting((), "Text", "end before this text", repeat=True)
    slots: int = setting(8, "Machine", "prompts that are answered at a time", ge=1)
    cache_tokens: int | None = setting(
        None, "Machine", "tokens of keys and values in memory; None is as many as come", ge=64
    )
    keep_decoded: bool = setting(
        False, "Machine", "decode quantised weights once, and keep them beside their codes"
    )


class ExportGGUFSettings(Publishing):
    """`engine export gguf`."""

    model: str = setting(..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1)
    adapter: Path | None = setting(
        None, "Model", "write this adapter, to be put on the model's own GGUF file"
    )
    random_weights: bool = setting(
        False,
        "Model",
        "to measure memory and time: random weights in the shape of --model, a folder with "
        "config.json or a size by name, such as Qwen/Qwen3-8B",
    )
    output: Path = setting(..., "Output", "new .gguf file")
    type: Annotated[GGUFType, spelled({})] = setting(
        "f16", "Output", "format of most matrices of a model"
    )
    calibration: DataNames = setting(
        (),
        "Calibration",
        "rows that tell which inputs of a weight matter, for the types in blocks; reads the model",
        repeat=True,
    )
    query: str | None = setting(
        None,
        "Calibration",
        "SQL query whose rows are read, where that is the URL of a database",
    )
    calibration_rows: int = setting(128, "Calibration", "only the first N rows", ge=1)
    device: str = setting(
        "auto", "Calibration", "auto, cpu or cuda", pattern=DEVICE, expected=DEVICES
    )
    max_file_size: Annotated[int, BeforeValidator(shard_size)] = setting(
        0, "Output", "divide the model into files of this size, in GB or with a unit", ge=0
    )
    modelfile: bool = setting(False, "Output", "also write an Ollama Modelfile beside the model")


class ExportAdapterSettings(Publishing):
    """`engine export adapter`."""

    adapter: Path = setting(..., "Model", "adapter to write anew")
    portable: bool = setting(
        True,
        "Output",
        "one rank and the scale in B, so that every program computes the same; otherwise ranks and "
        "scales as PEFT has them",
    )
    output: Path = setting(..., "Output", "new directory for the adapter")
