"""Losses of preferences and their adapters' gradients equal TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from engine.config.recipes.preference import ObjectiveSettings
from engine.data.batches.sequences import AnswerSet
from engine.data.examples import Example
from engine.data.preferences import JudgedExample, PairExample
from engine.model_sources.load_model import load_model
from engine.training.objectives.choose import make_objective
from engine.training.objectives.reference import reference_log_probs
from models.adapters import adapter_tensors, add_lora
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.interop

PROMPTS = ([5, 9, 11, 30], [7, 8], [40, 41, 42, 43, 44, 45])
CHOSEN = ([12, 13, 2], [50, 51, 52, 53, 54, 2], [20, 2])
REJECTED = ([14, 15, 16, 17, 2], [12, 2], [21, 22, 23, 2])
GOOD = (True, False, True)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def set_adapter(model: Any) -> None:
    """Tensors of the adapter that are not zero, the same for every model of a size."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                parameter.requires_grad_(True)


def peer_gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def ours_like(base: Path, peer: Any) -> Decoder:
    """This engine's model with the peer's adapter."""
    model = load_model(base)
    add_lora(model, rank=4, alpha=8)
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for path, parts in adapter_tensors(model).items():
            for part, letter in zip(parts, "AB", strict=True):
                part.copy_(theirs[f"base_model.model.{path}.lora_{letter}.default.weight"])
    return model


def answer(prompt: list[int], ids: list[int]) -> Example:
    return Example([*prompt, *ids], [False] * len(prompt) + [True] * len(ids), "rows:1")


def our_loss(base: Path, peer: Any, settings: ObjectiveSettings) -> tuple[float, Decoder]:
    """The loss of all rows as one batch, with gradients in the model that is returned."""
    examples: list[Example]
    if settings.objective == "kto":
        rows = zip(PROMPTS, CHOSEN, GOOD, strict=True)
        examples = [JudgedExample(answer(p, c), good) for p, c, good in rows]
    else:
        triples = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
        examples = [PairExample(answer(p, c), answer(p, r)) for p, c, r in triples]
    answers, reference, every = AnswerSet(examples, 64), None, range(3)
    if settings.has_reference:
        judged = settings.objective == "kto"
        plain = load_model(base)
        reference = reference_log_probs(plain, answers, every, DEFAULT_SETTINGS, judged)
    model = ours_like(base, peer)
    objective = make_objective(settings, answers, reference)
    batches = [answers.batch(every)]
    totals = objective.totals(model, batches, DEFAULT_SETTINGS)
    share = objective.share(model, batches[0], DEFAULT_SETTINGS, totals)
    share.loss.backward()
    return float(share.loss.detach()), model


def compare(base: Path, peer: Any, loss: Tensor, settings: ObjectiveSettings) -> None:
    loss.backward()
    ours, model = our_loss(base, peer, settings)
    assert ours == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-5)
    theirs = peer_gradients(peer)
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in mine.values())
    assert largest > 1e-3
    for name, grad in mine.items():
        assert float((grad - theirs[name]).abs().max()) <= 1e-5 * max(1.0, largest), name


def peer_of(base: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(base)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "llama")


OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "disable_dropout": True, "max_length": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "own", "options"),
    [
        ("dpo", {}, {"loss_type": "sigmoid"}),
        ("dpo", {"length_normalization": "on"}, {"loss_type": "sigmoid_norm"}),
        ("ipo", {"beta": 0.4}, {"loss_type": "ipo", "beta": 0.4}),
    ],
)
def test_dpo_and_ipo_equal_trls(
    kind: Any, own: Mapping[str, Any], options: Mapping[str, Any], base: Path, tmp_path: Path
) -> None:
    model, tokenizer = peer_of(base)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    triples = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    rows = [dict(zip(keys, triple, strict=True)) for triple in triples]
    data = Dataset.from_dict({"prompt": ["a"] * 3, "chosen": ["b"] * 3, "rejected": ["c"] * 3})
    args = DPOConfig(output_dir=str(tmp_path / "out"), **(OPTIONS | {"beta": 0.1} | dict(options)))
    trainer = DPOTrainer(
        model, None, args, train_dataset=data, processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    set_adapter(trainer.model)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    compare(base, trainer.model, loss, ObjectiveSettings(objective=kind, **own))


def test_kto_equals_trls(base: Path, tmp_path: Path) -> None:
    """TRL gives an example the answer of the one before it; here it is the one after it."""
    model, tokenizer = peer_of(base)
    others = [CHOSEN[(index + 1) % 3] for index in range(3)]
    keys = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    fields = zip(PROMPTS, CHOSEN, others, GOOD, strict=True)
    rows = [dict(zip(keys, each, strict=True)) for each in fields]
    texts = {"prompt": ["a"] * 3, "completion": ["b"] * 3, "label": list(GOOD)}
    data = Dataset.from_dict(texts)
    args = KTOConfig(
        output_dir=str(tmp_path / "out"), **OPTIONS, beta=0.3, desirable_weight=1.5,
        undesirable_weight=0.5, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = KTOTrainer(
        model, None, args, train_dataset=data, processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    set_adapter(trainer.model)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    settings = ObjectiveSettings(
        objective="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5
    )
    compare(base, trainer.model, loss, settings)


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def peer_batch() -> dict[str, Tensor]:
    """The rows as TRL's trainers of cpo and orpo read them."""
    batch: dict[str, Tensor] = {}
    for side, answers in (("chosen", CHOSEN), ("rejected", REJECTED)):
        pairs = list(zip(PROMPTS, answers, strict=True))
        batch[f"{side}_input_ids"] = padded([[*p, *a] for p, a in pairs], 0)
        batch[f"{side}_attention_mask"] = padded([[1] * (len(p) + len(a)) for p, a in pairs], 0)
        batch[f"{side}_labels"] = padded([[-100] * len(p) + list(a) for p, a in pairs], -100)
    return batch


def bare_trainer(kind: Any, **settings: Any) -> Any:
    """A trainer of which only the arithmetic is used."""
    trainer = kind.__new__(kind)
    device = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    plain = {"is_encoder_decoder": False, "aux_loss_enabled": False, "accelerator": device}
    for name, value in {
        **plain,
        "pad_token_id": 0,
        "padding_value": 0,
        "alpha": 0.0,
        **settings,
    }.items():
        setattr(trainer, name, value)
    return trainer


def adapted(base: Path) -> Any:
    model = get_peft_model(peer_of(base)[0], LoraConfig(**LORA))
    set_adapter(model)
    return model


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ({"objective": "cpo"}, {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1}),
        (
            {"objective": "cpo", "label_smoothing": 0.2, "nll_weight": 0.0, "beta": 0.3},
            {"loss_type": "sigmoid", "cpo_alpha": 0, "beta": 0.3, "label_smoothing": 0.2},
        ),
        (
            {"objective": "simpo", "simpo_gamma": 0.7},
            {"loss_type": "simpo", "cpo_alpha": 0, "beta": 2.0, "simpo_gamma": 0.7},
        ),
    ],
)
def test_cpo_and_simpo_equal_trls(
    own: Mapping[str, Any], options: Mapping[str, Any], base: Path
) -> None:
    trainer = bare_trainer(CPOTrainer, **({"label_smoothing": 0.0} | dict(options)))
    model = adapted(base)
    loss, _ = trainer.get_batch_loss_metrics(model, peer_batch())
    compare(base, model, loss, ObjectiveSettings(**own))


def test_orpo_equals_trls(base: Path) -> None:
    """Its odds ratios; the likelihood of the prompt, which TRL learns too, is no part of them."""
    trainer, model = bare_trainer(ORPOTrainer, beta=0.2), adapted(base)
    chosen, rejected, *_ = trainer.concatenated_forward(model, peer_batch())
    ratios, *_ = trainer.odds_ratio_loss(chosen, rejected)
    tokens = torch.tensor([float(len(ids)) for ids in CHOSEN])
    likelihood = -(chosen * tokens).sum() / tokens.sum()
    compare(base, model, likelihood - ratios.mean(), ObjectiveSettings(objective="orpo", beta=0.2))
