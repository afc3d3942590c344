"""Timing, limits and cases of `engine bench`."""

import json
import time
from pathlib import Path

import pytest
import torch

from engine.benchmark.cases.adapters import VARIANTS
from engine.benchmark.cases.case import Case, CaseSizes, Work
from engine.benchmark.cases.random_weights import random_decoder, random_nf4
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.comparison import compare
from engine.benchmark.report import seconds, write
from engine.benchmark.roofline import Roofline, last_level_cache
from engine.benchmark.runner import OPS, all_cases, chosen_ops, default_settings, run_case
from engine.benchmark.timing import measure, peak_bytes
from engine.errors import ConfigError
from engine.selfcheck.accuracy import check_case
from engine.selfcheck.kernels import DENSE, HYBRID, MIXTURE
from kernels.nf4 import dequantize
from kernels.nf4.matmul import nf4_linear
from kernels.nf4.planar import PlanarNF4Weight, from_planar
from models.config.model_config import ModelConfig

CPU = torch.device("cpu")
LIMITS = Roofline(1e9, {"float32": 1e10, "bfloat16": 4e10})


def tiny() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        }
    )


def test_the_median_is_the_calls_own_time() -> None:
    taken = measure(lambda: time.sleep(0.002), CPU, budget=0.02)
    assert 0.002 <= taken.p20 <= taken.median <= taken.p80
    assert taken.repeats >= 5


