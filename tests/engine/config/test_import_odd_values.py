"""Another program's configuration may hold anything: it becomes a setting, or is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.programs.as_yaml import as_yaml, import_config, refusal
from engine.config.programs.detect import PROGRAMS

KEYS = {
    "axolotl": "num_epochs val_set_size adam_beta1 adam_beta2 adam_epsilon optim_args datasets "
    "special_tokens test_datasets lora_r learning_rate warmup_steps warmup_ratio eval_steps",
    "llama-factory": "dataset eval_dataset dataset_dir lora_rank num_train_epochs val_size "
    "learning_rate lr_scheduler_kwargs save_steps report_to cutoff_len",
    "trl": "report_to early_stopping_patience early_stopping_threshold warmup_steps warmup_ratio "
    "eval_steps save_steps num_train_epochs lr_scheduler_kwargs learning_rate dataset_name",
    "mlx-lm": "lora_parameters data num_layers learning_rate iters optimizer_config",
}
ODD = (
    *("true", "-1", ".nan", ".inf", "1e3", "yes", "''", "[]", "[1, 2]", "[[1]]", "[null]", "{}"),
    *("{a: 1}", "{min_lr: x, rank: [], eps: x}", "[{path: [1], data_files: 5}]", "9" * 400),
    *("!!binary aGk=", "!!set {a, b}", "!!timestamp 2020-01-01"),
    *('"\\ud800"', '"a=b"', '"a\\nb: 1"'),
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_value_becomes_a_setting_or_is_told(tmp_path: Path, program: str) -> None:
    file = tmp_path / "theirs.yaml"
    for key in KEYS[program].split():
        for value in ODD:
            file.write_text(f"lr_scheduler_type: polynomial\n{key}: {value}\n")
            made = import_config(file, program)
            answer: Any = {"s": made.values(), "m": made.missing, "n": made.needless}
            json.dumps(answer, allow_nan=False)
            read = yaml.safe_load(as_yaml(made, file).encode("utf-8", "backslashreplace"))
            assert read.keys() == made.values().keys(), (key, value)
        refusal(made)


def test_names_in_comments_stay_in_their_line(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text('"odd\\nlearning_rate": 5\n"\\e[31mred": 1\ndataset: "rows\\nseed: 7"\n')
    text = as_yaml(import_config(file, "llama-factory"), file)
    assert "seed" not in yaml.safe_load(text)
    assert sum(line.startswith("learning_rate") for line in text.splitlines()) == 1
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("program", "key", "value"),
    [
        ("trl", "eval_steps", "often"),
        ("axolotl", "num_epochs", [3]),
        ("mlx-lm", "lora_parameters", "rank=8"),
        ("llama-factory", "lora_rank", ".nan"),
        ("axolotl", "optim_args", 0.9),
    ],
)
def test_what_is_no_number_or_mapping_is_missing(
    tmp_path: Path, program: str, key: str, value: Any
) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(f"{key}: {value}\n")
    assert (
        f"is no {'mapping' if key in ('lora_parameters', 'optim_args') else 'number'}"
        in (import_config(file, program).missing[key])
    )
