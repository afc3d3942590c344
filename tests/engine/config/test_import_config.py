"""Configurations of other programs become settings of ours, and nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import main as cli
from engine.config.programs.as_yaml import as_yaml, import_config, refusal
from engine.config.programs.detect import PROGRAMS, translate
from engine.config.sources import load_config
from engine.errors import ConfigError

AXOLOTL = """
base_model: org/model-8b
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - {path: rows.jsonl, type: chat_template}
val_set_size: 0.1
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
adam_beta2: 0.95
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
weight_decay: 0.01
eval_steps: 50
wandb_project: mine
wandb_entity:
special_tokens: {pad_token: <pad>}
train_on_inputs: false
chat_template: tokenizer_default
deepspeed: zero3.json
my_own_key: 7
"""
AXOLOTL_SETTINGS = {
    "model": "org/model-8b", "method": "qlora", "lora_rank": 32, "lora_alpha": 16,
    "lora_dropout": 0.05, "target_modules": "all", "data": ["rows.jsonl"], "heldout": 0.1,
    "max_length": 4096, "packing": True, "batch_size": 2, "accumulate": 8, "epochs": 3,
    "optimizer": "adamw8bit", "lr_schedule": "cosine", "learning_rate": 2e-4,
    "betas": [0.9, 0.95], "dtype": "auto", "gradient_checkpointing": "auto", "warmup_ratio": 0.1,
    "weight_decay": 0.01, "eval_every": 50, "report_to": ["wandb"],
}  # fmt: skip
FACTORY = """
model_name_or_path: org/model-8b
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
lora_rank: 8
dataset: mine, other
dataset_dir: sets
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
output_dir: saves/one
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
num_train_epochs: 2.5
lr_scheduler_type: polynomial
warmup_steps: 0.1
fp16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
load_best_model_at_end: true
metric_for_best_model: eval_loss
greater_is_better: false
enable_thinking: false
report_to: none
ddp_timeout: 180000000
"""
FACTORY_SETTINGS = {
    "model": "org/model-8b", "method": "qlora", "target_modules": "q_proj,v_proj", "lora_rank": 8,
    "lora_alpha": 16, "lora_dropout": 0.0, "max_length": 1024, "limit_rows": 1000,
    "output_dir": "saves/one", "log_every": 10, "checkpoint_every": 500, "plot": True,
    "batch_size": 1, "accumulate": 1, "learning_rate": 5e-5, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "epochs": 3, "optimizer": "adamw", "warmup_ratio": 0.1,
    "lr_schedule": "polynomial", "min_lr_ratio": pytest.approx(1e-7 / 5e-5),
    "dtype": "float16", "heldout": 0.1, "eval_every": 500, "load_best_at_end": True,
    "save_best": "eval_loss",
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
TRL = """
model_name_or_path: org/model-1b
dataset_name: org/rows
use_peft: true
load_in_4bit: true
lora_r: 32
lora_target_modules: [q_proj, o_proj]
max_length: 2048
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 1
gradient_checkpointing: true
bf16: true
attn_implementation: flash_attention_2
output_dir: out
push_to_hub: false
"""
TRL_SETTINGS = {
    "model": "org/model-1b", "method": "qlora", "double_quant": False, "lora_rank": 32,
    "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "o_proj"],
    "data": ["org/rows"], "max_length": 2048, "batch_size": 4, "accumulate": 2,
    "learning_rate": 1e-4, "epochs": 1, "gradient_checkpointing": "auto", "dtype": "bfloat16",
    "output_dir": "out", "lr_schedule": "linear", "optimizer": "adamw", "warmup_steps": 0,
    "weight_decay": 0.0, "max_grad_norm": 1.0,
}  # fmt: skip
MLX = """
model: org/model-1b
train: true
fine_tune_type: dora
optimizer: adamw
data: rows
seed: 7
num_layers: -1
batch_size: 2
iters: 600
learning_rate: 1e-5
steps_per_report: 5
steps_per_eval: 200
adapter_path: adapters
save_every: 100
max_seq_length: 1024
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.1
"""
MLX_SETTINGS = {
    "model": "org/model-1b", "method": "lora", "use_dora": True, "seed": 7, "batch_size": 2,
    "max_steps": 600, "learning_rate": 1e-5, "log_every": 5, "checkpoint_every": 100,
    "output_dir": "adapters", "max_length": 1024, "gradient_checkpointing": "none",
    "lora_rank": 8, "lora_alpha": 160.0, "lora_dropout": 0.1, "optimizer": "adamw",
    "target_modules": ["q_proj", "v_proj"], "lr_schedule": "constant", "warmup_steps": 0,
}  # fmt: skip
CASES = {
    "axolotl": (AXOLOTL, AXOLOTL_SETTINGS, {"deepspeed", "my_own_key"}),
    "llama-factory": (
        FACTORY, FACTORY_SETTINGS, {"num_train_epochs", "dataset: other"},
    ),
    "trl": (TRL, TRL_SETTINGS, {"dataset_name"}),
    "mlx-lm": (MLX, MLX_SETTINGS, {"steps_per_eval"}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file of a program, and the program's name."""
    name = str(request.param)
    file = tmp_path / "theirs.yaml"
    file.write_text(CASES[name][0])
    if name == "llama-factory":
        (tmp_path / "sets").mkdir()
        info = {"mine": {"file_name": "mine.json"}, "elsewhere": {"hf_hub_url": "org/rows"}}
        (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(info))
    return file, name