def test_what_runs_before_a_call_is_not_timed() -> None:
    calls = []

    def before() -> None:
        calls.append("before")
        time.sleep(0.003)

    taken = measure(lambda: calls.append("call"), CPU, budget=0.01, before=before)
    assert taken.median < 0.002
    assert calls[::2] == ["before"] * (len(calls) // 2)
    assert calls[1::2] == ["call"] * (len(calls) // 2)


def test_the_lower_of_the_two_ceilings_binds() -> None:
    assert LIMITS.bound(flops=1e10, nbytes=1e6, dtype="float32") == "compute"
    assert LIMITS.bound(flops=1e6, nbytes=1e9, dtype="float32") == "memory"
    assert LIMITS.least_seconds(2e10, 1e9, "float32") == 2.0
    assert LIMITS.least_seconds(2e10, 1e9, "bfloat16") == 1.0


def test_every_op_has_a_case_and_every_case_a_name() -> None:
    sizes = CaseSizes(16, torch.float32, document=8)
    shapes = [tiny(), *(configuration(name, small=True) for name in (MIXTURE, HYBRID))]
    cases = [list(all_cases("tiny", sizes, shape)) for shape in shapes]
    assert {case.op for group in cases for case in group} == set(OPS)
    for group in cases:
        assert len({case.name for case in group}) == len(group)
        assert all(case.flops > 0 and case.nbytes > 0 for case in group)
    assert not {"lora_mlp", "swiglu", "decoder_layer"} & {case.op for case in cases[1]}
    assert "rope" not in {case.op for case in cases[2]}


@pytest.mark.parametrize(
    ("model", "op"),
    [
        *((DENSE, op) for op in ("dropout", *VARIANTS, "int8_head", "linear_distillation")),
        (MIXTURE, "mixture"),
        *((HYBRID, op) for op in ("gated_delta", "causal_conv1d", "rms_norm_zero_centred")),
        (HYBRID, "gated_rms_norm"),
    ],
)
def test_a_case_computes_what_its_plain_form_does(model: str, op: str) -> None:
    sizes = CaseSizes(14, torch.float32, document=9)
    shape = configuration(model, small=True)
    case = next(case for case in all_cases(model, sizes, shape) if case.op == op)
    verdict = check_case(case, CPU)
    assert verdict["outputs"]
    assert verdict["passed"], verdict
    work = case.make(CPU)
    assert sorted(work.ours(work.copies())) == sorted(work.plain(work.tensors))


def test_the_case_of_a_product_counts_its_work() -> None:
    settings = CaseSizes(2048, torch.bfloat16)
    case = next(
        case
        for case in all_cases("llama-3.1-8b", settings)
        if case.op == "nf4_linear" and case.shape == "2048x14336x4096"
    )
    assert case.flops == 2 * 2048 * 14336 * 4096
    codes = 14336 * 4096 * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert case.nbytes == codes + 2 * 2048 * (14336 + 4096)


def test_inputs_that_an_op_overwrites_are_restored_before_every_call() -> None:
    seen = []

    def ours(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(float(t["x"].sum()))
        return {"x": t["x"].zero_()}

    work = Work({"x": torch.ones(4)}, ours, lambda t: {"x": t["x"]}, ("x",))  # type: ignore[arg-type]
    case = Case("op", "model", "4", torch.float32, 4.0, 32.0, lambda _: work)
    row = run_case(case, CPU, LIMITS, budget=0.0)
    assert set(seen) == {4.0}
    assert float(work.tensors["x"].sum()) == 4.0
    assert row.ratios["torch"] == pytest.approx(row.others["torch"] / row.seconds)


def test_another_implementation_that_fails_is_reported_and_stops_nothing() -> None:
    def broken(op: str, work: Work) -> dict[str, object]:
        def call() -> None:
            raise RuntimeError("cannot do this")

        return {"broken": call}

    case = next(
        case
        for case in all_cases("tiny", CaseSizes(8, torch.float32, document=8), tiny())
        if case.op == "rms_norm"
    )
    row = run_case(case, CPU, LIMITS, budget=0.0, baselines=[broken])  # type: ignore[list-item]
    assert "cannot do this" in row.failed["broken"]
    assert "torch" in row.ratios


def test_an_unknown_op_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean rms_norm"):
        chosen_ops(["rmsnorm"])
    assert chosen_ops([]) == OPS


@pytest.mark.parametrize("planar", [False, True])
def test_random_weights_have_the_scale_of_trained_ones(planar: bool) -> None:
    weight = random_nf4(256, 512, CPU, torch.float32, planar)
    dense = dequantize(from_planar(weight) if isinstance(weight, PlanarNF4Weight) else weight)
    assert isinstance(weight, PlanarNF4Weight) == planar
    assert 0.8 < float(dense.std()) * 512**0.5 < 1.3
    x = torch.randn(3, 512)
    torch.testing.assert_close(nf4_linear(x, weight), x @ dense.T)


def test_a_random_decoder_trains_adapters_only() -> None:
    model = random_decoder(tiny(), CPU, torch.float32, rank=4)
    ids = torch.arange(12)[None]
    loss = model.loss(ids, ids)
    loss.backward()
    assert torch.isfinite(loss)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(wanted) == 2 * 7 * 2
    assert all("lora_" in name for name in wanted)
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_times_are_written_in_the_unit_that_fits() -> None:
    assert [seconds(t) for t in (2.0, 0.0123, 4.56e-5)] == ["2 s", "12.3 ms", "45.6 us"]


def test_rows_and_picture_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the plot extra")
    case = next(
        case
        for case in all_cases("tiny", CaseSizes(8, torch.float32, document=8), tiny())
        if case.op == "swiglu"
    )
    row = run_case(case, CPU, LIMITS, budget=0.0)
    paths = write(tmp_path, [row], LIMITS, {"device": "here", "commit": None})
    assert [path.name for path in paths] == ["ops.json", "ops.csv", "roofline.png"]
    content = json.loads(paths[0].read_text())
    assert content["rows"][0]["op"] == "swiglu"
    assert content["rows"][0]["device"] == "here"
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_on_a_cpu_the_limit_is_that_of_as_many_bytes() -> None:
    roofline = Roofline(1e9, {"float32": 1e12}, {1 << 14: 4e9, 1 << 16: 9e9, 1 << 20: 6e9})
    assert roofline.bandwidth_of(1 << 12) == 9e9
    assert roofline.bandwidth_of(1 << 21) == 6e9
    assert roofline.bandwidth_of(1 << 30) == 1e9
    assert roofline.least_seconds(1.0, 9e6, "float32") == pytest.approx(9e6 / 1e9)
    assert roofline.bound(1.0, 9e6, "float32") == "memory"


def test_memory_bound_ops_do_not_fit_the_caches_of_a_cpu_and_others_stay_small() -> None:
    config = configuration(DENSE, small=True)
    sizes = default_settings(CPU, config=config)
    assert 4 * sizes.streamed_tokens * config.hidden_size > last_level_cache()
    assert sizes.tokens == 64
    cases = {case.op: case for case in all_cases(DENSE, sizes, config)}
    for op in ("rms_norm", "add_rms_norm", "rope", "swiglu", "dropout", "cross_entropy"):
        assert cases[op].nbytes > last_level_cache(), op
    assert cases["lora_mlp"].shape.startswith("64x")
    assert default_settings(CPU, 16, config).streamed_tokens == 16


def test_memory_is_what_a_call_holds_at_once() -> None:
    x = torch.ones(1000)
    assert peak_bytes(lambda: x + 1, CPU) == 4000
    assert peak_bytes(lambda: (x + 1) * 2, CPU) == 8000
    assert peak_bytes(lambda: x.add_(1), CPU, [x]) == 0


def test_results_of_other_machines_say_so(tmp_path: Path) -> None:
    row = {"op": "rope", "model": "m", "shape": "8", "dtype": "float32", "seconds": 2.0}
    for name, device, seconds_of in (("a", "one", 2.0), ("b", "other", 1.0)):
        content = {"machine": {"device": device}, "rows": [row | {"seconds": seconds_of}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows, differing = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert rows[0].ratio == 2.0
    assert differing == ["device: one and other"]
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ConfigError, match="no result of"):
        compare(tmp_path / "a.json", tmp_path / "c.json")
