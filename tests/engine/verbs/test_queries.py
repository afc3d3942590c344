"""Every verb that reads rows reads those of a database, with the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.tasks.workflow import InitSettings
from engine.errors import ConfigError
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.models.quantize import quantize
from engine.verbs.training.init import propose
from tests.support.saved_adapter import write_random_adapter
from tests.support.source_files import question_rows, write_sqlite

Source = dict[str, Any]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, Source]:
    """The same rows as a file and as a database with its query."""
    rows = question_rows(12)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sqlite(tmp_path / "app.db", rows)
    query = "select question, answer from asked order by id"
    return {"data": str(path)}, {"data": f"sqlite:///{tmp_path}/app.db", "query": query}


def test_init_proposes_the_query_and_the_columns(
    sources: tuple[Source, Source], tiny_model: Path, tmp_path: Path
) -> None:
    _, base = sources
    settings: Source = {
        "model": str(tiny_model),
        "map": {"prompt": "question", "response": "answer"},
    }
    written = yaml.safe_load(propose(InitSettings(**settings, **base)).text(tmp_path / "t.yaml"))
    assert written["query"] == base["query"]
    assert written["map"] == settings["map"]
    with pytest.raises(ConfigError, match="say with --query which of its rows"):
        propose(InitSettings(model=str(tiny_model), data=base["data"]))


def test_verbs_measure_the_same_on_a_database(
    sources: tuple[Source, Source], tiny_model: Path, tmp_path: Path
) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model, 0)
    model, measured = str(tiny_model), []
    for name, source in zip(("file", "base"), sources, strict=True):
        rest = {key: value for key, value in source.items() if key != "data"}
        merged = merge(
            model=model, adapter=str(adapter), output=tmp_path / f"m-{name}",
            check=source["data"], **rest,
        )  # fmt: skip
        small = quantize(model=model, output=tmp_path / f"q-{name}", bits=8, **source)
        cut = prune(model, None, fraction=0.25, metric="gradient", device="cpu", **source).record[
            "layers"
        ]
        measured.append((merged.check, small.perplexity, cut))
    assert measured[0] == measured[1]
    assert measured[0][0]["perplexity_merged"] > 1
