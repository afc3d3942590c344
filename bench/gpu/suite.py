"""All measurements of a GPU in under eight minutes.

    python -m bench.gpu.suite                 needs torch, triton, numpy and safetensors only
    python -m bench.gpu.suite --smoke         the same code on tiny sizes, on a CPU in seconds

Sections: accuracy of every op at real sizes against float64; the machine's limits; whole training
steps of 8B models with random weights; the step as `engine train` runs it (packed, ranks, biases,
DoRA, dropout, offload, mixtures, Qwen3-Next, every weight) beside its plan; steps of small batches
from CUDA graphs beside the same launch by launch; where a step's time goes; the same steps through
transformers + PEFT + bitsandbytes, through unsloth and through torchtune, where they are installed
(what is not, or fails, has a line with the reason); and the table of ops. Each has a share of the
time, and unused time passes on; each item has a limit. Items run in processes of their own
(`engine.selfcheck.isolation`): one that fails is recorded with its error and the others go on.
After every section the results so far are written as `gpu_suite.json` and `gpu_suite.md`, to
--output, else to $OUT if it is set, else to `bench/results`. Exit status 1 where an item failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.suite_report import render
from bench.gpu.suite_sections import SECTIONS
from engine.provenance import measured_on
from engine.selfcheck.isolation import Outcome, run_apart, run_here

_MODULE = "bench.gpu.suite_sections"


def run_suite(
    sections: Sequence[str],
    options: dict[str, Any],
    *,
    seconds: float,
    output: Path,
    apart: bool,
) -> dict[str, Any]:
    """Run the sections in turn and write what is known after each; returns all results."""
    started = time.monotonic()
    results: dict[str, Any] = {
        "machine": measured_on(torch.device(options["device"])),
        "smoke": options["smoke"],
        "sections": {},
    }
    output.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(sections):
        weights = sum(SECTIONS[later].weight for later in sections[number:])
        left = seconds - (time.monotonic() - started)
        deadline = time.monotonic() + max(0.0, left) * SECTIONS[name].weight / weights
        results["sections"][name] = _run_section(name, options, deadline, apart)
        results["seconds"] = round(time.monotonic() - started, 1)
        if name == "roofline":
            options = options | {"roofline": _first_data(results["sections"][name])}
        (output / "gpu_suite.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "gpu_suite.md").write_text(render(results))
        print(f"{name}: {_tally(results['sections'][name])}", flush=True)
    return results


def _run_section(
    name: str, options: dict[str, Any], deadline: float, apart: bool
) -> list[dict[str, Any]]:
    started = time.monotonic()
    try:
        items = SECTIONS[name].items(options)
    except Exception as error:
        # A section that cannot even list its items is recorded like an item that failed.
        listed = Outcome("items", 0.0, error=f"{type(error).__name__}: {error}")
        return [listed.__dict__]
    if apart:
        outcomes = run_apart(_MODULE, name, items, options, deadline, SECTIONS[name].seconds)
    else:
        outcomes = run_here(_MODULE, name, items, options, deadline)
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return [outcome.__dict__ for outcome in outcomes]


def _first_data(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((outcome["data"] for outcome in outcomes if outcome["data"] is not None), None)


def failed(outcome: dict[str, Any]) -> bool:
    """Whether an item gave an error, or an accuracy outside the rule."""
    data = outcome["data"]
    return outcome["error"] is not None or (data is not None and data.get("passed") is False)


def _tally(outcomes: Sequence[dict[str, Any]]) -> str:
    wrong = sum(failed(outcome) for outcome in outcomes)
    return f"{len(outcomes)} items" + (f", {wrong} failed or were not run" if wrong else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.suite", description="Measure a GPU.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in this process")
    parser.add_argument("--minutes", type=float, default=7.75, help="time for all sections")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="folder for gpu_suite.json and gpu_suite.md")
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not given.smoke:
        print("There is no CUDA GPU here; --smoke tries the suite on a CPU.", file=sys.stderr)
        return 2
    options: dict[str, Any] = {
        "smoke": given.smoke,
        "device": "cuda" if cuda else "cpu",
        "seconds": 0.001 if given.smoke else 0.1,
        "roofline": None,
        "peers": "peers" in given.sections,
    }
    output = given.output or _default_output(given.smoke)
    seconds = 60 * given.minutes
    results = run_suite(
        given.sections, options, seconds=seconds, output=output, apart=not given.smoke
    )
    print(render(results))
    print(f"Written to {output}")
    return int(any(failed(o) for section in results["sections"].values() for o in section))


def _default_output(smoke: bool) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    if smoke:
        return Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    return Path(__file__).parents[1] / "results"


if __name__ == "__main__":
    sys.exit(main())
