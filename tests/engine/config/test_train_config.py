"""Where settings come from, which of them win, and what is said about those that cannot be used."""

from pathlib import Path
from typing import Any

import pytest

from engine.config import choices
from engine.config.aliases import ALIASES, HINTS
from engine.config.sources import dump_yaml, load_config, read_file
from engine.config.train_config import TrainConfig
from engine.config.training.presets import PRESETS, SUMMARIES
from engine.errors import ConfigError
from models.adapters import TARGETS, target_modules
from models.layers import context
from models.tensor_names import PROJECTIONS

NEEDED = {"model": "m", "data": "d.jsonl"}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**NEEDED, **values})
    return str(caught.value)


def test_the_later_source_wins(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nbatch_size: 2\nlora_rank: 8\nseed: 7\n")
    config = load_config(
        file,
        preset="qlora-8gb",
        flags={"lora_rank": "32", "learning_rate": "1e-3"},
        overrides=["learning_rate=5e-4"],
    )
    assert config.accumulate == PRESETS["qlora-8gb"]["accumulate"]
    assert config.batch_size == 2
    assert config.lora_rank == 32
    assert config.learning_rate == 5e-4
    assert config.seed == 7


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    settings = read_file(written(tmp_path, "lr: 1e-4\neps: 1E-8\nheldout: .5\nseed: 3\n"))
    assert settings["learning_rate"].value == 1e-4
    assert settings["eps"].value == 1e-8
    assert settings["heldout"].value == 0.5
    assert settings["seed"].value == 3


def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "model: m\ndata: d\ncategory: no\npacking: yes\nrun_id: 2024\n"
        "gradient_checkpointing: off\n",
    )
    config = load_config(file)
    assert config.category == "no"
    assert config.packing is True
    assert config.run_id == "2024"
    assert config.gradient_checkpointing == "none"


def test_the_names_of_other_trainers_are_taken(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "base_model: m\ndataset: [a, b]\nmicro_batch_size: 3\ngradient_accumulation_steps: 5\n"
        "cutoff_len: 512\nnum_train_epochs: 2.0\nlora_r: 4\noptim: paged_adamw_8bit\n"
        "lora_target: q_proj,v_proj\nlr_scheduler_type: linear\n",
    )
    config = load_config(file)
    assert (config.model, config.data) == ("m", ("a", "b"))
    assert (config.batch_size, config.accumulate, config.max_length) == (3, 5, 512)
    assert (config.epochs, config.lora_rank, config.optimizer) == (2, 4, "adamw8bit")
    assert (target_modules(config.target_modules), config.lr_schedule) == (
        ("q_proj", "v_proj"),
        "linear",
    )


def test_every_alias_and_preset_names_real_settings() -> None:
    fields = TrainConfig.model_fields
    assert set(ALIASES.values()) <= set(fields)
    assert not set(ALIASES) & set(fields)
    assert not set(HINTS) & (set(fields) | set(ALIASES))
    assert set(SUMMARIES) == set(PRESETS)
    for name in PRESETS:
        load_config(preset=name, flags=NEEDED)


def test_presets_of_a_size_leave_recomputation_to_the_planner() -> None:
    sizes = {"qlora-12gb": 12, "qlora-16gb": 16}
    for name, gigabytes in sizes.items():
        config = load_config(preset=name, flags=NEEDED)
        assert config.gradient_checkpointing == "auto"
        assert config.fit_memory == int(0.95 * gigabytes * 2**30)
    assert load_config(preset="auto", flags=NEEDED).fit_memory == "auto"
    assert load_config(preset="qwen_4080_16g", flags=NEEDED) == config


def test_a_size_to_fit_is_auto_a_size_or_none() -> None:
    sizes = {"auto": "auto", "8GiB": 8 << 30, "none": None, "7.5GB": 7_500_000_000}
    for text, size in sizes.items():
        assert load_config(flags={**NEEDED, "fit_memory": text}).fit_memory == size
    with pytest.raises(ConfigError, match=r"fit_memory.*8GiB"):
        load_config(flags={**NEEDED, "fit_memory": "much"})


