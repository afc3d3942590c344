"""Run tasks of the LM Evaluation Harness: engine eval --tasks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config.tasks.inference import EvalSettings
from engine.errors import ConfigError, EngineError, listing

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from engine.harness.language_model import HarnessModel


@dataclass(frozen=True)
class TaskResults:
    """Task -> metric -> value, standard errors included, and the table that the harness prints."""

    results: dict[str, dict[str, Any]]
    table: str


def task_manager(settings: EvalSettings) -> TaskManager:
    """The tasks that can be named. Raises `ConfigError` where one is not there, or the package."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "--tasks runs the LM Evaluation Harness, which is not installed. Run: pip install "
            "'engine-trainer[eval]'"
        ) from error
    for folder in settings.include_path:
        if not folder.is_dir():
            raise ConfigError(f"--include-path {folder} is no folder with tasks.")
    manager = TaskManager(include_path=[str(folder) for folder in settings.include_path] or None)
    known = manager.all_tasks
    missing = [name for name in settings.tasks if name not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"The harness has no task {listing(missing)}.{meant} Tasks of your own are YAML files "
            "in a folder that --include-path names."
        )
    return manager


def run_tasks(model: HarnessModel, settings: EvalSettings, manager: TaskManager) -> TaskResults:
    """Run the tasks of `settings`. Raises `ConfigError` where their data cannot be had."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    try:
        done = simple_evaluate(
            model=model,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=manager,
            apply_chat_template=settings.apply_chat_template,
            system_instruction=settings.system_prompt,
            log_samples=False,
            random_seed=settings.seed,
            bootstrap_iters=1000,
        )
    except EngineError:
        raise
    except (OSError, ConnectionError) as error:
        raise ConfigError(
            f"The data of {listing(settings.tasks)} cannot be read ({error}). They come from the "
            "hub, through the package `datasets`: run once where there is a network, or name tasks "
            "over local files."
        ) from error
    assert done is not None  # this process is the only one, and so the first
    results = {task: dict(values) for task, values in done["results"].items()}
    return TaskResults(results, str(make_table(done)))
