"""Host memory of the verbs that write a large model.

Weights are random and written once, in 16 bits. Every verb then reads that directory, as it reads a
model that was downloaded, in a process of its own. What it writes is deleted before the next one
starts, so the disk needs space for two models.

    resident   most bytes in memory at once, the mapped parts of files among them (ru_maxrss)
    own        most bytes that belong to no file, looked at every five milliseconds (RssAnon)

Run as ``python -m bench.cpu.write_memory [--model NAME] [--layers N] [--only WORK ...]``. With
``--layers`` the model has that depth, which shows whether depth costs memory. One JSON row for each
verb goes to bench/results/write_memory_cpu.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.memory.model_shapes import preset_raw
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.provenance import device_name, git_commit
from models.config.model_config import ModelConfig
from models.tensor_names import PROJECTIONS, expected_tensors

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "write_memory_cpu.jsonl"
RANK = 16
FIRST = "quantize --model SHAPE --bits 16 --random-weights --output OUT"
WORKS = {
    "quantize 16": FIRST,
    "quantize 8": "quantize --model MODEL --bits 8 --output OUT",
    "quantize 4": "quantize --model MODEL --bits 4 --output OUT",
    "quantize 4, adapter": "quantize --model MODEL --bits 4 --adapter ADAPTER --output OUT",
    "merge": "merge --model MODEL --adapter ADAPTER --output OUT",
    "merge dequantised": "merge --model MODEL --adapter ADAPTER --onto dequantised --output OUT",
    "merge two": "merge --model MODEL --adapter ADAPTER --adapter HEAD=0.5 --output OUT",
    "gguf f16": "export gguf --model MODEL --type f16 --output OUT.gguf",
    "gguf q8_0": "export gguf --model MODEL --type q8_0 --output OUT.gguf",
    "gguf q4_k_m": "export gguf --model MODEL --type q4_k_m --output OUT.gguf",
    "gguf adapter": "export gguf --model MODEL --adapter ADAPTER --output OUT.gguf",
    "export adapter": "export adapter --adapter ADAPTER --output OUT",
    "prune structural": "prune --model MODEL --metric l2-weights --fraction 0.25 --mode structural "
    "--output OUT",
}
"""Words of the command line; ADAPTER is of all projections, HEAD of them and of the head."""


def write_shape(folder: Path, model: str, layers: int | None) -> ModelConfig:
    """A folder with nothing but the config.json of `model`, with its depth or another."""
    raw = preset_raw(model)
    if raw is None:
        raise SystemExit(f"there is no size named {model}; engine plan --model lists them")
    if layers is not None:
        raw = raw | {"num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_dict(raw)


def write_adapter(folder: Path, config: ModelConfig, targets: Sequence[str]) -> None:
    """An adapter of rank 16 of the modules named `targets`."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        name.removesuffix(".weight"): tuple(
            torch.randn(size, generator=generator) * 0.01
            for size in ((RANK, shape[1]), (shape[0], RANK))
        )
        for name, shape in expected_tensors(config).items()
        if name.removesuffix(".weight").rpartition(".")[2] in targets
    }
    save_adapter(folder, AdapterConfig(RANK, 2 * RANK, list(targets)), pairs)


def own_bytes(process: int) -> int:
    """Bytes of a process that belong to no file; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def measured(words: Sequence[str]) -> dict[str, Any]:
    """Run `engine` with `words` in a process of its own; what it took."""
    began, own = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "cli.main", *words]
        child = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while True:
            process, status, usage = os.wait4(child.pid, os.WNOHANG)
            if process:
                break
            own = max(own, own_bytes(child.pid))
            time.sleep(0.005)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"engine {' '.join(words)} failed:\n{said.read()[-4000:]}")
    return {
        "resident_bytes": 1024 * usage.ru_maxrss,
        "own_bytes": own,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.write_memory", description="Measure memory.")
    parser.add_argument("--model", default="qwen3-8b", help="a size by name")
    parser.add_argument("--layers", type=int, help="another depth than the model's")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--folder", type=Path, help="where there is space for two models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    facts = {
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": options.model,
    }
    with tempfile.TemporaryDirectory(prefix="engine-bench-", dir=options.folder) as name:
        folder = Path(name)
        config = write_shape(folder / "shape", options.model, options.layers)
        write_adapter(folder / "adapter", config, sorted(PROJECTIONS))
        write_adapter(folder / "head", config, [*sorted(PROJECTIONS), "lm_head"])
        names = {"SHAPE": "shape", "MODEL": "model", "ADAPTER": "adapter", "HEAD": "head"}
        needs_model = any("MODEL" in WORKS[work] for work in options.only)
        works = [*([] if "quantize 16" in options.only or not needs_model else ["quantize 16"])]
        for work in [*works, *(each for each in WORKS if each in options.only)]:
            first = work == "quantize 16"
            text = WORKS[work].replace("OUT", str(folder / ("model" if first else "out")))
            for word, path in names.items():
                text = text.replace(f" {word}", f" {folder / path}")
            words = text.split()
            figures = measured(words)
            output = Path(words[words.index("--output") + 1])
            written = size_of(output)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = {"time": now, **facts, "layers": config.num_hidden_layers, "work": work}
            row |= {"command": WORKS[work], "written_bytes": written, **figures}
            print(
                f"{work}: {figures['resident_bytes'] / 1e9:.2f} GB resident, "
                f"{figures['own_bytes'] / 1e9:.2f} GB own, {figures['cpu_seconds']:.0f} s of the "
                f"processor, {written / 1e9:.2f} GB written",
                flush=True,
            )
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not first:
                delete(output)


if __name__ == "__main__":
    main()
