"""The settings of a run, read back from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.explain import Setting
from engine.config.sources import TRAIN, build, read_file
from engine.config.train_config import VERBS, TrainConfig
from engine.errors import ConfigError
from engine.runs.output import CHECKPOINT
from engine.storage.home import expanded, real
from engine.storage.safe_files import json_object_or_empty

CONFIG = "config.yaml"
_PATHS = ("model", "teacher", "init_adapter", "add_tokens", "data", "eval_data", "sample_prompts")
# Where the run is, whatever its settings say: its directory may have been moved or copied.
_OF_THE_DIRECTORY = (*VERBS, "output_dir")


def resumed(given: Mapping[str, Setting]) -> dict[str, Setting]:
    """What was given, with a run's own settings beneath it where `resume` names that run.

    `resume` may be a run directory, a checkpoint in one, or `auto` beside an output directory. What
    is given wins, and stays to be compared with the run. Raises `ConfigError`.
    """
    asked = given.get("resume")
    if asked is None or asked.value in (None, False, "false"):
        return dict(given)
    named = str(expanded(str(asked.value)))
    run, choice = _run_of(named, given)
    if run is None or not (run / CONFIG).is_file():
        _refuse_what_is_no_run(named, run)
        return dict(given)
    output = given.get("output_dir")
    if output is not None and real(expanded(str(output.value))) != real(run):
        raise ConfigError(
            f"{asked.source} goes on with the run in {run}, and {output.source} names "
            f"{output.value}: a run goes on in its own directory. Leave out --output-dir, or start "
            "a new run from its result with --init-adapter."
        )
    own = read_settings(run)
    if "max_steps" not in given and "epochs" in given:
        own.pop("max_steps", None)  # someone who asks for three epochs means all of them
    directory = {"output_dir": Setting(str(run), asked.source)}
    return own | dict(given) | directory | {"resume": Setting(choice, asked.source)}


def read_settings(run: Path) -> dict[str, Setting]:
    """The settings of the run in `run`, without verbs; paths are those that still lead there."""
    own = read_file(run / CONFIG, TRAIN)
    started = json_object_or_empty(run / "manifest.json").get("directory")
    base = Path(started) if isinstance(started, str) else None
    return {
        name: _still_there(setting, base) if name in _PATHS else setting
        for name, setting in own.items()
        if name not in _OF_THE_DIRECTORY
    }


def resume_config(run: Path | str, **changes: Any) -> TrainConfig:
    """The settings that go on with the run in `run`, with `changes`. Raises `ConfigError`."""
    given = {"resume": Setting(str(run), "resume")}
    given |= {name: Setting(value, name) for name, value in changes.items()}
    return build(TrainConfig, resumed(given))


def _run_of(asked: str, given: Mapping[str, Setting]) -> tuple[Path | None, str]:
    """The directory of the run to go on with, and from which checkpoint."""
    if asked in ("auto", "True", "true"):
        output = given.get("output_dir")
        return (expanded(str(output.value)) if output is not None else None), "auto"
    path = Path(asked)
    if not path.exists() and (Path("runs") / asked).is_dir():
        path = Path("runs") / asked
    if CHECKPOINT.fullmatch(real(path).name):
        return real(path).parent if path.is_absolute() else path.parent, asked
    return path, "auto"


def _refuse_what_is_no_run(asked: str, run: Path | None) -> None:
    if asked in ("auto", "True", "true") or (run is not None and Path(asked) != run):
        return
    what = "holds no run" if Path(asked).is_dir() else "does not exist"
    if (Path(asked).parent / CONFIG).is_file() and Path(asked).exists():
        raise ConfigError(
            f"{asked} is a part of a run. Go on with the run itself: engine resume "
            f"{Path(asked).parent}"
        )
    runs = sorted(path.parent.name for path in Path("runs").glob(f"*/{CONFIG}"))
    expected = f"expected a run directory with its {CONFIG}, or a checkpoint in one"
    listed = f" Runs under runs/: {', '.join(runs[-8:])}." if runs else ""
    raise ConfigError(f"{asked} {what}: {expected}.{listed}")


def _still_there(setting: Setting, base: Path | None) -> Setting:
    """A relative path is taken from where the run was started, if it is not here."""
    if base is None or setting.value is None:
        return setting
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    paths = [_from(base, str(value)) for value in values]
    return Setting(paths if isinstance(setting.value, list) else paths[0], setting.source)


def _from(base: Path, value: str) -> str:
    lost = not Path(value).exists() and (base / value).exists()
    return str(base / value) if lost else value