def test_every_key_becomes_a_setting_or_is_told(case: tuple[Path, str]) -> None:
    file, name = case
    _, expected, missing = CASES[name]
    made = import_config(file)
    values = {key: value for key, value in made.values().items() if key in expected}
    assert values == expected
    assert missing <= made.missing.keys(), made.missing
    told = {*made.missing, *made.needless, *(entry.origin for entry in made.settings.values())}
    text = " ".join(told)
    for key, value in yaml.safe_load(CASES[name][0]).items():
        spoken = key in text or (name == "axolotl" and key.startswith(("lora_target", "load_in")))
        silent = value is None or key in SPOKEN_BY_ANOTHER
        assert spoken or silent, f"{key} was lost"
    if name == "llama-factory":
        assert made.values()["data"] == [str(file.parent / "sets" / "mine.json"), "other"]


SPOKEN_BY_ANOTHER = {
    # Joined with another key, or what happens anyway.
    "stage", "train_on_inputs", "chat_template", "report_to", "eval_strategy", "load_in_4bit",
    "use_peft", "num_layers", "lora_parameters", "adapter",
}  # fmt: skip


def test_the_written_file_is_read_back_to_the_same_settings(
    case: tuple[Path, str], tmp_path: Path
) -> None:
    made = import_config(case[0])
    target = tmp_path / "ours.yaml"
    target.write_text(as_yaml(made, case[0]))
    config = load_config(target)
    assert refusal(made) is None
    for key, value in made.values().items():
        got = getattr(config, key)
        same = str(value) if key in ("output_dir", "init_adapter") else value
        if isinstance(got, tuple) and isinstance(value, str):
            same = value.split(",")
        assert (str(got) if isinstance(got, Path) else got) == (
            tuple(same) if isinstance(same, list) else same
        ), key


def wishes(name: str, **changes: Any) -> dict[str, Any]:
    """What a program's example says is missing after these changes."""
    made = PROGRAMS[name](yaml.safe_load(CASES[name][0]) | changes, Path())
    return made.missing


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("axolotl", "train_on_inputs", True),
        ("axolotl", "load_in_8bit", True),
        ("axolotl", "chat_template", "chatml"),
        ("axolotl", "optimizer", "galore_adamw"),
        ("axolotl", "lr_scheduler", "inverse_sqrt"),
        ("axolotl", "val_set_size", 200),
        ("axolotl", "special_tokens", {"eos_token": "<|im_end|>"}),
        ("axolotl", "optim_args", "weight_decouple=1"),
        ("axolotl", "rl", "grpo"),
        ("llama-factory", "stage", "ppo"),
        ("llama-factory", "finetuning_type", "oft"),
        ("llama-factory", "quantization_bit", 8),
        ("llama-factory", "mask_history", True),
        ("llama-factory", "save_strategy", "epoch"),
        ("trl", "optim_args", "weight_decouple=1"),
        ("trl", "lora_modules_to_save", ["lm_head"]),
        ("mlx-lm", "num_layers", 16),
        ("mlx-lm", "optimizer", "muon"),
        ("mlx-lm", "training_mode", "orpo"),
    ],
)
def test_what_would_train_something_else_is_named(name: str, key: str, value: Any) -> None:
    assert key not in wishes(name)
    assert key in wishes(name, **{key: value})


