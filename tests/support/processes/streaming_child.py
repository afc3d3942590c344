"""How far each verb that writes a model raises resident memory, and loading one.

The process does nothing else.

Usage: streaming_child.py FOLDER CONFIG LAYERS. CONFIG is a config.json's text, LAYERS a JSON list;
a JSON list with an object for each number of layers is printed. Linux.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engine.config.tasks.pruning import PruneSettings
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.model_sources.safetensors.file import save_file
from engine.verbs.models.export import export_gguf
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.models.quantize import quantize
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors

RANK = 4


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def rise(work: Callable[[], object]) -> tuple[int, int]:
    """The highest rise of resident memory during `work`, and the rise that is left by it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = work()
    high, left = status("VmHWM") - before, status("VmRSS") - before
    del result
    return high, left


def write_model(folder: Path, raw: dict[str, object]) -> tuple[Path, Path, Path]:
    """A model of random bfloat16 weights, an adapter of all projections, one of the head too."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = expected_tensors(ModelConfig.from_dict(raw))
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapters = []
    for name, ends in (
        ("adapter", ("_proj.weight",)),
        ("head", ("_proj.weight", "lm_head.weight")),
    ):
        pairs = {
            path.removesuffix(".weight"): (
                torch.ones(RANK, shape[1]) / 1000,
                torch.ones(shape[0], RANK) / 1000,
            )
            for path, shape in shapes.items()
            if path.endswith(ends)
        }
        targets = sorted({path.rpartition(".")[2] for path in pairs})
        config = AdapterConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        save_adapter(folder / name, config, pairs)
        adapters.append(folder / name)
    return folder, adapters[0], adapters[1]


def works(model: Path, adapter: Path, head: Path, out: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each writes below `out`."""
    structural = PruneSettings(fraction=0.5, metric="l2-weights", mode="structural")
    return {
        "merge": partial(merge, model, adapter, out / "merged"),
        "unverified": partial(merge, model, adapter, out / "unverified", verify=False),
        "head": partial(merge, model, head, out / "head", verify=False),
        "16": partial(quantize, model, out / "16", bits=16),
        "8": partial(quantize, model, out / "8", bits=8),
        "4": partial(quantize, model, out / "4", bits=4),
        "4 of a gguf": partial(quantize, out / "m.gguf", out / "again", bits=4),
        "prune": partial(prune, model, out / "pruned", structural),
        "gguf of a gguf": partial(
            export_gguf, model=str(out / "m.gguf"), output=out / "again.gguf", type="q8_0"
        ),
        "gguf": partial(export_gguf, model=str(model), output=out / "other.gguf", type="q8_0"),
    }


def main(folder: Path, raw: dict[str, object], layers: list[int]) -> None:
    rises = []
    first = write_model(folder / "first", raw | {"num_hidden_layers": 1})
    merge(first[0], first[1], folder / "first-merged")
    # Modules are imported and the libraries' own buffers made before something is measured.
    small = {**raw, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 512}
    for count, config in ((1, small), *((count, raw) for count in layers)):
        folder = folder / "next"
        model, adapter, head = write_model(folder / "model", config | {"num_hidden_layers": count})
        export_gguf(model=str(model), output=folder / "m.gguf", type="q8_0")
        measured = {
            name: rise(work)[0] for name, work in works(model, adapter, head, folder).items()
        }
        load = partial(build_model, quantization="nf4", dtype=torch.bfloat16)
        measured["load"], measured["left"] = rise(partial(load, open_model_source(model)))
        rises.append(measured)
    print(json.dumps(rises[1:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
