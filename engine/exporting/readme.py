"""README.md of a merged or quantised model: its origin and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.config.given_adapters import WeightedPath
from engine.model_sources.adapter.config import public_name
from engine.provenance import version
from engine.storage import strict_yaml
from engine.storage.safe_files import json_object_or_empty

_SETTINGS = (
    "method", "lora_rank", "lora_alpha", "target_modules", "learning_rate", "epochs", "max_steps",
    "batch_size", "accumulate", "max_length", "lr_schedule", "seed",
)  # fmt: skip


def model_readme(
    model: str | Path,
    adapters: Sequence[tuple[Path, float]],
    tags: Sequence[str],
    facts: Mapping[str, Any],
) -> str:
    """The text of a model card with the front matter by which the hub knows what this is.

    `facts` are lines of their own, in order. What the runs that trained `adapters` left beside them
    (settings, digests, metrics) is told; paths of this machine are not.
    """
    base = json.dumps(public_name(str(model)))
    head = [
        "---", f"base_model: {base}", "library_name: transformers",
        "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "---", "",
    ]  # fmt: skip
    lines = [f"# {public_name(str(model))}, {' and '.join(tags)}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items() if value is not None]
    lines += [f"- written by: engine {version()}", ""]
    for path, weight in adapters:
        lines += _of_adapter(path, weight)
    lines += ["Load it with transformers:", ""]
    lines += ["    from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines += ["    model = AutoModelForCausalLM.from_pretrained(this_folder)"]
    lines += ["    tokenizer = AutoTokenizer.from_pretrained(this_folder)", ""]
    return "\n".join(head + lines)


def named_adapters(
    paths: Sequence[Path], given: Sequence[WeightedPath]
) -> list[tuple[Path, float]]:
    """Resolved paths with the weights that were given."""
    return [(path, weight) for path, (_, weight) in zip(paths, given, strict=True)]


def _of_adapter(path: Path, weight: float) -> list[str]:
    """A section about one adapter, and the run that trained it if its files are there."""
    run = path.parent
    name = public_name(str(run if path.name == "adapter" else path))
    lines = [f"## Adapter {name}", "", f"- weight: {weight:g}"]
    config = json_object_or_empty(path / "adapter_config.json")
    lines += [f"- {key}: {config[key]}" for key in ("r", "lora_alpha", "use_dora") if key in config]
    if "target_modules" in config:
        lines.append(f"- target_modules: {_listed(config['target_modules'])}")
    record = json_object_or_empty(path / "base.json")
    for key in ("digest", "quantization", "dtype", "engine_version"):
        if record.get(key) is not None:
            lines.append(f"- base {key}: {record[key]}")
    digests = json_object_or_empty(run / "manifest.json").get("digests")
    for key, digest in sorted((digests if isinstance(digests, dict) else {}).items()):
        if key != "base":
            lines.append(f"- {key} digest: {digest}")
    settings = _yaml(run / "config.yaml")
    lines += [f"- {key}: {_listed(settings[key])}" for key in _SETTINGS if key in settings]
    metrics = json_object_or_empty(run / "summary.json").get("metrics")
    numbers = metrics if isinstance(metrics, dict) else {}
    lines += [
        f"- {key}: {value}" if isinstance(value, int) else f"- {key}: {value:.6g}"
        for key, value in sorted(numbers.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return [*lines, ""]


def _listed(value: Any) -> str:
    return ", ".join(map(str, sorted(value))) if isinstance(value, list | tuple) else str(value)


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        read = strict_yaml.load(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return read if isinstance(read, Mapping) else {}
