"""Host memory of pruning SmolLM2 on rows, against its plan.

Every job is `engine prune` in a process of its own, on the first docstring rows of the installed
Python. `own_bytes` is the most that belongs to no file, looked at every five milliseconds;
`extra_bytes` is that less what the program itself takes (a job that scores by chance and writes
nothing), and `planned_bytes` is what `engine prune` says before the rows run. Bases are the GGUF
file and a model that `engine quantize --bits 4` makes of it.

Run as ``python -m bench.prune_memory [--rows 16] [--only JOB ...]``. One line for each job goes to
bench/results/prune_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from bench.cpu.write_memory import measured
from engine.config.tasks.pruning import PruneSettings
from engine.data.docstrings import write_docstrings
from engine.model_sources.open import open_model_source
from engine.provenance import measured_on
from engine.pruning.calibration import calibration_examples
from engine.pruning.reconstruction.from_settings import calibration_of, memory_of
from engine.verbs.models.quantize import quantize
from examples.smollm2 import gguf_path

RESULTS = Path(__file__).parent / "results" / "prune_memory.jsonl"
MAX_LENGTH = 96
JOBS: dict[str, tuple[str, dict[str, str]]] = {
    "gguf, chance, repaired": ("gguf", {"metric": "random"}),
    "gguf, l2-reconstruction, global, repaired": ("gguf", {"scope": "global"}),
    "gguf, l2-reconstruction, measured layers, repaired": ("gguf", {}),
    "gguf, l2-output": ("gguf", {"metric": "l2-output", "repair": "none"}),
    "gguf, gradient": ("gguf", {"metric": "gradient", "repair": "none"}),
    "gguf, channels, repaired": ("gguf", {"what": "mlp"}),
    "nf4, chance, repaired": ("nf4", {"metric": "random"}),
    "nf4, l2-reconstruction, global, repaired": ("nf4", {"scope": "global"}),
}
"""The base and the settings of every job."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_memory")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        folder = Path(name)
        rows, _, _, _ = write_docstrings(folder / "data")
        bases = {"gguf": gguf_path(), "nf4": folder / "nf4"}
        if any(JOBS[job][0] == "nf4" for job in given.only):
            quantize(gguf_path(), bases["nf4"], bits=4)
        same = ["--fraction", "0.2", "--device", "cpu"]
        idle = ["prune", "--model", str(gguf_path()), "--metric", "random", "--report-only", *same]
        program = measured(idle)["own_bytes"]
        for job in given.only:
            base, changes = JOBS[job]
            named = {"calibration_rows": given.rows, "max_length": MAX_LENGTH, **changes}
            settings = PruneSettings(fraction=0.2, data=[str(rows)], device="cpu", **named)
            source = open_model_source(bases[base])
            examples = calibration_examples(source, calibration_of(settings))
            words = [f"--{key.replace('_', '-')}={value}" for key, value in named.items()]
            output = folder / job
            start = ["prune", "--model", str(bases[base]), "--data", str(rows)]
            own = measured([*start, *same, *words, "--output", str(output)])["own_bytes"]
            line = {
                "job": job,
                "tokens": sum(map(len, examples)),
                "planned_bytes": memory_of(source, examples, settings),
                "extra_bytes": own - program,
                "own_bytes": own,
            }
            line |= measured_on(torch.device("cpu"))
            print(json.dumps(line), flush=True)
            with given.results.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
