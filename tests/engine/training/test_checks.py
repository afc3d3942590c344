"""Whatever can be checked without weights is checked alike by dry run, plan and train.

The model's weight file here is torn in the middle: whoever opens it raises another error than the
one expected, so a message that comes through shows that the file was not looked at.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import EngineError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.open import describe_model
from engine.training.adapters.selection import leaves_of, selection
from engine.training.checks import saved_bytes
from engine.verbs.training.plan import plan
from engine.verbs.training.train import dry_run, train
from models.adapters import adapter_tensors, add_lora
from models.tensor_names import skeleton
from tests.support.small_runs import small_run
from tests.support.tiny_model import GOLDEN, write_tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WRONG: dict[str, dict[str, Any]] = {
    "unknown target": {"target_modules": "q_proj,v_prj"},
    "head as a target": {"target_modules": "lm_head"},
    "embedding as a target": {"target_modules": "embed_tokens,q_proj"},
    "target of another family": {"target_modules": "in_proj_qkv"},
    "experts' router": {"target_modules": "gate"},
    "targets with a part that is not there": {"target_modules": "self_attn.up_proj"},
    "a pattern of no module": {"target_modules": r".*layers\.9\..*"},
    "layers that are not there": {"layers": "1-2"},
    "excluding what is not there": {"exclude_modules": "v_prj"},
    "excluding everything": {"target_modules": "q_proj", "exclude_modules": "q_proj"},
    "a rank for nothing": {"target_modules": "q_proj", "rank_pattern": "k_proj=4"},
    "an alpha for nothing": {"alpha_pattern": "q_prj=4"},
    "policies for 99 layers": {"gradient_checkpointing": "full:99"},
    "policies for one layer": {"gradient_checkpointing": "full:1"},
    "policies for three layers": {"gradient_checkpointing": "none:1,full:2"},
    "policies beyond the layers": {"gradient_checkpointing": "selective:5,none"},
    "missing data": {"data": "nope.jsonl"},
    "one of two data files": {"data": ["ROWS", "nope.jsonl"]},
    "folder without data": {"data": "EMPTY"},
    "missing held-out rows": {"eval_data": "nope.jsonl"},
    "empty data": {"data": "NOTHING"},
    "broken data": {"data": "BROKEN"},
    "data of another kind": {"data": "KEYS"},
    "broken held-out rows": {"eval_data": "BROKEN"},
    "filter that leaves nothing": {"min_rating": 5},
    "category that leaves nothing": {"category": "poems"},
    "output is a file": {"output_dir": "FILE"},
    "output under a file": {"output_dir": "FILE/run"},
    "output in /proc": {"output_dir": "/proc/run"},
    "output is a broken link": {"output_dir": "LINK"},
    "tracker": {"report_to": "wandb"},
    "missing adapter": {"init_adapter": "nope"},
    "adapter that is a file": {"init_adapter": "FILE"},
    "adapter without a configuration": {"init_adapter": "EMPTY"},
    "adapter of another rank": {"init_adapter": "ADAPTER", "lora_rank": 8},
    "adapter of another alpha": {"init_adapter": "ADAPTER", "lora_alpha": 8.0},
    "adapter of other targets": {"init_adapter": "ADAPTER", "target_modules": "qv"},
    "adapter with DoRA": {"init_adapter": "ADAPTER", "use_dora": True},
    "adapter of other shapes": {"init_adapter": "SHAPES"},
    "adapter of more layers": {"init_adapter": "LAYERS"},
    "adapter with rsLoRA": {"init_adapter": "ADAPTER", "use_rslora": True},
    "missing teacher": {"teacher": "nope"},
    "teacher of another vocabulary": {"teacher": "TEACHER"},
    "float16 on a CPU": {"dtype": "float16"},
    "graphs on a CPU": {"cuda_graphs": True},
    "embedding of a tied head on the host": {"embedding_on": "host", "model": "TIED"},
    "DoRA on experts": {"use_dora": True, "model": "EXPERTS"},
    "targets of a model without them": {"target_modules": "k_proj,in_proj_z"},
}
IN_SETTINGS: dict[str, dict[str, Any]] = {
    "evaluation without rows": {"eval_every": 5},
    "both kinds of held-out rows": {"heldout": 0.1, "eval_data": "ROWS"},
    "teacher of all weights": {"teacher": "TEACHER", "method": "full"},
    "resume and overwrite": {"resume": "auto", "overwrite": True},
    "two lengths of warm-up": {"warmup_steps": 1, "warmup_ratio": 0.1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that wrong settings name, and models whose weights are torn."""
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    rows = [{"prompt": f"Word {n}?", "response": "abc."} for n in range(4)]
    (tmp_path / "ROWS").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "NOTHING").write_text("\n")
    (tmp_path / "BROKEN").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "KEYS").write_text('{"left": "a", "right": "b"}\n')
    model = write_tiny_model(tmp_path / "MODEL")
    config = describe_model(model).config
    write_tiny_model(tmp_path / "TIED")
    edit(tmp_path / "TIED" / "config.json", tie_word_embeddings=True)
    write_tiny_model(tmp_path / "TEACHER")
    edit(tmp_path / "TEACHER" / "config.json", vocab_size=config.vocab_size + 8)
    write_tiny_model(tmp_path / "EXPERTS", "qwen3_moe")
    for name in ("MODEL", "TIED", "TEACHER", "EXPERTS"):
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    shapes = {
        p.stored: (p.rows, p.columns)
        for p in selection(TrainConfig(model=str(model), data="d"), config)
    }
    adapter(tmp_path / "ADAPTER", shapes, model)
    wrong = {path: (out + 1, inner) for path, (out, inner) in shapes.items()}
    adapter(tmp_path / "SHAPES", wrong, model)
    more = {path.replace("layers.1", "layers.7"): shape for path, shape in shapes.items()}
    adapter(tmp_path / "LAYERS", shapes | more, model)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter(folder: Path, shapes: dict[str, tuple[int, int]], model: Path) -> None:
    pairs = {p: (torch.ones(16, inner), torch.ones(out, 16)) for p, (out, inner) in shapes.items()}
    save_adapter(folder, AdapterConfig(16, 32, TARGETS, str(model)), pairs)


