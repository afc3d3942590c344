"""Write the tables of pruning in README.md and docs/pruning.md.

They are made of the lines of bench/results/prune_smollm2.jsonl alone, between two comments of each
page, and so is prune_smollm2.md; seeds of `random` become one row. README.md has the rows of
`FRONT`, docs/pruning.md all of them, and those of the second model.

Run as ``python -m bench.prune_pages [--check]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.prune_smollm2 import FRACTIONS, RESULTS, WHOLE, Line, Lines, between, markdown
from engine.storage import durable

ROOT = Path(__file__).parent.parent
SECOND = "scratch"
RANDOM, TRAINED = "random", ", then"
FRONT = ("l2-reconstruction-repaired", "l2-output", f"{RANDOM}:")
"""Rows of the front page: the default, the best without a repair, and chance."""


def rows_of(lines: Lines) -> dict[str, list[str]]:
    """The cells of every row by its name, the best first; seeds of chance are one row."""
    last = {one["row"]: one for one in lines.lines if one["fraction"] == FRACTIONS[-1]}
    names = sorted(
        {one["row"] for one in lines.lines if one["fraction"] in FRACTIONS},
        key=lambda name: (TRAINED in name, last.get(name, {}).get("perplexity", 0.0)),
    )
    chance = [name for name in names if name.startswith(f"{RANDOM}-")]
    rows = {
        name: [_cell(lines.cell(name, fraction)) for fraction in FRACTIONS]
        for name in names
        if name not in chance and not name.startswith("mlp")
    }
    if chance:
        rows[f"{RANDOM}: median (least - most of {len(chance)} seeds)"] = [
            _spread([lines.cell(name, fraction) for name in chance]) for fraction in FRACTIONS
        ]
    return rows


def table(lines: Lines, rows: dict[str, list[str]]) -> str:
    """The rows as Markdown."""
    whole = lines.cell(WHOLE, 0.0)
    before = "?" if whole is None else f"{whole['perplexity']:.2f}"
    heads = {one["fraction"]: str(one["heads"]) for one in lines.lines if "heads" in one}
    text = [
        f"| perplexity, {before} before | {' | '.join(f'{100 * f:.0f} %' for f in FRACTIONS)} |",
        "|---|" + "---|" * len(FRACTIONS),
        f"| heads pruned | {' | '.join(heads.get(fraction, '') for fraction in FRACTIONS)} |",
    ]
    text += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(text) + "\n"


def structures(lines: Lines) -> str:
    """What was measured beside the table, in sentences; nothing where it was not."""
    said = []
    for line in lines.lines:
        if line["row"].startswith(f"{WHOLE}{TRAINED}"):
            trained = line["row"].partition(f"{TRAINED} ")[2]
            said.append(f"Not pruned, {trained} give {line['perplexity']:.2f}.")
    plain, repaired = lines.cell("mlp", 0.2), lines.cell("mlp-repaired", 0.2)
    if plain is not None and repaired is not None:
        said.append(
            f"Channels, 20 % of every layer: {plain['perplexity']:.2f} unrepaired, "
            f"{repaired['perplexity']:.2f} repaired."
        )
    layer = lines.cell("layer of 30", 0.0)
    if layer is not None:
        said.append(
            f"Layers: {layer['chosen']} goes first; of all 30, each left out in turn on "
            f"{layer['rows']} held-out rows, it costs the {_ordinal(layer['rank'])}."
        )
    return "\n" + " ".join(said) + "\n" if said else ""


def _ordinal(rank: int) -> str:
    return "least" if rank == 1 else f"{rank}. least"


def _cell(line: Line | None) -> str:
    return "" if line is None else f"{line['perplexity']:.2f} ({between(line['interval'])})"


def _spread(cells: list[Line | None]) -> str:
    values = [cell["perplexity"] for cell in cells if cell is not None]
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.1f} - {max(values):.1f})"


@dataclass(frozen=True)
class Block:
    """What stands between two comments of a page."""

    page: Path
    name: str
    inside: str

    @property
    def text(self) -> str:
        """The comments and what stands between."""
        return f"{self._begin}{self.inside}{self._end}"

    @property
    def _begin(self) -> str:
        return f"<!-- {self.name}: begin -->\n"

    @property
    def _end(self) -> str:
        return f"<!-- {self.name}: end -->\n"

    def write(self) -> None:
        """Put it into the page."""
        before, _, rest = self.page.read_text(encoding="utf-8").partition(self._begin)
        after = rest.partition(self._end)[2]
        durable.write_text(self.page, before + self.text + after)


def blocks(lines: Lines, second: Lines) -> list[Block]:
    """Every table of every page, of the lines of SmolLM2 and of the second model."""
    rows, guide = rows_of(lines), ROOT / "docs" / "pruning.md"
    front = {name: cells for name, cells in rows.items() if name.split(" ")[0] in FRONT}
    return [
        Block(ROOT / "README.md", "pruned", table(lines, front)),
        Block(guide, "pruned", table(lines, rows) + structures(lines)),
        Block(guide, "pruned second", table(second, rows_of(second))),
    ]


def measured_blocks() -> list[Block]:
    """Those of the lines that are committed."""
    lines, second = (Lines(RESULTS / f"prune_{name}.jsonl") for name in ("smollm2", SECOND))
    return blocks(lines, second)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_pages")
    parser.add_argument("--check", action="store_true", help="end with 1 where a page is old")
    check = parser.parse_args().check
    old = []
    if not check:
        lines = Lines(RESULTS / "prune_smollm2.jsonl")
        durable.write_text(RESULTS / "prune_smollm2.md", markdown(lines))
    for block in measured_blocks():
        if block.text not in block.page.read_text(encoding="utf-8"):
            old.append(block.page.name)
            if not check:
                block.write()
    if check and old:
        print(
            f"{', '.join(old)}: other figures than bench/results has: python -m bench.prune_pages"
        )
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
