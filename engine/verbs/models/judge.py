"""`engine eval --gates`: whether a model passes its gates."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.config.given_adapters import WeightedPath
from engine.config.sources import Vocabulary, build, gather
from engine.config.tasks.gates import BENCHMARK, BENCHMARK_PASS_RATE, STRICT, GateSettings, is_set
from engine.config.tasks.inference import EvalSettings
from engine.errors import ConfigError
from engine.gates.answers import Answerer
from engine.gates.measure import Measured, Questions, measure, prepare
from engine.gates.verdict import Gate, decide, read_earlier
from engine.inference.generation import stop_ids_of
from engine.model_sources.adapter_path import adapter_path
from engine.provenance import git_commit, versions
from engine.runs.output import require_writable
from engine.storage import durable, names
from engine.storage.standing import has_keys, refuse_foreign
from engine.verbs.models.evaluate import LoadedModel, loaded

RESULTS = "eval_results.json"
FAILED = "eval_gate_failed.json"
ANSWERS = "eval_answers.jsonl"
_KEYS = {
    RESULTS: ("passed", "gates", "figures"),
    FAILED: ("failed", "results"),
    ANSWERS: ("answer", "parsed", "right"),
}
"""What files of these names hold, where gates wrote them."""


@dataclass(frozen=True)
class Verdict:
    """What the gates of a model gave, and where it was written.

    Attributes:
        figures: what was measured, by the names of the gates.
        base: the same of the base model, where a gate compares with it.
    """

    gates: list[Gate]
    figures: dict[str, float | None]
    base: dict[str, float | None] | None
    output_dir: Path
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(gate.passed for gate in self.gates)

    def text(self) -> str:
        """The gates, a line each, and the verdict."""
        count = sum(gate.passed for gate in self.gates)
        end = f"{count} of {len(self.gates)} gates passed; {self.output_dir / RESULTS}"
        return "\n".join([*(gate.text() for gate in self.gates), end])


def read_gates(path: Path | None) -> GateSettings:
    """The gates of a YAML file, with what the environment says of the benchmark.

    Raises `ConfigError`.
    """
    known = Vocabulary.of("eval", GateSettings)
    return with_benchmark(build(GateSettings, gather(known, path)))


def with_benchmark(gates: GateSettings) -> GateSettings:
    """The gates, with `pass_rate` where the environment asks for it. Raises `ConfigError`."""
    if not is_set(BENCHMARK) or gates.pass_rate is not None:
        return gates
    text = os.environ.get(BENCHMARK_PASS_RATE, "0")
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ConfigError(f"{BENCHMARK_PASS_RATE}={text!r} is no share; give a number from 0 to 1.")
    return gates.model_copy(update={"pass_rate": rate})


def judge(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    adapter: str | Path | None = None,
    gates: Mapping[str, Any] | Path | str | None = None,
    **options: Any,
) -> Verdict:
    """Hold a model, with an adapter or without, against gates.

    `gates` are the settings of `GateSettings`, or a YAML file of them; `options` are the other
    settings of `EvalSettings`. Raises as `judge_model`.
    """
    paths = data if isinstance(data, str | Path) else list(data)
    given: dict[str, Any] = {"model": model, "data": paths, "adapter": adapter}
    if isinstance(gates, Mapping):
        asked = with_benchmark(GateSettings(**gates))
    else:
        asked = read_gates(None if gates is None else Path(gates))
    return judge_model(EvalSettings(**given, **options), asked)


def is_strict(settings: EvalSettings) -> bool:
    """Whether a failed gate is to fail the command."""
    return settings.strict or is_set(STRICT)


def judge_model(settings: EvalSettings, gates: GateSettings) -> Verdict:
    """Measure a model, hold it against `gates`, and write what came of it.

    Raises `ConfigError`, `DataError` or `CheckpointError`; all that can be is checked before a
    model is loaded.
    """
    started = time.perf_counter()
    if not settings.data:
        raise ConfigError("Gates are measured on rows: name them with --data.")
    questions = prepare(gates, settings.data)
    earlier = None if gates.earlier is None else read_earlier(gates.earlier)
    base_settings = _base(settings, gates)
    output = _output_dir(settings)
    for name, keys in _KEYS.items():
        refuse_foreign(output / name, has_keys(*keys), "of gates")
    require_writable(output)  # before hours of answers
    measured, figures = _measured(settings, gates, questions)
    base = None
    if base_settings is not None:
        _, base = _measured(base_settings, gates, questions)
    decided = decide(gates, figures, base, earlier)
    verdict = Verdict(decided, figures, base, output, time.perf_counter() - started)
    _write(verdict, settings, gates, measured)
    return verdict


def _base(settings: EvalSettings, gates: GateSettings) -> EvalSettings | None:
    """The settings of the base model, where a gate compares with it."""
    if gates.worse_than_base is None and gates.perplexity_over_base is None:
        return None
    if gates.base is None and not settings.adapter:
        raise ConfigError(
            "`worse_than_base` and `perplexity_over_base` compare with the base model: without an "
            "adapter, name it as `base` in the gates file."
        )
    return settings.model_copy(update={"model": gates.base or settings.model, "adapter": ()})


def _output_dir(settings: EvalSettings) -> Path:
    """Where results go: as asked, else the run that the adapter is of, else here."""
    if settings.output_dir is not None:
        return settings.output_dir
    if settings.adapter:
        run = adapter_path(settings.adapter[0][0]).parent
        if (run / "manifest.json").is_file():
            return run
    return Path()


def _measured(
    settings: EvalSettings, gates: GateSettings, questions: Questions
) -> tuple[Measured, dict[str, float | None]]:
    """Everything of one model, which is loaded once and let go at the end, and its figures."""
    with loaded(settings) as model:
        result = model.perplexity() if questions.have_answers else None
        measured = measure(_answerer(model, gates), questions, gates)
    perplexity = None if result is None or math.isinf(result.perplexity) else result.perplexity
    return measured, measured.figures() | {"perplexity": perplexity}


def _answerer(model: LoadedModel, gates: GateSettings) -> Answerer:
    settings = model.settings
    adapters = [adapter_path(path) for path, _ in settings.adapter]
    return Answerer(
        model.decoder,
        model.tokenizer,
        stop_ids_of(model.source, model.tokenizer, *adapters),
        settings.chat_template_kwargs,
        gates.max_new_tokens,
    )


def _write(
    verdict: Verdict, settings: EvalSettings, gates: GateSettings, measured: Measured
) -> None:
    """Write answers, results and, where a gate failed, the file that says so."""
    facts = {
        "passed": verdict.passed,
        "gates": [gate.facts() for gate in verdict.gates],
        "figures": verdict.figures,
        "base": verdict.base,
        "categories": {
            name: {"accepted": accepted, "answers": count}
            for name, (accepted, count) in measured.rates.categories.items()
        },
        "model": settings.model,
        "adapter": _named(settings.adapter),
        "data": list(settings.data),
        "settings": gates.model_dump(mode="json"),
        "versions": versions(),
        "commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(verdict.seconds, 3),
    }
    folder = verdict.output_dir
    with durable.writing(folder):
        names.mkdir(folder, parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "source": one.question.row.source,
                "category": one.question.row.category,
                "answer": one.answer,
                "parsed": one.parsed,
                "right": one.right,
                "reason": one.reason,
            },
            ensure_ascii=False,
        )
        for one in measured.judged
    ]
    durable.write_text(folder / ANSWERS, "".join(f"{line}\n" for line in lines))
    failed = [gate.facts() for gate in verdict.gates if not gate.passed]
    if failed:
        durable.write_json(folder / FAILED, {"failed": failed, "results": RESULTS})
    durable.write_json(folder / RESULTS, facts)
    if not failed:
        names.unlink(folder / FAILED, missing_ok=True)


def _named(adapters: tuple[WeightedPath, ...]) -> str | None:
    """Adapters as the command line takes them, in one text; None without any."""
    named = [path if weight == 1.0 else f"{path}={weight:g}" for path, weight in adapters]
    return ", ".join(named) or None
