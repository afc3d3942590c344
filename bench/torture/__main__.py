"""`make torture`: all campaigns, resumable, with a report at the end.

`python -m bench.torture [--share 0.01] [--jobs 2] [T1 T5 ...]` does a share of each campaign's
trials, so many campaigns at a time, each in a process of its own. What this commit has done
already, in the same number, is not done again, parts of a campaign included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.torture.campaign import PART, Campaign, Figures, merged, scratch_folders
from bench.torture.campaigns import CAMPAIGNS
from engine.provenance import git_commit
from engine.storage.durable import write_json

RESULTS = Path(__file__).parents[1] / "results"
PARTIAL = ".reliability.{}.partial.json"
MOST_LISTED = 12


def main() -> int:
    """Run what is missing, write the report; 0 if all of it held."""
    parser = argparse.ArgumentParser(description="Campaigns of kills, rot and hostile files.")
    parser.add_argument("names", nargs="*", default=[], metavar="T1")
    parser.add_argument("--share", type=float, default=1.0, help="of each campaign's trials")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="campaigns at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    names = asked.names or [*CAMPAIGNS]
    if min(asked.jobs, len(names)) > 1:
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda name: in_a_process(name, asked), names))
    else:
        for name in names:
            run(name, asked.share, asked.results)
    rows = written(asked.results)
    (asked.results / "reliability.md").write_text(report(rows), encoding="utf-8")
    newest = {row["campaign"]: row for row in rows if row["commit"] == commit()}
    return int(not all(name in newest and newest[name]["passed"] for name in names))


def in_a_process(name: str, asked: argparse.Namespace) -> None:
    """One campaign, whose row is in the results when this returns, unless it failed."""
    options = ["--share", str(asked.share), "--results", str(asked.results), "--jobs", "1"]
    subprocess.run([sys.executable, "-m", "bench.torture", name, *options], check=False)


def commit() -> str:
    """The commit that is tried; the results themselves change a checkout."""
    return (git_commit() or "unknown").rstrip("+")


def written(results: Path) -> list[dict[str, Any]]:
    """The rows that stand in the results."""
    rows = results / "reliability.jsonl"
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def run(name: str, share: float, results: Path) -> None:
    """One campaign, unless this commit has done it: its row is written."""
    campaign, done = CAMPAIGNS[name], written(results)
    trials = max(1, round(campaign.trials * share))
    same = {"campaign": name, "asked": trials, "commit": commit()}
    if any(same.items() <= row.items() for row in done):
        return
    partial = results / PARTIAL.format(name)
    figures, seconds = in_parts(campaign, trials, same, partial, len(done))
    row = same | {
        "passed": campaign.passed(figures),
        "seconds": round(seconds, 1),
        "figures": shortened(figures),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(row), flush=True)
    with (results / "reliability.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def shortened(figures: Figures) -> Figures:
    """Figures whose lists end after some items with the number of those left out."""
    short = dict(figures)
    for key, value in figures.items():
        if isinstance(value, list) and len(value) > MOST_LISTED:
            short[key] = [*value[:MOST_LISTED], f"and {len(value) - MOST_LISTED:,} more"]
    return short


def in_parts(
    campaign: Campaign, trials: int, same: dict[str, Any], partial: Path, rows: int
) -> tuple[Figures, float]:
    """The figures of all parts and their seconds; those in the file `partial` are done already."""
    figures: Figures = {}
    first, seconds = 0, 0.0
    if partial.exists() and same.items() <= (before := json.loads(partial.read_text())).items():
        figures, first, seconds = before["figures"], before["next"], before["seconds"]
    for start, size in campaign.parts(trials):
        if start < first:
            continue
        began = time.time()
        with scratch_folders(campaign.disk):
            figures = merged(figures, campaign.run(size, rows * PART + start))
        seconds += time.time() - began
        told = same | {"figures": figures, "next": start + size, "seconds": seconds}
        write_json(partial, told)
    partial.unlink()
    return figures, seconds


def report(rows: list[dict[str, Any]]) -> str:
    """The newest row of each campaign as Markdown."""
    lines = [
        "# Campaigns",
        "",
        "`make torture` writes this page: the newest of each kind.",
        "",
    ]
    lines += [
        "| campaign | what | trials | passed | figures | seconds | commit |",
        "|" + "---|" * 7,
    ]
    newest = {row["campaign"]: row for row in rows}
    for name in sorted(newest, key=lambda name: (int(name[1:].partition("-")[0]), name)):
        row = newest[name]
        figures = ", ".join(f"{key} {value}" for key, value in row["figures"].items())
        verdict = "yes" if row["passed"] else "**no**"
        what = CAMPAIGNS[name].what
        cells = [
            name,
            what,
            f"{row['asked']:,}",
            verdict,
            figures,
            row["seconds"],
            row["commit"][:10],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
