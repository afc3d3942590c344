"""Logits, loss and every stored gradient against an independent implementation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.tensor_layout import Layout, carried_prefixes
from models.tensor_names import SUPPORTED, expected_tensors, graph_tensors

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
POLICIES = ("none", "selective", "full")


def build(family: str, config_name: str = "config.json") -> Decoder:
    config = ModelConfig.from_dict(json.loads((GOLDEN / family / config_name).read_text()))
    model = Decoder(config)
    stored = load_file(GOLDEN / family / "model.safetensors")
    layout = Layout.of_names(config, stored)
    state = {
        name: layout.assemble(name, shape, stored.__getitem__)
        for name, shape in graph_tensors(config).items()
    }
    model.load_state_dict(state, strict=True)
    return model


def logits_tolerance(family: str) -> float:
    """DeltaNet's triangular solve and long products cost an order of magnitude."""
    return 2e-4 if family.startswith(("qwen3_next", "qwen3_5")) else 1e-5


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_every_family_has_a_fixture() -> None:
    types = {json.loads((GOLDEN / f / "config.json").read_text())["model_type"] for f in FAMILIES}
    text_only = {"qwen3_5_moe_text"}
    assert types | text_only == set(SUPPORTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_equal_the_golden_ones(family: str) -> None:
    model, golden = build(family), load_file(GOLDEN / family / "golden.safetensors")
    with torch.no_grad():
        logits = model(golden["input_ids"])
        loss = model.loss(golden["input_ids"], golden["labels"])
    assert float((logits - golden["logits"]).abs().max()) <= logits_tolerance(family)
    assert abs(float(loss - golden["loss"])) <= 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_the_golden_one_at_every_checkpointing_policy(
    family: str, policy: str
) -> None:
    model, golden = build(family), load_file(GOLDEN / family / "golden.safetensors")
    settings = StepSettings(checkpointing=policy)
    model.loss(golden["input_ids"], golden["labels"], settings=settings).backward()
    stored = {name[5:] for name in golden if name.startswith("grad.")}
    parameters = dict(model.named_parameters())
    assert stored <= set(parameters)
    for name in stored:
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert relative(gradient, golden[f"grad.{name}"]) <= 1e-4, name
    norms = json.loads((GOLDEN / family / "golden.json").read_text())["grad_norm"]
    assert set(norms) == set(parameters)
    for name, norm in norms.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(family: str) -> None:
    model, golden = build(family), load_file(GOLDEN / family / "golden.safetensors")
    ids, bounds = golden["packed.input_ids"], golden["packed.cu_seqlens"]
    with torch.no_grad():
        logits = model(ids.unsqueeze(0), bounds)
    assert float((logits[0] - golden["packed.logits"]).abs().max()) <= logits_tolerance(family)
    loss = model.loss(ids, ids, bounds)
    assert abs(float(loss.detach() - golden["packed.loss"])) <= 1e-6
    loss.backward()
    norms = json.loads((GOLDEN / family / "golden.json").read_text())["packed_grad_norm"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(norms[name], rel=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_a_config_are_the_same_model(family: str) -> None:
    if not (GOLDEN / family / "config_v4.json").exists():
        assert family in ("llama", "qwen2_moe", "qwen3_5", "qwen3_5_vl", "qwen3_5_moe_vl")
        return
    old = ModelConfig.from_dict(json.loads((GOLDEN / family / "config_v4.json").read_text()))
    new = ModelConfig.from_dict(json.loads((GOLDEN / family / "config.json").read_text()))
    assert old == new


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_of_the_checkpoint(family: str) -> None:
    listed = json.loads((GOLDEN / family / "golden.json").read_text())["checkpoint"]
    config = ModelConfig.from_dict(json.loads((GOLDEN / family / "config.json").read_text()))
    own = {
        n: tuple(s) for n, (_, s) in listed.items() if not n.startswith(carried_prefixes(config))
    }
    assert expected_tensors(config) == own


def test_one_document_cannot_see_another() -> None:
    model, golden = build("qwen3"), load_file(GOLDEN / "qwen3" / "golden.safetensors")
    ids, bounds = golden["packed.input_ids"], golden["packed.cu_seqlens"]
    changed = ids.clone()
    changed[: int(bounds[1])] = (changed[: int(bounds[1])] + 1) % 128
    second = slice(int(bounds[1]), None)
    with torch.no_grad():
        before, after = model(ids[None], bounds)[0, second], model(changed[None], bounds)[0, second]
    assert torch.equal(before, after)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", [f for f in FAMILIES if "moe" in f or "next" in f])
def test_the_router_loss_is_added_where_it_is_asked_for(family: str, policy: str) -> None:
    model, golden = build(family), load_file(GOLDEN / family / "golden.safetensors")
    notes = json.loads((GOLDEN / family / "golden.json").read_text())
    assert model.router_loss == 0.0
    settings = StepSettings(checkpointing=policy)
    ids, labels = golden["input_ids"], golden["labels"]
    model.loss(ids, labels, settings=settings).backward()
    router = next(
        name for name in dict(model.named_parameters()) if name.endswith("mlp.gate.weight")
    )
    without = model.get_parameter(router).grad
    assert without is not None
    model.zero_grad()
    settings = replace(settings, router_loss=model.config.router_aux_loss_coef)
    loss = model.loss(ids, labels, settings=settings)
    assert abs(float(loss.detach()) - notes["loss_with_aux"]) <= 2e-6
    loss.backward()
    gradient = model.get_parameter(router).grad
    assert gradient is not None
    assert relative(gradient, without) > 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_the_router_loss_has_the_gradient_of_its_differences(family: str) -> None:
    model, golden = build(family).double(), load_file(GOLDEN / family / "golden.safetensors")
    ids, labels = golden["input_ids"], golden["labels"]
    settings = StepSettings(router_loss=1.0)
    model.loss(ids, labels, settings=settings).backward()
    embedding = model.model.embed_tokens.weight
    assert isinstance(embedding, torch.nn.Parameter) and embedding.grad is not None
    direction = torch.randn(embedding.shape, dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            embedding.add_(direction, alpha=step)
            values.append(float(model.loss(ids, labels, settings=settings)))
    measured = (values[0] - values[1]) / 2e-6
    assert float((embedding.grad * direction).sum()) == pytest.approx(measured, rel=1e-5)
