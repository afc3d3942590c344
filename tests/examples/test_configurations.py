"""The configurations in examples/ are read, planned, and fit what their names say."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.config.sources import load_config
from engine.config.train_config import TrainConfig
from engine.verbs.training.train import train
from tests.support.tiny_model import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
GB, GIB = 10**9, 2**30
USABLE = 0.9
"""Share of a GPU's memory that a plan may need: the rest is the driver's and the desktop's."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of these models need no network: their shapes are known by name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], str]:
    def write(name: str) -> str:
        path = tmp_path / name
        answers = ("chosen", "rejected") if name == "pairs.jsonl" else ("response",)
        lines = (
            {"prompt": f"Word {n}?"} | {a: f"{a[:3] * (n % 3 + 1)}" for a in answers}
            for n in range(8)
        )
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def planned(file: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status = main(["plan", "--config", str(EXAMPLES / file), *words, "--json"])
    output = capsys.readouterr()
    assert status == 0, output.err
    report: dict[str, Any] = json.loads(output.out)
    return report


def test_every_configuration_is_here() -> None:
    assert FILES == [
        "distill.yaml",
        "dpo.yaml",
        "full_finetune.yaml",
        "lora_cpu.yaml",
        "qlora_8b_24gb.yaml",
        "qlora_8b_8gb.yaml",
        "recipes.yaml",
        "scratch.yaml",
    ]


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_a_setting(file: str) -> None:
    assert isinstance(load_config(EXAMPLES / file), TrainConfig)


@pytest.mark.parametrize(
    ("file", "gigabytes"),
    [("qlora_8b_24gb.yaml", 24), ("qlora_8b_8gb.yaml", 8), ("full_finetune.yaml", 24)],
)
@pytest.mark.usefixtures("offline")
def test_a_configuration_fits_the_gpu_it_is_for(
    file: str, gigabytes: int, capsys: pytest.CaptureFixture[str], rows: Callable[[str], str]
) -> None:
    report = planned(file, capsys, f"data={rows('train.jsonl')}")
    assert report["device"] == "cuda"
    assert report["total_bytes"] <= USABLE * gigabytes * GB
    stated = re.search(r"Planned: ([\d.]+) GiB", (EXAMPLES / file).read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(report["total_bytes"] / GIB, rel=0.02)


@pytest.mark.usefixtures("offline")
def test_the_settings_for_8_gb_are_needed(
    capsys: pytest.CaptureFixture[str], rows: Callable[[str], str]
) -> None:
    spent = ("embedding_on=device", "offload=", "gradient_checkpointing=selective")
    data = f"data={rows('train.jsonl')}"
    assert planned("qlora_8b_8gb.yaml", capsys, data, *spent)["total_bytes"] > 8 * GB


@pytest.mark.parametrize("file", FILES)
def test_a_tiny_model_trains_with_every_configuration(
    file: str, tmp_path: Path, rows: Callable[[str], str]
) -> None:
    model = str(write_tiny_model(tmp_path / "model", "llama"))
    words = [
        f"model={model}",
        f"data={rows('pairs.jsonl' if file == 'dpo.yaml' else 'train.jsonl')}",
        f"output_dir={tmp_path / 'run'}",
        *("device=cpu", "dtype=float32", "max_steps=1", "batch_size=2", "accumulate=1"),
        "max_length=64",
    ]
    if file == "lora_cpu.yaml":
        words.append(f"eval_data={rows('heldout.jsonl')}")
    if file == "distill.yaml":
        words.append(f"teacher={model}")
    result = train(load_config(EXAMPLES / file, overrides=words), console=False)
    assert result.status == "Success"
    assert result.metrics["steps"] == 1