def test_nested_groups_and_dotted_overrides_reach_flat_settings(tmp_path: Path) -> None:
    file = written(tmp_path, "model:\n  name: m\ndata: d\nlora:\n  r: 8\n  alpha: 16\n")
    config = load_config(file, overrides=["lora.dropout=0.1", "optimizer.lr=1e-3"])
    assert (config.model, config.lora_rank, config.lora_alpha) == ("m", 8, 16)
    assert (config.lora_dropout, config.learning_rate) == (0.1, 1e-3)


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("learnig_rate: 1", "did you mean `learning_rate`"),
        ("per_device_train_batchsize: 1", "did you mean `batch_size`"),
        ("load_in_4bit: true", "write `method: qlora`"),
        ("zzzzzz: 1", "`engine train --help` lists"),
    ],
)
def test_an_unknown_key_names_its_line_and_the_nearest_setting(
    tmp_path: Path, line: str, suggestion: str
) -> None:
    file = written(tmp_path, f"model: m\ndata: d\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert f"{file}:3" in str(caught.value)
    assert suggestion in str(caught.value)


def test_a_key_given_twice_is_refused_under_either_name(tmp_path: Path) -> None:
    for text in ("lr: 1\nlr: 2\n", "lr: 1\nlearning_rate: 2\n"):
        with pytest.raises(ConfigError, match=r"run\.yaml:2.*run\.yaml:1"):
            load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "model: [",
        "- a\n- b\n",
        "model: m\n\tdata: d\n",
        "model: !!python/object:os.x {}\n",
        "model: !!python/object/apply:os.system [exit]\n",
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml:\d"):
        load_config(written(tmp_path, text))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file"):
        load_config("no.yaml")


def test_every_wrong_value_is_named_with_its_source(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nepochs: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, flags={"learning_rate": "fast"}, overrides=["method=magic"])
    message = str(caught.value)
    assert f"`epochs` = 0 ({file}:3)" in message
    assert "`learning_rate` = 'fast' (--learning-rate)" in message
    assert "`method` = 'magic' (method=magic)" in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"keep_checkpoints": 1}, "keep_checkpoints"),
        ({"heldout": 1}, "heldout"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": "0.9"}, "betas"),
        ({"nonfinite": "skip"}, "nonfinite"),
        ({"nonfinite": "skip:0"}, "nonfinite"),
        ({"device": "gpu"}, "device"),
        ({"run_id": "../up"}, "run_id"),
        ({"data": []}, "data"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "q proj"}, "target_modules"),
        ({"report_to": "excel"}, "report_to"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "not both"),
        ({"eval_data": "e", "heldout": 0.1}, "not both"),
        ({"method": "full", "init_adapter": "a"}, "init_adapter"),
        ({"resume": "auto"}, "output_dir"),
        ({"resume": "x", "overwrite": True}, "overwrite"),
        ({"learning_rte": 1}, "did you mean `learning_rate`"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], part: str) -> None:
    assert part in refusal(**values)


def test_one_error_names_every_missing_setting() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config()
    message = str(caught.value)
    assert "`model` is missing (--model: Hugging Face directory" in message
    assert "`data` is missing (--data: rows to train on" in message


def test_a_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(
        model="m",
        data=["a", "b"],
        output_dir=tmp_path / "out",
        target_modules=["q_proj"],
        betas="0.8, 0.95",
        report_to="tensorboard",
        system_prompt="yes: no\n# ümlaut",
        learning_rate=1e-5,
    )
    assert load_config(written(tmp_path, dump_yaml(config))) == config


def test_epochs_asked_for_replace_the_presets_last_step() -> None:
    flags = {**NEEDED, "epochs": "3"}
    assert load_config(preset="cpu-demo", flags=flags).max_steps is None
    assert load_config(preset="cpu-demo", flags=flags, overrides=["max_steps=9"]).max_steps == 9


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean qlora-8gb"):
        load_config(preset="qlora-8g", flags=NEEDED)


@pytest.mark.parametrize("text", ["lora_rank", "=3", ""])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(flags=NEEDED, overrides=[text])


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert TrainConfig(**NEEDED).warmup(200) == 6
    assert TrainConfig(**NEEDED, warmup_ratio=0.1).warmup(200) == 20
    assert TrainConfig(**NEEDED, warmup_steps=50).warmup(20) == 20
    assert TrainConfig(**NEEDED, warmup_steps=0).warmup(20) == 0


def test_target_presets_resolve_to_projections() -> None:
    def projections(**values: Any) -> tuple[str, ...]:
        return target_modules(TrainConfig(**NEEDED, **values).target_modules)

    assert projections() == PROJECTIONS
    assert projections(target_modules="qv") == ("q_proj", "v_proj")
    assert projections(target_modules="all-linear") == PROJECTIONS
    assert set(choices.TARGET_PRESETS) == set(TARGETS)


def test_choices_are_those_of_the_graph() -> None:
    assert choices.POLICIES == context.POLICIES


def test_the_trajectory_leaves_out_only_what_changes_no_weight() -> None:
    base = TrainConfig(**NEEDED).trajectory()
    shown = {"output_dir": "x", "log_every": 3, "keep_checkpoints": 5, "checkpoint_every": 1}
    assert TrainConfig(**NEEDED, **shown).trajectory() == base
    assert TrainConfig(**NEEDED, seed=1).trajectory() != base
    assert TrainConfig(**NEEDED, batch_size=1).trajectory() != base


@pytest.mark.parametrize(
    "text",
    ["1e5", "00123456", "010", "1:30", "true", "no", "null", "~", "2026-01-31", "0x1f", "1_000",
     "a: b", "# x", "- y", " spaced ", "'", '"', "é\u2028", "%", "@at", "!tag", "&a", "*a", "[1]",
     "1.0", ".5", "+7", "0o17", "\ttab", "line\nbreak", "=", "<<", "Infinity", ".inf"],
)  # fmt: skip
def test_a_runs_settings_read_back_as_they_were(text: str, tmp_path: Path) -> None:
    config = TrainConfig(
        model=text,
        data=[text, "d"],
        revision=text,
        system_prompt=text,
        category=text,
        chat_template_kwargs={"a": text, "b": {"c": [1, None, True, text]}},
        lora_rank="010",
        template_date="2020-02-29T01:02:03",
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert config.lora_rank == 10
