"""`engine forge`: cycles of pruning and recovery, judged by saved models.

    baseline            the model as it is
    cycle k   prune     heads of the model so far, by their importance
              pruned    the pruned model, read back and evaluated
              train     LoRA or QLoRA on the pruned model, after the heads are pruned
              merge     onto the 16-bit weights, tensor by tensor
              trained   the merged model, read back and evaluated
    baseline k          the same training from the same start without pruning, if asked for

A cycle that leaves the model worse than the one before it by more than 10 % and more than 1.0 of
perplexity is the last. Every step is a stage (`engine.forging.stages`): a job that was killed goes
on where it was. The trained baseline tells what the training alone is worth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.config.settings import Settings, given_settings
from engine.config.tasks.gates import GateSettings
from engine.config.tasks.pruning import ForgeJob, ForgeSettings
from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.batches.loader import split_heldout
from engine.data.dataset import RowChoice, load_rows, read_chosen
from engine.errors import ConfigError
from engine.forging.assess import Judge
from engine.forging.domain import (
    DOMAINS,
    domain_files,
    files_of_domain,
    lines_of,
    prompt_of,
    refuse_changed,
    write_rows,
)
from engine.forging.identity import RENAMED, identity, upgraded
from engine.forging.report import PLOT
from engine.forging.stages import JOB, Stages, check_job, make_directory, row_files, standing
from engine.forging.task_score import TaskScore, check_task
from engine.forging.verdict import judged
from engine.model_sources.open import describe_model
from engine.model_sources.pruning_record import PRUNING
from engine.provenance import version
from engine.runs.checkpoints import sweep
from engine.runs.summary import refuse_other_summary, summed_up_on_failure, write_summary
from engine.storage import durable, names
from engine.storage.home import is_text, real
from engine.storage.lock import DirectoryLock
from engine.storage.safe_files import read_json_object
from engine.training.checks import check_model, check_request
from engine.verbs.models.judge import read_gates
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.training.train import train

log = logging.getLogger(__name__)

RESULTS = "results.json"
WORSE_SHARE, WORSE_PERPLEXITY = 0.10, 1.0


def job_settings(options: Mapping[str, Any]) -> ForgeSettings:
    """One flat table of `ForgeJob`'s settings, and of `TrainConfig`'s for each fine-tuning."""
    job = ForgeJob(**{key: value for key, value in options.items() if key in _names(ForgeJob)})
    training = {key: value for key, value in options.items() if key not in _OWN}
    return job.settings(TrainConfig(**{"data": list(NO_DATA), **training}))


def _names(table: type[Settings]) -> set[str]:
    return {*table.model_fields, *table.renamed}


_OWN = _names(ForgeJob) - {"model", "data", "eval_data"}


def forge(
    settings: ForgeSettings | None = None, *, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Run the job and return what `results.json` holds.

    The settings are given whole, or one by one as `options`: those of `engine forge` and, for each
    fine-tuning, those of `engine train`: `fraction=0.1, cycles=2, max_steps=100`.
    Raises `ConfigError` for settings that cannot be met or that differ from those of the job in the
    directory, and what pruning, training and evaluation raise.
    """
    if settings is None:
        settings = job_settings(options)
    elif options:
        settings = given_settings(ForgeSettings, settings, options)
    started, root = time.time(), settings.output_dir
    _check(settings)
    gates = None if settings.gates is None else read_gates(settings.gates)
    known = identity(settings)
    if gates is not None:
        check_task(gates)
        known["gates"] = gates.model_dump(mode="json")
    older = partial(upgraded, now=known)
    check_job(root, known, resume=resume, renamed=RENAMED, upgraded=older)
    make_directory(root)
    parameters = settings.model_dump(mode="json")
    with DirectoryLock(root), summed_up_on_failure(root, "forge", parameters, started):
        parts = (root / "data", root / "data" / "docstrings", root / "stages")
        for folder in (root, *parts, *root.glob("cycle-*"), *root.glob("baseline-*")):
            sweep(folder)
        job = Stages(root, known, resume=resume, renamed=RENAMED, upgraded=older)
        results = _Forge(settings, job, gates).run()
        write_summary(
            root,
            "forge",
            parameters,
            started=started,
            metrics=_figures(results),
            output_path=Path(results["model"]),
        )
    return results


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    """What the summary says of a job: the perplexities in order, and why it ended early."""
    cycles = results["cycles"]
    return {
        "perplexity_before": results["baseline"]["perplexity"],
        "perplexities_pruned": [cycle["pruned"]["perplexity"] for cycle in cycles],
        "perplexities_trained": [cycle["trained"]["perplexity"] for cycle in cycles],
        "cycles": len(cycles),
        "stopped": results["stopped"],
        "verdict": (results.get("verdict") or {}).get("text"),
    }


