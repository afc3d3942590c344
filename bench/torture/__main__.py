"""`make torture`: all campaigns, resumable, with a report at the end.

`python -m bench.torture [--share 0.01] [T1 T5 ...]` does a share of each campaign's trials. What
this commit has done already, in the same number, is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from bench.torture.campaigns import CAMPAIGNS
from engine.provenance import git_commit

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Run what is missing, write the report; 0 if all of it held."""
    parser = argparse.ArgumentParser(description="Campaigns of kills, rot and hostile files.")
    parser.add_argument("names", nargs="*", default=[], metavar="T1")
    parser.add_argument("--share", type=float, default=1.0, help="of each campaign's trials")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = asked.results / "reliability.jsonl"
    commit = (git_commit() or "unknown").rstrip("+")  # the results themselves change a checkout
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    for name in asked.names or CAMPAIGNS:
        campaign = CAMPAIGNS[name]
        trials = max(1, round(campaign.trials * asked.share))
        same = {"campaign": name, "asked": trials, "commit": commit}
        if any(same.items() <= row.items() for row in done):
            continue
        started = time.time()
        figures = campaign.run(trials, len(done))
        row = same | {
            "passed": campaign.passed(figures),
            "seconds": round(time.time() - started, 1),
            "figures": figures,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        print(json.dumps(row), flush=True)
        done.append(row)
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    (asked.results / "reliability.md").write_text(report(done), encoding="utf-8")
    return int(not all(row["passed"] for row in done if row["commit"] == commit))


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
    for name in sorted(newest, key=lambda name: int(name[1:])):
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
