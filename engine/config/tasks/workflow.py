"""Settings of plan, bench, status, doctor, data, and train's options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, model_validator

from engine.config.choices import GPU_TFLOPS, PipelineEvents, PretrainedMethod, Program
from engine.config.data_names import ColumnMap, DataNames
from engine.config.numbers import MOST_SECONDS
from engine.config.row_settings import RowSettings
from engine.config.settings import Settings, setting
from engine.config.spelling import (
    DEVICE,
    DEVICES,
    json_object,
    numbers,
    size_in_bytes,
    spelled,
)
from engine.config.tasks.inference import Paths


class TrainOptions(Settings):
    """What `engine train` does with its `TrainConfig`."""

    dry_run: bool = setting(False, "Run", "show the resolved run and the first rows, then end")
    lr_find: bool = setting(
        False,
        "Learning rate finder",
        "train a few steps at rates that grow, suggest one for --learning-rate from their losses "
        "(lr_find.json and lr_find.png in the output directory), then end; nothing is saved",
    )
    lr_find_steps: int = setting(100, "Learning rate finder", "steps of it", ge=20, le=100_000)
    lr_find_min: float = setting(1e-6, "Learning rate finder", "its first rate", gt=0, le=10)
    lr_find_max: float = setting(1.0, "Learning rate finder", "its last rate", gt=0, le=10)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        changed = [name for name in self.model_fields_set if name.startswith("lr_find_")]
        if changed and not self.lr_find:
            raise ValueError(f"{changed[0]} is of --lr-find, which is not given; add it")
        if self.lr_find and self.dry_run:
            raise ValueError("dry_run trains nothing and lr_find trains a few steps; give one")
        if self.lr_find_min >= self.lr_find_max:
            raise ValueError("lr_find_min should be less than lr_find_max")
        return self


class ResumeSettings(Settings):
    """Which run `engine resume` goes on with."""

    run: str = setting(
        ..., "Run", "run directory, a run's name under runs/, or a checkpoint: engine resume RUN"
    )


class PlanSettings(Settings):
    """What `engine plan` shows of a `TrainConfig`."""

    renamed: ClassVar[Mapping[str, str]] = {"card": "gpu"}

    max_context: bool = setting(False, "Plan", "the longest row for GPUs of 6 to 141 GB")
    gpu: str | None = setting(
        None, "Plan", f"for the time: {', '.join(GPU_TFLOPS)}, or its TFLOP/s as a number"
    )
    sizes: bool = setting(False, "Plan", "the models known by name, and their parameters")
    gpus: Annotated[str, BeforeValidator(str)] = setting(
        "1",
        "Plan",
        "GPUs of each machine, with their memory to compare how a run can use them: 8x80GiB; a "
        "number alone plans for one of so many processes",
        pattern=r"^\s*[1-9][0-9]{0,3}\s*([xX]\s*[0-9].*)?$",
        expected="a number of GPUs, or a number and a size such as 8x80GiB",
    )
    link: str = setting(
        "pcie4", "Plan", "between the GPUs of a machine: pcie3 to pcie5, nvlink3 to nvlink5"
    )
    machines: int = setting(1, "Plan", "machines with such GPUs", ge=1, le=10_000)
    network: str = setting(
        "100Gbit", "Plan", "of each machine: its rate such as 100Gbit, or ethernet100, infiniband"
    )


class InitSettings(Settings):
    """`engine init`."""

    model: str = setting(..., "Init", "Hugging Face directory, hub id or .gguf file", min_length=1)
    data: DataNames = setting(..., "Init", "rows to train on", repeat=True, min_length=1)
    query: str | None = setting(
        None, "Init", "SQL query whose rows are read, where --data is the URL of a database"
    )
    map: ColumnMap = setting(
        {}, "Init", "columns by the fields they are: prompt=question,response=answer"
    )
    memory: Annotated[int | None, BeforeValidator(size_in_bytes)] = setting(
        None, "Init", "memory of the GPU to train on, such as 12GiB; by default this machine's"
    )
    method: Annotated[PretrainedMethod, spelled({})] = setting(
        "qlora", "Init", "NF4 base with LoRA, 16-bit base with LoRA, or every weight"
    )
    output: Path = setting(Path("train.yaml"), "Init", "new file for the settings")
    output_dir: Path = setting(Path("runs/first"), "Init", "where the run will go")


class ImportSettings(Settings):
    """`engine import-config`."""

    file: Path = setting(..., "Import", "configuration of another training program (YAML)")
    program: Program | None = setting(
        None, "Import", "whose configuration it is; by default its keys tell"
    )
    output: Path | None = setting(
        None, "Import", "new file for the settings; by default they are printed"
    )


class BenchSettings(Settings):
    """`engine bench`."""

    ops: Paths = setting((), "Measurement", "ops to measure; all by default", repeat=True)
    model: Paths = setting(
        (),
        "Measurement",
        "whose shapes: names that `engine plan --sizes` lists, model directories or .gguf files; "
        "by default llama-3.1-8b, qwen3-8b, qwen3-4b and llama-3.3-70b, on a CPU smollm2-135m",
        repeat=True,
    )
    tokens: Annotated[tuple[int, ...], BeforeValidator(numbers)] = setting(
        (), "Measurement", "tokens at once, or several numbers with commas between them"
    )
    device: str = setting(
        "auto", "Measurement", "auto, cpu or cuda", pattern=DEVICE, expected=DEVICES
    )
    budget: float = setting(
        0.2, "Measurement", "seconds to spend on one timing", ge=0, le=MOST_SECONDS
    )
    compile: bool = setting(False, "Measurement", "also time torch.compile of the plain form")
    against: Paths = setting(
        (),
        "Measurement",
        "also time the ops of a module or .py file with `baselines(op, work)`: bench.peers is "
        "bitsandbytes' and Liger's, where they are installed",
        repeat=True,
    )
    compare: Paths = setting(
        (),
        "Comparison",
        "two results, A B, folders or ops.json: their times side by side, measuring nothing",
        repeat=True,
    )
    csv: bool = setting(False, "Output", "print rows with commas between the values instead")
    output: Path | None = setting(
        None, "Output", "new folder for ops.json, ops.csv and roofline.png"
    )


class PipelineSettings(Settings):
    """`engine pipeline`."""

    file: str = setting(..., "Pipeline", "YAML file of stages: engine pipeline FILE")
    output_dir: Path | None = setting(
        None, "Pipeline", "the pipeline's directory, in place of the file's own"
    )
    set: Paths = setting((), "Pipeline", "name=value of one of the file's variables", repeat=True)
    again: str | None = setting(
        None, "Pipeline", "do this stage anew, and those after it, whatever is there"
    )
    events: Annotated[PipelineEvents, spelled({})] = setting(
        "text", "Pipeline", "what standard output has: the verbs' own text, or events as JSON Lines"
    )


class StatusSettings(Settings):
    """`engine status`."""

    run: str = setting("", "Run", "run directory, or a run's name under runs/; else the newest")
    tail: int = setting(0, "Run", "also show the log's last lines", ge=0)


class BoardSettings(Settings):
    """`engine board`."""

    runs: Paths = setting(
        ("runs",), "Board", "run directories, or folders of them; by default runs/", repeat=True
    )
    port: int = setting(
        8765, "Board", "port on 127.0.0.1; 0 takes any that is free", ge=0, le=65535
    )


class DoctorSettings(Settings):
    """`engine doctor`."""

    gpu: bool = setting(
        False,
        "Checks",
        "check every kernel and mechanism on the GPU, in about a minute, and measure its rates",
    )
    interpret: bool = setting(
        False, "Checks", "the same checks in Triton's interpreter, on the CPU, in some minutes"
    )
    only: Paths = setting((), "Checks", "only these checks, by name", repeat=True)
    distributed: bool = setting(
        False,
        "Checks",
        "check the processes that torchrun started, or --gpus: versions, devices, link, clocks",
    )
    gpus: int = setting(1, "Checks", "with --distributed: processes to start here", ge=1, le=1024)
    ddp_timeout: int = setting(
        60, "Checks", "with --distributed: seconds to wait for the others", ge=10, le=86_400
    )
    device: str = setting(
        "auto", "Checks", "which GPU: auto, cpu or cuda:N", pattern=DEVICE, expected=DEVICES
    )
    seconds: float = setting(600.0, "Checks", "time for all checks together", gt=0, le=MOST_SECONDS)


class DataSettings(RowSettings):
    """`engine data stats`, and what the other verbs on data share."""

    data: DataNames = setting(
        (), "Data", "rows: files, folders, databases, hub ids, or -", repeat=True
    )
    model: str | None = setting(None, "Data", "also render and tokenise as for this model")
    max_length: int = setting(2048, "Data", "longest example in tokens", ge=2)
    category: Paths = setting((), "Data", "only rows of this category", repeat=True)
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Data", 'further variables of the chat template: {"enable_thinking": false}'
    )


class ValidateSettings(DataSettings):
    """`engine data validate`."""

    strict: bool = setting(
        False, "Data", "fail where anything of a row is not used: keys, reasoning, tools, length"
    )
    output: Path | None = setting(
        None, "Output", "file for the good rows: .jsonl, .jsonl.gz or .parquet"
    )
    quarantine: Path | None = setting(
        None,
        "Output",
        "file for the bad rows with their reasons; they are skipped then",
    )
    report: Path | None = setting(None, "Output", "file for the figures (.json)")
    overwrite: bool = setting(False, "Output", "replace files that exist")


class StatsSettings(DataSettings):
    """`engine data stats`."""

    plot: Path | None = setting(None, "Output", "picture of the lengths (.png)")


class PreviewSettings(DataSettings):
    """`engine data preview`."""

    row: int = setting(1, "Data", "the first row to show, counted from 1", ge=1)
    count: int = setting(1, "Data", "rows to show", ge=1)


class DocstringSettings(Settings):
    """`engine data docstrings`."""

    output_dir: Path = setting(..., "Data", "where train.jsonl and heldout.jsonl go")
    limit: int | None = setting(None, "Data", "most rows of both together", ge=2)
    heldout_fraction: float = setting(0.15, "Data", "share of modules to hold out", ge=0, le=0.9)