def settings(folder: Path, changes: dict[str, Any]) -> TrainConfig:
    names = {path.name for path in folder.iterdir()} | {"nope"}

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        known = isinstance(value, str) and value.split("/")[0].split(".")[0] in names
        return str(folder / value) if known else value

    plain = {"model": "MODEL", "data": "ROWS", "output_dir": "run", "device": "cpu", "plot": False}
    given = {name: placed(value) for name, value in (plain | changes).items()}
    given["output_dir"] = folder / given["output_dir"]
    return TrainConfig(**given)


def answers(config: TrainConfig) -> dict[str, str]:
    """What each verb says of a run, or "" where it has nothing against it."""
    verbs: dict[str, Callable[[TrainConfig], object]] = {
        "train": lambda config: train(config, console=False),
        "dry run": dry_run,
        "plan": plan,
    }
    said = dict.fromkeys(verbs, "")
    for name, verb in verbs.items():
        try:
            verb(config)
        except EngineError as error:
            said[name] = str(error)
    return said


def test_there_are_enough_wrong_settings() -> None:
    assert len(WRONG) + len(IN_SETTINGS) >= 40


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_has_one_answer_before_the_weights(name: str, folder: Path) -> None:
    config = settings(folder, WRONG[name])
    said = answers(config)
    assert "" not in said.values(), said
    assert len(set(said.values())) == 1, said
    assert "model.safetensors" not in said["train"]
    assert not (folder / "run" / "manifest.json").exists()


@pytest.mark.parametrize("name", IN_SETTINGS)
def test_settings_that_exclude_each_other_never_become_a_run(name: str, folder: Path) -> None:
    with pytest.raises(EngineError, match="The configuration cannot be used"):
        settings(folder, IN_SETTINGS[name])


def test_the_torn_weights_are_noticed_where_they_are_opened(folder: Path) -> None:
    """Only then: a right setting ends at the weights in training, and is planned."""
    said = answers(settings(folder, {}))
    assert "model.safetensors" in said["train"]
    assert said["train"] == said["dry run"]
    assert said["plan"] == ""


def test_a_device_that_is_not_there_is_refused_before_the_model(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = settings(folder, {"device": "cuda"})
    said = answers(config)
    assert said["train"] == said["dry run"]
    assert "--device asks for cuda" in said["train"]
    assert said["plan"] == "", "a plan is made for machines that are elsewhere"


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir()))
@pytest.mark.parametrize("targets", ["all", "attn"])
def test_the_shapes_of_an_adapter_are_those_of_the_graph(family: str, targets: str) -> None:
    config = TrainConfig(model="m", data="d", target_modules=targets, lora_rank=4)
    model = describe_model(GOLDEN / family).config
    chosen = selection(config, model)
    graph = skeleton(model)
    add_lora(graph, rank=4, targets=leaves_of(chosen))
    real = {
        path: (parts[1].shape[0], parts[0].shape[1])
        for path, parts in adapter_tensors(graph).items()
    }
    shapes = {}
    for projection in chosen:
        parent, _, leaf = projection.stored.rpartition(".")
        for number in range(projection.count):
            path = f"{parent}.{number}.{leaf}" if projection.is_expert else projection.stored
            shapes[path] = (projection.rows, projection.columns)
    assert shapes == real
    count = sum(p.numel() for p in graph.parameters() if p.requires_grad)
    assert saved_bytes(config, model, torch.float32) == count * 6


def test_a_full_disk_is_noticed_before_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 8 << 20

    monkeypatch.setattr("engine.runs.output.shutil.disk_usage", lambda _: Usage)
    said = answers(settings(folder, {}))
    assert len(set(said.values())) == 1
    assert "has 8.00 MiB free and a checkpoint needs" in said["train"]


@pytest.mark.parametrize(("file", "shared"), [("rows.jsonl", 4), ("other.jsonl", 0)])
def test_heldout_rows_that_are_trained_on_are_told(
    file: str,
    shared: int,
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_rows(4)
    (tmp_path / "other.jsonl").write_text('{"prompt": "Other?", "response": "Yes."}\n')
    dry_run(small_run(tiny_model, tmp_path / "rows.jsonl", tmp_path / "run",
                      eval_data=tmp_path / file))  # fmt: skip
    told = [r.getMessage() for r in caplog.records if "held-out rows stand" in r.getMessage()]
    assert len(told) == bool(shared)
    assert not shared or told[0].startswith(f"{shared} of {shared} held-out rows stand among")