def _check(settings: ForgeSettings) -> None:
    """Check what needs no weights before anything is written, and that no input is an output."""
    if not is_text(settings.output_dir):
        raise ConfigError(
            f"--output-dir {settings.output_dir} is no text in UTF-8, and the models of a job are "
            "named by it. Choose another --output-dir."
        )
    refuse_other_summary(settings.output_dir, "forge")
    config, files = settings.training, row_files(settings.output_dir)
    named = [settings.domain, *config.data, *config.eval_data]
    inputs = [real(name) for name in named if name is not None and name not in DOMAINS]
    inputs += [path / file.name for path in inputs for file in files]
    taken = [str(file) for file in files if real(file) in inputs]
    if not taken and not (settings.output_dir / JOB).exists():
        taken = standing(settings.output_dir, (RESULTS, PLOT))
    if taken:
        raise ConfigError(
            f"{', '.join(taken)} stands where the job would write its own files. Choose another "
            "--output-dir."
        )
    rows = settings.domain is None
    checked = config.model_copy(
        update={
            "output_dir": settings.output_dir,
            "data": config.data if rows else NO_DATA,
            "resume": "auto",
        }
    )
    machine = check_request(checked)
    check_model(checked, describe_model(config.model, config.revision).config, machine)
    if not rows and settings.domain not in DOMAINS:
        domain_files(str(settings.domain))


