"""The compute type follows from what a GPU multiplies, not from what it emulates."""

from types import SimpleNamespace

import pytest
import torch

from engine.benchmark.runner import default_settings
from engine.device import check_threads, multiplies_bfloat16, named_dtype, resolve_dtype
from engine.errors import ConfigError
from engine.verbs.doctor import examine

GPUS = {"T4": (7, 5), "V100": (7, 0), "A100": (8, 0), "RTX 4090": (8, 9), "H200": (9, 0)}


@pytest.mark.parametrize("name", GPUS)
def test_auto_is_bfloat16_only_where_the_gpu_multiplies_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = GPUS[name]
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=40, name=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    # Where bfloat16 is emulated torch says that it is supported.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    device = torch.device("cuda", 0)
    wanted = torch.bfloat16 if major >= 8 else torch.float16
    assert multiplies_bfloat16(device) == (major >= 8)
    assert resolve_dtype("auto", device) == wanted
    assert default_settings(device).dtype == wanted


@pytest.mark.parametrize(
    ("text", "enough"),
    [("3.2.0", False), ("3.3.1", True), ("3.10", True), ("4.0+git", True), ("unknown", False)],
)
def test_doctor_refuses_a_triton_that_aborts(
    text: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.verbs.doctor.installed", lambda name: text)
    (check,) = (check for check in examine() if check.name == "triton")
    assert (check.status != "problem") == enough
    assert ("needs 3.3" in check.detail) != enough


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "FP32", "torch.float32", "float"])
def test_a_compute_type_is_known_by_all_its_names(dtype: torch.dtype | str) -> None:
    assert named_dtype(dtype, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype", ["float64", 3, "", "torch.int8"])
def test_what_is_no_compute_type_is_named(dtype: str) -> None:
    with pytest.raises(ConfigError, match="should be auto, float32, bfloat16, float16"):
        named_dtype(dtype, torch.device("cpu"))


def test_more_threads_than_a_machine_can_start_are_refused() -> None:
    check_threads(None)
    check_threads(64)
    with pytest.raises(ConfigError, match="processors: at most"):
        check_threads(1 << 20)
