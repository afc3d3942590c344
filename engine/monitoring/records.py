"""Settings, samples, pruned heads and stages in a run's directory.

What is read may come from anywhere: a value of another type than expected is left out.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from engine.config.sources import read_mapping
from engine.errors import EngineError
from engine.forging.stages import JOB
from engine.monitoring.confined import is_own_file, own_object
from engine.monitoring.state import PRUNING
from engine.storage.safe_files import read_regular
from engine.storage.strict_json import loads

_MOST_SETTINGS, _LONGEST_SETTING = 1000, 2000
_LONGEST_SAMPLES = 64 << 20
_MOST_SAMPLES = 2000
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_ANSWERS = ("text", "answer", "response", "completion", "output")


def settings(folder: Path) -> dict[str, str]:
    """Every setting of a run or job as text, by its dotted name; empty where there is none."""
    path = folder / "config.yaml"
    try:
        values = own_object(folder / JOB)
        if is_own_file(path):
            values = read_mapping(path)
    except EngineError:
        return {}
    return dict(islice(_flat(values, ""), _MOST_SETTINGS))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            # Of a list in a list only a part is shown: YAML can name one thing many times over.
            texts = (_SHORT.repr(item) if _is_nested(item) else str(item) for item in value)
            yield f"{prefix}{name}", ", ".join(texts)[:_LONGEST_SETTING]
        else:
            yield f"{prefix}{name}", "" if value is None else str(value)[:_LONGEST_SETTING]


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)


def compared(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The settings of several runs: name, value by id, and whether they differ."""
    by_run = {run: settings(folder) for run, folder in runs.items()}
    names = list(dict.fromkeys(name for values in by_run.values() for name in values))
    rows = []
    for name in names:
        values = {run: own.get(name) for run, own in by_run.items()}
        rows.append({"name": name, "values": values, "differs": len(set(values.values())) > 1})
    return rows


def samples(folder: Path) -> list[dict[str, Any]]:
    """Prompts with the answers to each, oldest first, from `samples.jsonl` or a job's stages."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for label, sample in [*_sample_lines(folder / "samples.jsonl"), *_stage_samples(folder)]:
        prompt, text = _as_text(sample.get("prompt") or sample.get("messages")), None
        for name in _ANSWERS:
            text = _as_text(sample.get(name)) if text is None else text
        if prompt is not None and text is not None:
            prompts.setdefault(prompt, []).append({"label": label, "text": text})
    return [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]


def _sample_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not is_own_file(path):
        return
    rows = read_regular(path, _LONGEST_SAMPLES).split(b"\n")
    for row in [row for row in rows if row.strip()][-_MOST_SAMPLES:]:
        try:
            sample = loads(row.decode("utf-8"))
        except ValueError:
            continue  # torn, or no sample
        if isinstance(sample, dict):
            step = sample.get("step")
            yield (f"step {step}" if type(step) is int else "no step"), sample


def _stage_samples(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, stage in _assessed(folder):
        given = stage.get("samples")
        for sample in given if isinstance(given, list) else []:
            if isinstance(sample, dict):
                yield name, sample


def _as_text(value: Any) -> str | None:
    """A text, or the last message of a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return _as_text(value[-1].get("content"))
    return None


def _assessed(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The models that a job of forge has judged so far, in order."""
    files = _within(folder, "stages/*.json")
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    stages = [(file.stem, own_object(file)) for file in files]
    return [(_told(name), stage) for name, stage in stages if "perplexity" in stage]


def _within(folder: Path, pattern: str) -> list[Path]:
    """What matches below `folder`, in order; nothing that a link leads to elsewhere."""
    root = folder.resolve()
    return [path for path in sorted(folder.glob(pattern)) if path.resolve().is_relative_to(root)]


def _told(stage: str) -> str:
    """The name of a stage for a person: `cycle 1, pruned`, `cycle 1, trained`."""
    if stage == "baseline":
        return stage
    name, _, number = stage.removesuffix("-pruned").partition("-")
    return f"{name} {number}, {'pruned' if stage.endswith('-pruned') else 'trained'}"


def forge(folder: Path) -> list[dict[str, Any]]:
    """Perplexity, size and speed of every model that a job has judged so far."""
    names = ("perplexity", "parameters", "pruned_heads", "bytes", "tokens_per_second")
    return [
        {"name": name, **{key: _number(stage.get(key)) for key in names}}
        for name, stage in _assessed(folder)
    ]


def pruning(folder: Path) -> list[dict[str, Any]]:
    """The heat maps of a pruned model, or of the models in a job's directory.

    Each has a title and layers: number, scores by head, which heads are pruned, and which were
    before.
    """
    models = [folder, *_within(folder, "cycle-*/pruned")]
    records = [(path, own_object(path / PRUNING)) for path in models]
    return [
        {
            "name": str(path.relative_to(folder)) if path != folder else folder.name,
            **{key: record.get(key) for key in ("metric", "mode") if _is_text(record.get(key))},
            "fraction": _number(record.get("fraction")),
            "layers": layers,
        }
        for path, record in records
        if (layers := _layers(record))
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _layers(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = record.get("layers")
    layers = []
    for layer in given if isinstance(given, list) else []:
        if not isinstance(layer, dict) or not isinstance(layer.get("scores"), list):
            continue
        layers.append(
            {
                "layer": _number(layer.get("layer")),
                "scores": [_number(score) for score in layer["scores"]],
                "pruned": _integers(layer.get("pruned")),
                "pruned_before": _integers(layer.get("pruned_before")),
            }
        )
    return layers


def _integers(value: Any) -> list[int]:
    return [item for item in value if type(item) is int] if isinstance(value, list) else []


def _number(value: Any) -> int | float | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None
