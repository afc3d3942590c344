"""How far merging and loading raise resident memory, in a process that does nothing else.

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

from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.model_sources.safetensors.file import save_file
from engine.verbs.models.merge import merge
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


def write_model(folder: Path, raw: dict[str, object]) -> tuple[Path, Path]:
    """A model of random bfloat16 weights and an adapter of all its projections."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = expected_tensors(ModelConfig.from_dict(raw))
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pairs = {
        name.removesuffix(".weight"): (
            torch.ones(RANK, shape[1]) / 1000,
            torch.ones(shape[0], RANK) / 1000,
        )
        for name, shape in shapes.items()
        if name.endswith("_proj.weight")
    }
    targets = sorted({path.rpartition(".")[2] for path in pairs})
    save_adapter(
        folder / "adapter", AdapterConfig(r=RANK, lora_alpha=RANK, target_modules=targets), pairs
    )
    return folder, folder / "adapter"


def main(folder: Path, raw: dict[str, object], layers: list[int]) -> None:
    rises = []
    # Modules are imported and the libraries' own buffers made before something is measured.
    merge(*write_model(folder / "first", raw | {"num_hidden_layers": 1}), folder / "first-merged")
    for count in layers:
        model, adapter = write_model(folder / f"m{count}", raw | {"num_hidden_layers": count})
        merged, _ = rise(partial(merge, model, adapter, folder / f"merged{count}"))
        unverified, _ = rise(
            partial(merge, model, adapter, folder / f"unverified{count}", verify=False)
        )
        load = partial(build_model, quantization="nf4", dtype=torch.bfloat16)
        loaded, left = rise(partial(load, open_model_source(model)))
        rises.append({"merge": merged, "unverified": unverified, "load": loaded, "left": left})
    print(json.dumps(rises))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
