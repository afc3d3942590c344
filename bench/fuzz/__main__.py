"""`make fuzz`: fuzz every reader, and store what it finds.

`python -m bench.fuzz [TARGET ...] --seconds 60`. With `pip install atheris` inputs are guided by
coverage; without it they are changed at random, from the seeds and the corpus. An input that ends
in a raw exception, or takes over 50 ms, is shortened and written to `bench/fuzz/corpus/TARGET/`;
`tests/test_fuzz_corpus.py` reads every one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter

from bench.fuzz.targets import CORPUS, TARGETS, Target
from bench.torture.damage import damaged, with_odd_value

MOST_SECONDS = 0.05


def fault_of(target: Target, data: bytes) -> str | None:
    """What is wrong with how an input is read; None for nothing."""
    started = time.process_time()
    try:
        target.fuzz_one(data)
    except Exception as error:
        return type(error).__name__
    return "slow" if time.process_time() - started > MOST_SECONDS else None


def shortened(target: Target, data: bytes, fault: str) -> bytes:
    """The input without what can be left out, so that the fault is the same."""
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if fault_of(target, shorter) == fault:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def store(name: str, data: bytes, fault: str) -> None:
    """Write a find to the corpus."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    short = shortened(TARGETS[name], data, fault)
    path = folder / f"{fault}-{hashlib.sha256(short).hexdigest()[:12]}"
    path.write_bytes(short)
    print(f"{name}: {fault} -> {path}", flush=True)


def at_random(name: str, seconds: float, seed: int) -> int:
    """Change seeds at random for so long; the number of finds."""
    target, chance, counts = TARGETS[name], random.Random(seed), Counter[str]()
    seeds = [*target.seeds(), *(path.read_bytes() for path in sorted(CORPUS.glob(f"{name}/*")))]
    fault_of(target, seeds[0])  # imports
    finds, until, worst = set[str](), time.monotonic() + seconds, 0.0
    while time.monotonic() < until:
        data = _changed(chance.choice(seeds), chance)
        started = time.process_time()
        fault = fault_of(target, data)
        worst = max(worst, time.process_time() - started)
        if fault == "slow":
            fault = fault_of(target, data)  # another process may have had the processor's cache
        counts[fault or "as it should"] += 1
        if fault is not None and fault not in finds:
            finds.add(fault)
            store(name, data, fault)
    print(json.dumps({"target": name, "worst_ms": round(1000 * worst, 1), **counts}), flush=True)
    return len(finds)


def _changed(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        try:
            return json.dumps(with_odd_value(json.loads(data), chance)).encode()
        except ValueError:
            pass
    return damaged(data, chance, first=4096)


def guided(name: str, seconds: float) -> int:
    """The same with atheris, in a process of its own: it ends at the first find."""
    code = (
        "import atheris, sys, logging\n"
        "logging.disable(logging.CRITICAL)\n"
        "with atheris.instrument_imports(include=['engine']):\n"
        "    from bench.fuzz.targets import TARGETS\n"
        "    from bench.fuzz.__main__ import fault_of, store\n"
        "    name = sys.argv.pop(1)\n"
        "    TARGETS[name].fuzz_one(TARGETS[name].seeds()[0])\n"
        "def one(data):\n"
        "    fault = fault_of(TARGETS[name], data)\n"
        "    if fault is not None and fault_of(TARGETS[name], data) == fault:\n"
        "        store(name, data, fault)\n"
        "        raise RuntimeError(fault)\n"
        "atheris.Setup(sys.argv, one)\n"
        "atheris.Fuzz()\n"
    )
    seeds = CORPUS.with_name("seeds") / name
    seeds.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(TARGETS[name].seeds()):
        (seeds / str(number)).write_bytes(data)
    words = [f"-max_total_time={int(seconds)}", "-artifact_prefix=/dev/null", str(seeds)]
    words += [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
    return subprocess.run([sys.executable, "-c", code, name, *words], check=False).returncode


def main() -> int:
    """Fuzz the targets that are named, or all; 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of strangers' bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=time.time_ns())
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    has_atheris = importlib.util.find_spec("atheris") is not None
    print(f"{'guided by coverage (atheris)' if has_atheris else 'at random'}", flush=True)
    finds = [
        guided(name, asked.seconds) if has_atheris else at_random(name, asked.seconds, asked.seed)
        for name in asked.targets or TARGETS
    ]
    return int(any(finds))


if __name__ == "__main__":
    raise SystemExit(main())
