"""Every directory that is written here loads in transformers 4 and 5 with equal logits.

The second transformers lives in a folder of its own beside the environment, which `make interop`
fills, and runs in one process for all directories.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import engine
from engine.config.choices import PruneMode
from engine.config.tasks.pruning import PruneSettings
from engine.config.train_config import TrainConfig
from engine.model_sources.load_model import load_model
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
OLD = Path(os.environ.get("ENGINE_OLD_TRANSFORMERS", Path(sys.prefix) / "transformers4"))
IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
# Families that transformers 4.57 knows.
FAMILIES = (
    "llama", "llama3", "mistral", "qwen2", "qwen2_moe", "qwen2_swa", "qwen3", "qwen3_moe",
    "qwen3_next", "qwen3_yarn", "smollm3",
)  # fmt: skip
# Its own class of transformers 4 takes hidden_size / heads for the size of a head.
WITHOUT_HEAD_DIM = {("structural", "qwen2_moe")}
READER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        sys.exit(f"{folder}: {error}")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
"""


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result: torch.Tensor = model(IDS).logits
    return result


def read_by_the_old_one(folders: list[Path]) -> list[torch.Tensor]:
    """Logits in transformers 4, of all folders in one process."""
    assert (OLD / "transformers").is_dir(), f"{OLD} is not filled; run: make interop"
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(IDS.tolist()), *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(OLD)},
        capture_output=True,
        text=True,
        cwd=folders[0],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / "logits.pt", weights_only=True) for folder in folders]


def scaled(target: Path, **changes: Any) -> Path:
    """A copy of a golden model with another rotary scaling or other changes of its config.json."""
    target.mkdir()
    shutil.copy(GOLDEN / "llama" / "model.safetensors", target)
    raw = json.loads((GOLDEN / "llama" / "config.json").read_text())
    raw.pop("rope_parameters", None)
    (target / "config.json").write_text(json.dumps(raw | changes))
    return target


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "theta, old": {"rope_theta": 5e5},
    "theta, new": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3, old": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3, new": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "linear, older": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "yarn, new": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        }
    },
    "dynamic, old": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}  # fmt: skip


def write_gguf(target: Path) -> Path:
    """The golden qwen2 as a GGUF file."""
    raw = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(3e5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, raw["num_hidden_layers"])
    for name, tensor in load_file(GOLDEN / "qwen2" / "model.safetensors").items():
        stem, _, leaf = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def pruned(model: Path, settings: PruneSettings, target: Path) -> None:
    prune(model, target, settings)


def written(tmp_path: Path) -> dict[str, Path]:
    """One directory of every kind that this program writes."""
    out: dict[str, Path] = {}

    def put(name: str, write: Callable[[Path], object]) -> None:
        out[name] = tmp_path / "out" / name.replace(" ", "-")
        write(out[name])

    modes: tuple[PruneMode, ...] = ("zero", "structural")
    for family, mode in itertools.product(FAMILIES, modes):
        if (mode, family) not in WITHOUT_HEAD_DIM:
            settings = PruneSettings(fraction=0.5, mode=mode, granularity="kv-group", scope="layer")
            put(f"{mode} {family}", partial(pruned, GOLDEN / family, settings))
    for name, changes in CHANGES.items():
        base = scaled(tmp_path / name.replace(" ", ""), **changes)
        adapter = random_adapter(base, tmp_path / f"{name}-adapter")
        put(f"merged {name}", partial(merge, base, adapter))
    file = write_gguf(tmp_path / "m.gguf")
    adapter = random_adapter(GOLDEN / "qwen2", tmp_path / "gguf-adapter")
    put("merged gguf", lambda t: merge(file, adapter, t))
    put("merged gguf in 16 bits", lambda t: merge(file, adapter, t, dtype="bfloat16"))
    put("pruned gguf", lambda t: prune(file, t, PruneSettings(fraction=0.25)))
    tied = random_adapter(GOLDEN / "llama3", tmp_path / "head", ("lm_head",))
    put("an untied head", lambda t: merge(GOLDEN / "llama3", tied, t))
    put("all weights", lambda t: full_fine_tuning(tmp_path, t))
    put("forge", lambda t: forged(tmp_path, t))
    return out


def random_adapter(base: Path, target: Path, targets: tuple[str, ...] = ("q_proj",)) -> Path:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(target, save_embedding_layers=False)
    return target


def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Say {n}", "response": "ab"}) + "\n" for n in range(8))
    )
    return path


def full_fine_tuning(tmp_path: Path, target: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    config = TrainConfig(
        model=str(model), data=str(rows(tmp_path)), output_dir=tmp_path / "run", method="full",
        max_steps=1,
    )  # fmt: skip
    result = engine.train(config, console=False)
    assert result.output_path is not None
    result.output_path.rename(target)


def forged(tmp_path: Path, target: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    options: dict[str, Any] = {"cycles": 1, "fraction": 0.25, "max_steps": 1, "heldout": 0.25}
    engine.forge(
        model=str(model), data=[str(rows(tmp_path))], output_dir=tmp_path / "forge", **options
    )
    last = max((tmp_path / "forge").glob("**/config.json"), key=lambda path: path.stat().st_mtime)
    last.parent.rename(target)


def test_every_directory_loads_in_both_with_equal_logits(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folders = written(tmp_path)
    assert len(folders) >= 35
    old = read_by_the_old_one(list(folders.values()))
    for (name, folder), theirs in zip(folders.items(), old, strict=True):
        ours, new = load_model(folder)(IDS), logits(folder)
        assert float((new - ours).abs().max()) <= 5e-5, name
        assert float((new - theirs).abs().max()) <= 5e-5, name
