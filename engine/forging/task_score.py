"""Judge a model by its answers to held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.tasks.gates import GateSettings
from engine.errors import ConfigError
from engine.gates.answers import Answerer
from engine.gates.measure import Questions, check_gates, measure, prepare
from engine.gates.verdict import decide, read_earlier
from engine.tokenization.tokenizer import Tokenizer
from models.decoder import Decoder

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class TaskScore:
    """What every model is asked, and which answers are right; `base` are the first's figures."""

    gates: GateSettings
    questions: Questions
    earlier: Figures | None
    base: Figures | None = None

    @classmethod
    def of(cls, gates: GateSettings, heldout: Path) -> TaskScore:
        """The held-out rows as questions. Raises `ConfigError` and `DataError`."""
        return cls(gates, prepare(gates, [str(heldout)]), check_task(gates))

    def measured(
        self, model: Decoder, tokenizer: Tokenizer, stop_ids: frozenset[int], perplexity: float
    ) -> dict[str, Any]:
        """The figures of a model and its gates, as JSON has them."""
        answerer = Answerer(model, tokenizer, stop_ids, {}, self.gates.max_new_tokens)
        rates = measure(answerer, self.questions, self.gates).figures()
        figures = rates | {"perplexity": perplexity if math.isfinite(perplexity) else None}
        decided = decide(self.gates, figures, self.base, self.earlier)
        return {"figures": rates, "gates": [gate.facts() for gate in decided]}


def check_task(gates: GateSettings) -> Figures | None:
    """The earlier figures that gates name, all of which is checked without any rows.

    Raises `ConfigError` for gates that cannot be met or name a base of their own, and `DataError`.
    """
    check_gates(gates)
    if gates.base is not None:
        raise ConfigError(
            f"The gates file names {gates.base!r} as `base`; forge compares with the model that it "
            "begins with. Leave `base` out."
        )
    return None if gates.earlier is None else read_earlier(gates.earlier)


def told(judged: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    """The gates of a model in words, and its rates beside those of another."""
    task, other = judged["task"], against.get("task", {"figures": {}})
    passed = sum(gate["passed"] for gate in task["gates"])
    rates = [
        f"{name} {value:.3g}" + _beside(other["figures"].get(name))
        for name, value in task["figures"].items()
        if value is not None
    ]
    return f"{passed} of {len(task['gates'])} gates passed ({', '.join(rates) or 'no rate'})."


def _beside(other: float | None) -> str:
    return "" if other is None else f" after {other:.3g}"
