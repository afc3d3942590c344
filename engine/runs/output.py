"""Check the output directory of a run before writing to it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, ConfigError, gib
from engine.storage import durable
from engine.storage.home import real
from engine.storage.standing import nearest_folder, try_to_write

RECORDS = (
    "config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl",
    "pipeline.log",
)  # fmt: skip
"""The files that a run writes beside its results."""
RESULTS = ("adapter", "model")
CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})", re.ASCII)
WAITING, MOVING = ".waiting-run", ".moving-run"
"""Where an earlier run waits until the new one has a checkpoint (`engine.runs.earlier`)."""
_SET_ASIDE = re.compile(r"\.(bad|old)-checkpoint-.*")
WITHOUT_EMA = "-without-ema"
"""Ending of the folder of a run's last weights, where its result is their moving average."""
TWO_RESULTS = "%s has the averaged weights, %s those of the last step"
"""What is told where a run leaves both."""
_BESIDE = tuple(f"{name}{WITHOUT_EMA}" for name in RESULTS)
_DRAWN = ("loss.png", "tensorboard", "wandb")
_MARGIN = 64 << 20


def name_run(config: TrainConfig, now: float | None = None) -> TrainConfig:
    """`config` with `run_id` and `output_dir` filled in: time and model, and `runs/<run_id>`.

    Where `resume` names a run directory, that one goes on, from its newest checkpoint.
    """
    if config.resume not in (None, "auto") and config.output_dir is None:
        asked = Path(str(config.resume))
        if CHECKPOINT.fullmatch(real(asked).name):
            config = config.model_copy(update={"output_dir": real(asked).parent})
        elif asked.is_dir():
            config = config.model_copy(update={"output_dir": asked, "resume": "auto"})
    run_id = config.run_id
    if run_id is None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        model = Path(config.model).name or "model"
        safe = "".join(sign if sign.isalnum() or sign in "._+-" else "-" for sign in model)
        run_id = f"{stamp}-{safe[:48]}"
    output = config.output_dir if config.output_dir is not None else Path("runs") / run_id
    return config.model_copy(update={"run_id": run_id, "output_dir": output})


def run_files(root: Path) -> list[Path]:
    """Everything in `root` that belongs to the run there."""
    entries = root.iterdir() if root.is_dir() else iter(())
    names = {*RECORDS, *RESULTS, *_BESIDE, *_DRAWN}
    return sorted(
        entry
        for entry in entries
        if entry.name in names or CHECKPOINT.fullmatch(entry.name) or _SET_ASIDE.match(entry.name)
    )


def results_of(root: Path) -> list[str]:
    """The names of what an earlier run reached in `root`: checkpoints, adapter, model."""
    files = [path for folder in ("", WAITING, MOVING) for path in run_files(root / folder)]
    names = {path.name for path in files if path.name in RESULTS or "checkpoint-" in path.name}
    return sorted(names, key=lambda name: (len(name), name))


def check_output(config: TrainConfig, checkpoint: int = 0) -> None:
    """Check that the run directory can be made and written to, with space for one checkpoint.

    `checkpoint` is its size in bytes. Nothing is left on the disk. Raises `ConfigError`, and
    `CheckpointError` for a full disk.
    """
    target = name_run(config).output_dir
    assert target is not None
    require_writable(target)
    if checkpoint:
        require_space(target, checkpoint)


def require_writable(target: Path) -> None:
    """Raise `ConfigError` unless a directory can be made and written to. Leaves nothing there."""
    try:
        try_to_write(target)
    except OSError as error:
        raise unwritable(target, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The error for a run directory that the system refuses."""
    return ConfigError(
        f"The run directory {path} cannot be written to: {durable.describe(error)}. "
        "Choose another with --output-dir."
    )


def require_space(folder: Path, checkpoint: int) -> None:
    """Raise `CheckpointError` unless the disk has space for a checkpoint of so many bytes."""
    need = int(1.05 * checkpoint) + _MARGIN
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < need:
        raise CheckpointError(
            f"The disk of {folder} has {gib(free)} free and a checkpoint needs "
            f"{gib(need)}. Free some space, or name an --output-dir on another disk."
        )


def check_earlier(config: TrainConfig) -> None:
    """Refuse to start where something stands that the run would write over. Only reads.

    That is an earlier run which `config` neither resumes nor overwrites, a file of somebody else
    under the name of a record, and whatever the new run is to read. Raises `ConfigError`.
    """
    target = name_run(config).output_dir
    assert target is not None
    _refuse_own_inputs(config, target)
    foreign = [name for name in (*RECORDS, *RESULTS) if (target / name).exists()]
    if foreign and not is_run(target):
        raise ConfigError(
            f"{target} holds {', '.join(foreign)}, which no run made, and a run would write over "
            "it. Choose another --output-dir."
        )
    if config.resume is not None or config.overwrite:
        return
    results = results_of(target)
    if results:
        raise ConfigError(
            f"{target} holds an earlier run ({', '.join(results)}). Go on with it by `engine "
            f"resume {target}` (or --resume auto), replace it with --overwrite, or choose another "
            "--output-dir."
        )


def is_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`; a model that another verb wrote has a summary too."""
    marks = [".lock", "manifest.json", WAITING, MOVING]
    if not (folder / "config.json").exists():
        marks.append("summary.json")
    return any((folder / name).exists() for name in marks)


_OF_FILES = ("--add-tokens", "--data", "--eval-data", "--sample-prompts")


def _refuse_own_inputs(config: TrainConfig, target: Path) -> None:
    named: dict[str, Iterable[str | Path | None]] = {
        "--model": [config.model],
        "--tokenizer": [config.tokenizer],
        "--teacher": [config.teacher],
        "--init-adapter": [config.init_adapter],
        "--add-tokens": [config.add_tokens],
        "--data": config.data,
        "--eval-data": config.eval_data,
        "--sample-prompts": [config.sample_prompts],
    }
    written = [real(path) for path in run_files(target)]
    written += [real(target / name) for name in (*RECORDS, *RESULTS)]
    for option, values in named.items():
        for value in values:
            if value is None or not Path(value).exists():
                continue
            given = real(value)
            if option not in _OF_FILES and given == real(target):
                raise ConfigError(
                    f"{option} and --output-dir both name {target}: a run would write its adapter, "
                    "checkpoints and records among the files of that folder. Choose another "
                    "--output-dir, such as runs/first."
                )
            if any(given.is_relative_to(path) for path in written):
                raise ConfigError(
                    f"{option} {value} is a part of the run in {target}, which this run would "
                    "replace while it reads it. Choose another --output-dir."
                )
