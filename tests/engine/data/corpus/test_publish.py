"""What is made gets its name where nothing stands, also where something came in between."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.corpus.publishing import CorpusReport, Making, publish
from engine.data.origins import manifest_path
from engine.errors import CheckpointError

REPORT = CorpusReport("mix", 1)


def rows_while(output: Path, text: str) -> Iterator[dict[str, Any]]:
    """Rows, while somebody else writes the output."""
    yield {"prompt": "a", "response": "b"}
    output.write_text(text)


def test_an_output_that_came_while_rows_were_made_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    with pytest.raises(CheckpointError, match="Another program wrote it in the meantime"):
        publish(output, rows_while(output, "theirs"), Making("mix", {}, ()), REPORT)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert output.read_text() == "theirs"
    publish(output, rows_while(output, "theirs"), Making("mix", {}, (), overwrite=True), REPORT)
    assert '"response": "b"' in output.read_text()
    # A manifest whose rows have gone is in nobody's way.
    output.unlink()
    publish(output, iter([{"prompt": "c"}]), Making("mix", {}, ()), REPORT)
    assert manifest_path(output).exists() and '"c"' in output.read_text()