class _Forge:
    def __init__(self, settings: ForgeSettings, job: Stages, gates: GateSettings | None) -> None:
        self.settings, self.job, self.root = settings, job, settings.output_dir
        self.train_file, heldout = row_files(self.root)
        self.rows = rows = self.job.run("data", self._data)
        for file in (self.train_file, heldout):
            refuse_changed(file, rows.get(file.name))
        config = settings.training
        self.judge = Judge(
            heldout,
            rows["prompts"],
            max_length=config.max_length,
            device=config.device,
            dtype=config.dtype,
            task=None if gates is None else TaskScore.of(gates, heldout),
        )

    def run(self) -> dict[str, Any]:
        source = self.settings.training.model
        baseline = self.job.run("baseline", lambda: self.judge.assess(source))
        log.info("baseline: perplexity %.3f", baseline["perplexity"])
        if self.judge.task is not None:
            task = replace(self.judge.task, base=baseline["task"]["figures"])
            self.judge = replace(self.judge, task=task)
        cycles: list[dict[str, Any]] = []
        stopped, current, before = None, source, baseline
        for number in range(1, self.settings.cycles + 1):
            cycle = self._cycle(number, current)
            cycles.append(cycle)
            stopped = _worse(number, before, cycle["trained"])
            if stopped is not None:
                log.warning("%s", stopped)
                break
            current, before = cycle["trained"]["model"], cycle["trained"]
        seeds = range(self.settings.baseline_seeds if self.settings.baseline else 0)
        trained = [self._train_baseline(len(cycles), seed) for seed in seeds]
        results: dict[str, Any] = {
            "baseline": baseline,
            "cycles": cycles,
            "baseline_cycles": trained[0] if trained else [],
            "baseline_seeds": trained[1:],
            "data": self._splits(),
            "stopped": stopped,
            "model": current,
            "engine_version": version(),
        }
        results["verdict"] = judged(results)
        durable.write_json(self.root / RESULTS, results)
        return results

    def _splits(self) -> dict[str, Any]:
        """Which rows each stage saw: files, numbers and digests."""
        pruning, given = self.settings.pruning, self.rows
        calibration = list(pruning.data) or [self._within(self.train_file)]
        files = self.train_file, self.judge.heldout
        train, heldout = (set(lines_of(file)) for file in files)
        return {
            "training": self._file(files[0], given["rows"]),
            "judging": self._file(files[1], given["heldout_rows"]),
            "calibration": {"files": calibration, "first_rows": pruning.calibration_rows},
            "rows_in_training_and_judging": len(train & heldout),
        }

    def _file(self, path: Path, rows: int) -> dict[str, Any]:
        return {"file": self._within(path), "rows": rows, "sha256": durable.sha256_file(path)}

    def _within(self, path: Path) -> str:
        """A file of the job by its name in the job's directory, which may be moved."""
        return str(path.relative_to(self.root))

    def _data(self) -> dict[str, Any]:
        """Write the rows to train on and those held out, once for every cycle."""
        config, folder = self.settings.training, self.root / "data"
        names.mkdir(folder, exist_ok=True)
        files = files_of_domain(self.settings.domain, folder)
        if len(files) == 2:
            rows, heldout = load_rows(files[0]), load_rows(files[1])
        else:
            rows = read_chosen(files or config.data, RowChoice.of(config, config.category))[0]
            if config.eval_data:
                heldout = read_chosen(config.eval_data, RowChoice(query=config.eval_query))[0]
            else:
                rows, heldout = split_heldout(rows, self.settings.heldout, config.seed)
        rows, heldout = rows[: config.limit_rows], heldout[: self.settings.heldout_rows]
        if not heldout:
            raise ConfigError("No rows are held out; give --eval-data, or more rows to split.")
        train_file, heldout_file = row_files(self.root)
        write_rows(train_file, rows)
        write_rows(heldout_file, heldout)
        prompts = [prompt for row in heldout if (prompt := prompt_of(row)) is not None]
        return {
            train_file.name: durable.sha256_file(train_file),
            "rows": len(rows),
            heldout_file.name: durable.sha256_file(heldout_file),
            "heldout_rows": len(heldout),
            "prompts": prompts[: self.settings.samples],
        }

    def _cycle(self, number: int, source: str) -> dict[str, Any]:
        name, folder = f"cycle-{number}", self.root / f"cycle-{number}"
        pruned = folder / "pruned"
        done = self.job.run(f"{name}-prune", lambda: self._prune(source, pruned))

        def made() -> Path:
            """The pruned model, once more where it is gone and a record that needs it was lost."""
            if not pruned.exists():
                self._prune(source, pruned)
            return pruned

        after = self.job.run(f"{name}-pruned", lambda: self.judge.assess(made()))
        log.info("%s: perplexity %.3f after pruning", name, after["perplexity"])
        trained = self._train(name, str(pruned), folder, self.settings.distill, made=made)
        log.info("%s: perplexity %.3f after training", name, trained["trained"]["perplexity"])
        if not self.settings.keep_pruned:
            durable.remove_tree(pruned)
        return {"prune": done, "pruned": after, **trained}

    def _prune(self, source: str, target: Path) -> dict[str, Any]:
        names.mkdir(target.parent, exist_ok=True)
        settings = self.settings.pruning
        if not settings.data:
            settings = settings.model_copy(update={"data": (str(self.train_file),)})
        if not target.exists():  # it appears when it is complete
            prune(source, target, settings)
        record = read_json_object(target / PRUNING)
        picked = (
            "metric", "mode", "what", "fraction", "units", "heads", "parameters", "chosen",
            "pruned_layers", "repair", "digest",
        )  # fmt: skip
        return {key: record[key] for key in picked if key in record}

    def _train(
        self,
        name: str,
        source: str,
        folder: Path,
        distill: bool = False,
        seed: int = 0,
        made: Callable[[], Path] | None = None,
    ) -> dict[str, Any]:
        """Fine-tune the model in `source`, merge, and judge what was saved; `seed` is added.

        `made` sees to it that `source` is there.
        """
        run, merged = folder / "run", folder / "model"
        names.mkdir(folder, exist_ok=True)
        config = self.settings.training.model_copy(
            update={
                "model": source,
                "teacher": self.settings.training.model if distill else None,
                "data": (str(self.train_file),),
                "eval_data": (),
                "heldout": 0.0,
                "output_dir": run,
                "run_id": name,
                "seed": self.settings.training.seed + seed,
                "resume": "auto",
            }
        )

        def fit() -> dict[str, Any]:
            if made is not None:
                made()
            return dict(train(config, console=False).metrics)

        def join() -> dict[str, Any]:
            if not merged.exists():
                merge(source, run / "adapter", merged)
            return {"model": str(merged)}

        metrics = self.job.run(f"{name}-train", fit)
        self.job.run(f"{name}-merge", join)
        assessed = self.job.run(name, lambda: self.judge.assess(merged))
        return {"train": metrics, "trained": {**assessed, "model": str(merged)}}

    def _train_baseline(self, cycles: int, seed: int) -> list[dict[str, Any]]:
        """The same training, cycle by cycle, of the model that was never pruned; another seed."""
        source, assessed = self.settings.training.model, []
        for number in range(1, cycles + 1):
            name = f"baseline-{number}" + (f"-seed-{seed}" if seed else "")
            entry = self._train(name, source, self.root / name, seed=seed)
            log.info("%s: perplexity %.3f", name, entry["trained"]["perplexity"])
            assessed.append(entry)
            source = entry["trained"]["model"]
        return assessed


def _worse(number: int, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why the job ends after this cycle, if it does; a perplexity that overflowed is None."""
    old, new = before["perplexity"], after["perplexity"]
    if old is None or (
        new is not None and (new <= old * (1 + WORSE_SHARE) or new - old <= WORSE_PERPLEXITY)
    ):
        return None
    told = "is not finite" if new is None else f"is {new:.3f}, {100 * (new / old - 1):.1f} % more"
    return (
        f"Cycle {number} is the last: the perplexity {told} than the {old:.3f} before it, beyond "
        f"{100 * WORSE_SHARE:.0f} % and {WORSE_PERPLEXITY}. Prune a smaller fraction, or train "
        "longer."
    )
