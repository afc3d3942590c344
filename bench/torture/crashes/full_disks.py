"""Every verb on file systems too small for what it writes.

`python -m bench.torture.crashes.full_disks FOLDER [VERB ...]` prints one JSON object per verb; it
needs a mount namespace of its own. A verb runs on disks of a share of what it writes. It has to end
done, or refused in a paragraph that tells of the space, with nothing half done under a final name
and no temporaries; then the disk grows, and the same command has to end as an undisturbed one does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.torture.crashes.every_verb import Command, commands, write_inputs
from bench.torture.crashes.file_faults import (
    TEMPORARY,
    Expected,
    contents,
    load_verbs,
    run,
    spoken,
    undisturbed,
    unlike,
)
from bench.torture.full_disk import small_disk

SHARES = (0.0, 0.1, 0.35, 0.6, 0.85, 0.97)
PAGE = 4
"""KiB that a file of one byte takes."""


def complaints(command: Command, expected: Expected, folder: Path, kibibytes: int) -> list[str]:
    """What is wrong with a command on a disk of this size, and after the disk has grown."""
    with small_disk(folder, kibibytes):
        command.prepare(folder)
        ending = run(command, folder)
        left = contents(folder)
        wrong = spoken(ending)
        wrong += [f"torn: {name}" for name in expected.torn(left, command.growing)]
        wrong += [f"left: {name}" for name in left if TEMPORARY.match(Path(name).name)]
        if ending.status == 2 and not ("free" in ending.said or "space" in ending.said):
            wrong.append(f"the space is not told: {ending.said[-300:]}")
        subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)
        again = run(command, folder)
        if again.status and not (expected.names <= left.keys() and again.status == 2):
            wrong.append(f"does not start again ({again.status}): {again.said[-300:]}")
        return wrong + unlike(expected, contents(folder))


def campaign(command: Command, folder: Path) -> dict[str, Any]:
    """All sizes of disks for a command."""
    expected = undisturbed(command, folder)
    whole = sum(map(len, expected.repeated.values())) // 1024 + PAGE * len(expected.names)
    counts, wrong = Counter[str](), list[str]()
    for share in SHARES:
        kibibytes = max(PAGE, round(share * whole))
        told = complaints(command, expected, folder, kibibytes)
        counts["disks"] += 1
        counts["bad"] += bool(told)
        wrong += [f"{command.name} on {kibibytes} KiB: {text}" for text in told]
    return {**counts, "wrong": wrong}


def main(folder: Path, names: list[str]) -> None:
    """Print the figures of each command that is named, or of all of them."""
    torch.set_num_threads(1)
    inputs = write_inputs(folder / "inputs")
    load_verbs()
    print(
        json.dumps(
            {
                command.name: campaign(command, folder / "trial" / "here")
                for command in commands(inputs)
                if command.name in names or not names
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