@pytest.mark.parametrize(
    ("name", "key", "setting", "value"),
    [
        ("axolotl", "lora_r", "lora_rank", 8),
        ("axolotl", "micro_batch_size", "batch_size", 1),
        ("llama-factory", "lora_rank", "lora_rank", 8),
        ("llama-factory", "cutoff_len", "max_length", 2048),
        ("trl", "lora_r", "lora_rank", 16),
        ("trl", "max_length", "max_length", 1024),
        ("trl", "learning_rate", "learning_rate", 2e-5),
    ],
)
def test_a_default_of_the_other_program_is_called_one(
    name: str, key: str, setting: str, value: Any
) -> None:
    given = yaml.safe_load(CASES[name][0])
    assert PROGRAMS[name](given, Path()).settings[setting].origin == key
    del given[key]
    made = PROGRAMS[name](given, Path())
    assert made.settings[setting].value == value
    assert made.settings[setting].origin == f"{made.program}'s default"


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("axolotl", {"rl": "simpo", "rl_beta": 2.5}, {"objective": "simpo", "beta": 2.5}),
        (
            "llama-factory",
            {"stage": "dpo", "pref_loss": "ipo", "pref_beta": 0.2, "ref_model": "m"},
            {"objective": "ipo", "beta": 0.2, "reference": "m"},
        ),
        ("llama-factory", {"stage": "kto"}, {"objective": "kto"}),
    ],
)
def test_preferences_are_translated(
    name: str, keys: dict[str, Any], values: dict[str, Any]
) -> None:
    made = PROGRAMS[name](yaml.safe_load(CASES[name][0]) | keys, Path())
    assert {key: made.values()[key] for key in values} == values
    assert not made.missing.keys() & keys.keys()


def test_a_wish_for_nothing_is_no_loss() -> None:
    assert "rl" not in wishes("axolotl", rl=None)
    assert "mask_history" not in wishes("llama-factory", mask_history=False)


def test_the_command_writes_a_file_that_train_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "axolotl.yml", tmp_path / "ours.yaml"
    file.write_text(AXOLOTL)
    assert cli.main(["import-config", str(file), "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert "deepspeed: `gpus` or torchrun starts processes" in out
    assert f"engine train --config {target} --dry-run" in out
    assert load_config(target).lora_rank == 32
    assert cli.main(["import-config", str(file), "--output", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["import-config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "key: value"),
        ("colour: blue\n", "--program"),
        ("model: {_component_: torchtune.models.llama3.lora_llama3_8b}\n", "torchtune"),
        ("base_model: [\n", "not YAML"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        import_config(file)


def test_missing_settings_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("micro_batch_size: 2\nsequence_len: 512\n")
    made = import_config(file)
    assert "# model: must be given" in as_yaml(made, file)
    assert "`model` is missing" in str(refusal(made))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"push_to_hub": True, "hub_model_id": "org/m", "hub_private_repo": True},
         {"push_to_hub": "org/m", "private": True}),
        ({"push_to_hub": False, "hub_model_id": "org/m"}, {}),
        ({"hub_model_id": "org/m"}, {}),
    ],
)  # fmt: skip
def test_an_upload_that_was_asked_for_is_asked_for_here(
    keys: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    made = translate(yaml.safe_load(TRL) | keys, tmp_path)
    settings = {name: made.settings[name].value for name in expected}
    assert settings == expected and {"push_to_hub", "private"} & made.settings.keys() == {*expected}


def test_an_upload_without_a_repository_is_missed(tmp_path: Path) -> None:
    made = translate(yaml.safe_load(TRL) | {"push_to_hub": True}, tmp_path)
    assert "names the repository" in made.missing["push_to_hub"]


@pytest.mark.parametrize(
    ("name", "given", "setting", "value"),
    [
        ("trl", {"neftune_noise_alpha": 5}, "neftune_noise_alpha", 5),
        ("trl", {"label_smoothing_factor": 0.1}, "label_smoothing_factor", 0.1),
        ("llama-factory", {"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio", 16.0),
        ("axolotl", {"loraplus_lr_ratio": 16}, "loraplus_lr_ratio", 16),
        ("axolotl", {"peft_layers_to_transform": [1, 2]}, "layers", [1, 2]),
        ("axolotl", {"cosine_min_lr_ratio": 0.1}, "min_lr_ratio", 0.1),
    ],
)
def test_recipes_have_their_setting(
    name: str, given: dict[str, Any], setting: str, value: Any
) -> None:
    made = PROGRAMS[name](yaml.safe_load(CASES[name][0]) | given, Path())
    assert made.values()[setting] == value
    assert not given.keys() & made.missing.keys()
