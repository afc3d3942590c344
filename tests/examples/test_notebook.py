"""The notebook runs from the first cell to the last, and its page has the same cells."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]


def code_cells() -> list[str]:
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def blocks(page: str) -> Iterator[str]:
    for part in page.split("```python\n")[1:]:
        yield part.partition("\n```")[0]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that a notebook would show, as IPython hands them to it."""
    pages: list[str] = []

    def display(page: str, display_id: bool) -> Any:
        pages.append(page)
        return types.SimpleNamespace(update=pages.append)

    shell = types.SimpleNamespace(kernel=object())
    # matplotlib asks for the version.
    fake = types.SimpleNamespace(get_ipython=lambda: shell, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    module = types.SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return pages


def test_the_page_has_the_cells_of_the_notebook() -> None:
    assert list(blocks((ROOT / "docs" / "python.md").read_text())) == code_cells()


def test_the_notebook_runs_from_the_first_cell_to_the_last(
    shown: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"Word {n}?", "response": "abc" * (n % 3 + 1)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Any] = {}
    first, *others = code_cells()
    exec(compile(first, "cell 1", "exec"), names)
    names |= {"MODEL": str(model), "DATA": "rows.jsonl", "STEPS": 6}
    for number, cell in enumerate(others, start=2):
        exec(compile(cell, f"cell {number}", "exec"), names)
    result = names["result"]
    assert result.history[-1]["step"] == 6
    assert len(names["evaluations"]) == 7  # six, and that before the first step
    # The first run shows its bar, and the second one, without a console, none.
    assert sum('value="6" max="6"' in page for page in shown) == 1
    assert "eval_loss" in shown[-1]
    printed = capsys.readouterr().out
    assert "('learning_rate', ['0.0002', '0.001'])" in printed
    assert f"best: {result.metrics['best_step']}" in printed
