"""One settings form for every verb: tables, earlier names, files, words and flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cli import main as cli
from cli.from_settings import Call, Verb, make_app
from engine.config.settings import Settings, group_of
from engine.config.sources import Vocabulary, build, gather
from engine.config.tasks import inference, pruning, workflow
from engine.config.tasks.inference import EvalSettings, GenerateSettings
from engine.config.tasks.pruning import ForgeJob, PruneJob, PruneSettings
from engine.config.tasks.workflow import BenchSettings, DataSettings, PlanSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from tests.support.source_tree import ROOT

TABLES = [
    table
    for module in (inference, pruning, workflow)
    for table in vars(module).values()
    if isinstance(table, type) and issubclass(table, Settings) and table.model_fields
]
NEEDED = {"model": "m", "data": "d.jsonl"}


def told(table: type[Settings], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        table(**values)
    return str(caught.value)


@pytest.mark.parametrize("table", TABLES)
def test_every_setting_has_help_and_a_heading(table: type[Settings]) -> None:
    for name, field in table.model_fields.items():
        if name not in ("training", "pruning"):
            assert field.description, name
            assert group_of(field) != "Options", name
    assert set(table.renamed.values()) <= set(table.model_fields)


def test_earlier_names_of_settings_are_read_everywhere(tmp_path: Path) -> None:
    old = {"mlp_tile_rows": 64, "loss_chunk_rows": 32, "decode_singly": True}
    new = TrainConfig(**NEEDED, mlp_tile_tokens=64, loss_chunk_tokens=32, low_memory_decode=True)
    assert TrainConfig(**NEEDED, **old) == new
    file = tmp_path / "old.yaml"
    file.write_text("model: m\ndata: d.jsonl\n" + "".join(f"{k}: {v}\n" for k, v in old.items()))
    assert build(TrainConfig, gather(Vocabulary.of("train", TrainConfig), file)) == new
    flags = [word for key, value in old.items() for word in flag(key, value)]
    assert typed((TrainConfig,), "--model", "m", "--data", "d.jsonl", *flags)[0] == new
    assert typed((PlanSettings,), "--card", "4090")[0] == PlanSettings(gpu="4090")
    forge = ("--model", "m", "--data", "d", "--output-dir", "o", "--fraction", "0.1")
    (job,) = typed((ForgeJob,), *forge, "--control")
    assert isinstance(job, ForgeJob) and job.baseline


def flag(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    return [option] if value is True else [option, str(value)]


def typed(tables: tuple[type[Settings], ...], *words: str) -> list[Settings]:
    """What the flags and words of a verb with these tables come to."""
    from typer.main import get_command

    read: list[Settings] = []

    def run(call: Call) -> None:
        """A verb."""
        read.extend(call.read(table) for table in tables)

    app = make_app((Verb("verb", tables), run))
    get_command(app).main(args=list(words), prog_name="engine verb", standalone_mode=False)
    return read


def test_words_win_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("base_model: m\ndataset: [a, b]\nmax_length: 64\nbatch_size: 1\n")
    words = ("--config", str(file), "--max-length", "128", "--batch-size", "2", "batch_size=3")
    (settings,) = typed((EvalSettings,), *words)
    assert settings == EvalSettings(model="m", data=("a", "b"), max_length=128, batch_size=3)


@pytest.mark.parametrize(
    "verb", ["eval", "generate", "merge", "prune", "status", "bench", "doctor"]
)
def test_every_verb_takes_a_file_and_refuses_unknown_keys(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("no_such_key: 1\n")
    assert cli.main([verb, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file}:1: there is no setting `no_such_key`" in error
    assert f"`engine {verb} --help` lists the settings" in error
    assert cli.main([verb, "no_such_key=1"]) == 2
    assert "there is no setting `no_such_key`" in capsys.readouterr().err


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `repetition_penalty`"):
        gather(Vocabulary.of("generate", GenerateSettings), overrides=["repetition_penalti=1"])
    assert "did you mean `metric`" in told(PruneSettings, fraction=0.5, metrik="l2")


@pytest.mark.parametrize(
    ("table", "values", "part"),
    [
        (GenerateSettings, {"temperature": -1}, "`temperature` = -1"),
        (GenerateSettings, {"top_p": 0}, "`top_p` = 0"),
        (GenerateSettings, {"max_new_tokens": 0}, "`max_new_tokens` = 0"),
        (GenerateSettings, {"chat_template_kwargs": "{"}, "should be a JSON object"),
        (EvalSettings, {"min_rating": 6}, "`min_rating` = 6"),
        (PruneSettings, {"max_shard_size": "1 furlong"}, "should be a size"),
        (PruneSettings, {"protect": "first"}, "no list of layer numbers"),
        (PruneJob, {"fraction": 0.5, "model": "m"}, "--report-only"),
        (ForgeJob, {"heldout": 1.0}, "`heldout` = 1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(
    table: type[Settings], values: dict[str, Any], part: str
) -> None:
    assert part in told(table, **values)


@pytest.mark.parametrize(
    ("given", "size"), [("5", 5 * 10**9), (0.5, 5 * 10**8), ("900MB", 9 * 10**8), (60_000, 60_000)]
)
def test_a_file_size_is_in_gigabytes_with_a_unit_or_in_bytes(given: Any, size: int) -> None:
    assert PruneSettings(fraction=0.5, max_shard_size=given).max_shard_size == size


def test_a_forge_job_prunes_with_the_machine_and_seed_of_its_training(tmp_path: Path) -> None:
    job = ForgeJob(model="m", data=("d",), output_dir=tmp_path, fraction=0.2, scope="layer")
    training = TrainConfig(**NEEDED, seed=7, device="cpu", max_length=64)
    settings = job.settings(training)
    want = PruneSettings(
        fraction=0.2, metric=None, scope="layer", seed=7, device="cpu", max_length=64
    )
    assert (settings.pruning, settings.training, settings.cycles) == (want, training, 1)


def test_the_version_is_that_of_the_project() -> None:
    import tomllib

    import engine

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert engine.__version__ == project["version"]


def test_hints_about_training_are_given_for_training_alone() -> None:
    with pytest.raises(ConfigError, match="write `method: qlora`"):
        gather(Vocabulary.of("train", TrainConfig), overrides=["load_in_4bit=true"])
    with pytest.raises(ConfigError, match="`engine eval --help` lists the settings"):
        gather(Vocabulary.of("eval", EvalSettings), overrides=["load_in_4bit=true"])


def test_help_names_the_range_of_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--help"], ["generate", "--help"], ["data", "preview", "--help"]):
        assert cli.main(words) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("--keep-checkpoints INTEGER >=2", "--top-p NUMBER >0 <=1", "--row INTEGER >=1"):
        assert part in text


@pytest.mark.parametrize(("given", "layers"), [(1, (1,)), (-1, (-1,)), ("0,-1", (0, -1))])
def test_one_layer_is_a_list_of_layers_too(given: Any, layers: tuple[int, ...]) -> None:
    assert PruneSettings(fraction=0.5, protect=given).protect == layers


@pytest.mark.parametrize(
    ("given", "size"), [(5, 5 * 10**9), ("5", 5 * 10**9), ("1e1", 10**10), (60_000, 60_000)]
)
def test_a_small_number_of_a_shard_is_in_gigabytes(given: Any, size: int) -> None:
    assert PruneSettings(fraction=0.5, max_shard_size=given).max_shard_size == size


def test_earlier_names_are_those_of_settings_and_not_of_what_is_in_them() -> None:
    kwargs: dict[str, Any] = {"decode_singly": True}
    config = TrainConfig(model="m", data="d", chat_template_kwargs=kwargs, **kwargs)
    assert (config.chat_template_kwargs, config.low_memory_decode) == (kwargs, True)
    with pytest.raises(ConfigError, match="earlier name of `mlp_tile_tokens`"):
        TrainConfig(model="m", data="d", mlp_tile_rows=32, mlp_tile_tokens=64)


def test_a_mapping_may_be_written_as_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    lines = ("model: m", "data: d", "chat_template_kwargs:", "  enable_thinking: false")
    file.write_text("\n".join((*lines, "  depth: {most: 3}")))
    config = build(TrainConfig, gather(Vocabulary.of("train", TrainConfig), file))
    assert config.chat_template_kwargs == {"enable_thinking": False, "depth": {"most": 3}}


@pytest.mark.parametrize(
    ("table", "given", "expected"),
    [
        (EvalSettings, {"device": "gpu"}, "should be auto, cpu, cuda or cuda:1"),
        (DataSettings, {"bad_lines": "foo"}, "should be fail, skip or skip:5%"),
        (EvalSettings, {"bad_lines": "skip5"}, "should be fail, skip or skip:5%"),
        (EvalSettings, {"quantize": "nf8"}, "should be nf4, int8 or none"),
        (BenchSettings, {"device": "mps"}, "should be auto, cpu, cuda or cuda:1"),
        (TrainConfig, {"gradient_checkpointing": "ful"}, "none, selective or full"),
        (TrainConfig, {"nonfinite": "ignore"}, "should be stop, or skip:5"),
        (TrainConfig, {"run_id": "a b"}, "letters, digits"),
        (TrainConfig, {"device": "tpu"}, "should be auto, cpu, cuda or cuda:1"),
        (TrainConfig, {"bad_lines": "5%"}, "should be fail, skip or skip:5%"),
        (TrainConfig, {"method": "dora"}, "should be qlora, lora, full or scratch"),
    ],
)
def test_a_wrong_value_is_answered_by_the_choices_and_no_pattern(
    table: type[Settings], given: dict[str, Any], expected: str
) -> None:
    needed = {name: value for name, value in NEEDED.items() if name in table.model_fields}
    message = told(table, **(needed | given))
    assert expected in message
    assert "pattern" not in message


def test_every_pattern_of_a_setting_is_said_in_words() -> None:
    patterns = 0
    tables: list[type[Settings]] = [TrainConfig, *TABLES]
    for table in tables:
        for name, field in table.model_fields.items():
            if any(getattr(limit, "pattern", None) for limit in field.metadata):
                patterns += 1
                extra = field.json_schema_extra
                assert isinstance(extra, dict), name
                assert extra["expected"], name
    assert patterns >= 9


@pytest.mark.parametrize(
    ("given", "read"),
    [("auto", "auto"), ("AUTO", "auto"), ("1024", 1024), (1, 1), (1 << 20, 1 << 20)],
)
@pytest.mark.parametrize("table", [TrainConfig, EvalSettings])
def test_a_chunk_of_the_loss_is_auto_or_a_number(table: Any, given: object, read: object) -> None:
    needed = NEEDED if table is TrainConfig else {"model": "m", "data": ["d"]}
    assert table(**needed, loss_chunk_tokens=given).loss_chunk_tokens == read
    assert table(**needed).loss_chunk_tokens == "auto"


@pytest.mark.parametrize("given", [0, -1, "many", "1.5", 2**21, True, None])
def test_another_chunk_of_the_loss_is_refused_in_one_sentence(given: object) -> None:
    words = told(TrainConfig, **NEEDED, loss_chunk_tokens=given)
    assert words.count("loss_chunk_tokens") == 1
    assert "expected auto or a whole number from 1 to 1048576" in words


@pytest.mark.parametrize("table", TABLES)
def test_no_switch_stands_for_a_number(table: type[Settings]) -> None:
    """Of every setting that takes a number and no switch `true` is refused, as its name says."""
    numbers = [
        name
        for name, field in table.model_fields.items()
        if {"int", "float"} & set(re.findall(r"\w+", str(field.annotation)))
        and not {"bool", "str", "Any"} & set(re.findall(r"\w+", str(field.annotation)))
    ]
    for name in numbers:
        for value in (True, False):
            with pytest.raises(ConfigError, match=f"`{name}` = "):
                table(**{name: value})


@pytest.mark.parametrize("key", ["? [a]\n: 1", "? {a: b}\n: 1", "[1, 2]: 3"])
def test_a_key_that_is_no_name_is_told_in_words(key: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"max_steps: 2\n{key}\n")
    with pytest.raises(ConfigError, match=r"a (list|mapping) stands for the name") as caught:
        build(TrainConfig, gather(Vocabulary.of("train", TrainConfig), tmp_path / "a.yaml"))
    assert "Node" not in str(caught.value)
