"""The compute type of a run on a CPU: tried, stored, and that of the run that goes on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config.sources import dump_yaml
from engine.config.train_config import TrainConfig
from engine.memory.model_shapes import preset_config
from engine.training import cpu_dtype
from engine.training.cpu_dtype import NARROWEST, product_rates, with_cpu_dtype

WIDE = preset_config("smollm2-135m")


def config(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": "none", "data": ["-"], "device": "cpu"} | settings)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Rates of products, of a processor that has bf16."""
    measured = {"float32": 1e11, "bfloat16": 4e11}
    monkeypatch.setattr(cpu_dtype, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(cpu_dtype, "product_rates", lambda: measured)
    cpu_dtype.faster_type.cache_clear()
    yield measured
    cpu_dtype.faster_type.cache_clear()


@pytest.mark.parametrize(("bfloat16", "wanted"), [(4e11, "bfloat16"), (1.2e11, "float32")])
def test_the_faster_type_is_chosen(rates: dict[str, float], bfloat16: float, wanted: str) -> None:
    rates["bfloat16"] = bfloat16
    assert with_cpu_dtype(config(), gpu=False, model=WIDE).dtype == wanted


def test_the_choice_is_logged_with_its_rates(
    rates: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        cpu_dtype.log_choice("float32")
        cpu_dtype.log_choice(with_cpu_dtype(config(), gpu=False, model=WIDE).dtype)
    assert caplog.messages[0] == "computing in float32"
    assert "bfloat16: products run at 400 GFLOP/s in bfloat16 and 100" in caplog.messages[1]


def test_without_instructions_nothing_is_tried(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dtype, "has_bfloat16_products", lambda: False)
    assert with_cpu_dtype(config(), gpu=False, model=WIDE).dtype == "float32"


def test_what_stays_as_it_is(rates: dict[str, float]) -> None:
    assert WIDE is not None and WIDE.hidden_size >= NARROWEST
    assert with_cpu_dtype(config(dtype="float32"), gpu=False, model=WIDE).dtype == "float32"
    assert with_cpu_dtype(config(), gpu=True, model=WIDE).dtype == "auto"
    assert with_cpu_dtype(config(method="full"), gpu=False, model=WIDE).dtype == "float32"
    assert with_cpu_dtype(config(model="there/is/none"), gpu=False).dtype == "auto"


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "bfloat16"), ("auto", "float32")])
def test_a_run_goes_on_in_its_own_type(
    rates: dict[str, float], tmp_path: Path, stored: str, wanted: str
) -> None:
    rates["bfloat16"] = 0.0 if stored == "bfloat16" else 1e15
    (tmp_path / "config.yaml").write_text(dump_yaml(config(dtype=stored, output_dir=tmp_path)))
    again = config(resume="auto", output_dir=tmp_path)
    assert with_cpu_dtype(again, gpu=False, model=WIDE).dtype == wanted


def test_trying_takes_a_tenth_of_a_second_or_two_turns() -> None:
    product_rates(0.0)  # what is set up once is not measured
    began = time.process_time()
    got = product_rates()
    assert time.process_time() - began < 1.0 * torch.get_num_threads()
    assert min(got.values()) > 0
