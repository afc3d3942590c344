"""Keys of adapter_config.json: what is read, refused or ignored.

PEFT writes some forty keys and adds to them with every version. Those of `REFUSED` change the
arithmetic in a way that is not implemented, and are refused unless they are switched off. Those of
`_READ` and `_WITHOUT_EFFECT` are known. Any other is ignored with one warning, as PEFT itself does
with the keys of a later version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import CheckpointError, listing

log = logging.getLogger(__name__)

REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens, so that "
    "what the weights are depends on the text",
    "arrow_config": "arrow routes every token to one of several adapters",
    "layer_replication": "it makes a deeper model out of repeated layers",
    "megatron_config": "it divides layers as Megatron does",
    "monteclora_config": "it samples its weights",
    "use_qalora": "QA-LoRA pools its inputs for a GPTQ model",
}
"""Key -> why it cannot be computed here."""

_READ = (
    "alpha_pattern base_model_name_or_path bias ensure_weight_tying exclude_modules "
    "init_lora_weights kasa_config layers_pattern layers_to_transform loftq_config lora_alpha "
    "lora_bias lora_dropout modules_to_save peft_type r rank_pattern target_modules "
    "target_parameters trainable_token_indices use_bdlora use_dora use_rslora"
)
# Of training, of initialisation, or notes. PEFT sets `fan_in_fan_out` back to false on every
# linear layer of these families, and `velora_config` changes only what backward saves.
_WITHOUT_EFFECT = (
    "auto_mapping corda_config eva_config fan_in_fan_out inference_mode lora_ga_config "
    "megatron_core peft_version qalora_group_size revision runtime_config task_type velora_config"
)
KNOWN = frozenset((_READ + " " + _WITHOUT_EFFECT).split()) | REFUSED.keys()
"""Keys that PEFT writes."""

OTHER_TYPES: dict[str, str] = {
    "ADALORA": "AdaLoRA has singular values and masks between its factors",
    "IA3": "IA3 multiplies activations",
    "LOHA": "LoHa is a Hadamard product of two pairs",
    "LOKR": "LoKr is a Kronecker product",
    "OFT": "OFT rotates the weights",
    "BOFT": "BOFT rotates the weights",
    "VERA": "VeRA shares random factors between layers",
    "XLORA": "X-LoRA mixes several adapters by a gate that reads the text",
    "PREFIX_TUNING": "prefix tuning adds keys and values",
    "PROMPT_TUNING": "prompt tuning adds embeddings in front of the text",
    "P_TUNING": "P-tuning adds embeddings in front of the text",
}
"""Other values of `peft_type` -> what they do instead of adding B A."""

# Of `init_lora_weights`: what PEFT does to the base weights once more whenever it loads the adapter
# and can be computed again (`engine.model_sources.adapter.initial`).
_REPEATABLE = ("pissa", "olora", "loftq")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    """Whether it lists texts or numbers, of which PEFT makes texts."""
    return isinstance(value, list) and all(isinstance(v, str) or _is_number(v) for v in value)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_Form = tuple[Callable[[Any], bool], str]
_NAMES: _Form = (_is_list, "a list of names")
_PATTERN: _Form = (_is_text_or_list, "a text, or a list of texts")
_OBJECT: _Form = (_is_object, "an object")
_FORMS: dict[str, _Form] = {
    "target_modules": _PATTERN,
    "exclude_modules": _PATTERN,
    "layers_pattern": _PATTERN,
    "layers_to_transform": (
        lambda value: _is_number(value) or (_is_list(value) and all(map(_is_number, value))),
        "a layer's number, or a list of them",
    ),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "trainable_token_indices": (
        lambda value: _is_object(value) or _is_list(value), "a list of ids, or an object of them",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": _OBJECT,
    "alpha_pattern": _OBJECT,
    "loftq_config": _OBJECT,
    "kasa_config": _OBJECT,
    "use_bdlora": _OBJECT,
}  # fmt: skip
"""Keys that are read, and what their values have to be where they are not empty."""


def _refuse_odd_values(raw: Mapping[str, Any], source: str) -> None:
    for key, (fits, words) in _FORMS.items():
        if raw.get(key) and not fits(raw[key]):
            raise CheckpointError(
                f"{source}: {key} is {raw[key]!r:.80}; expected {words}. Take the file as it "
                "was saved, or save the adapter anew with PEFT."
            )


def judge_adapter_keys(raw: Mapping[str, Any], source: str) -> None:
    """Refuse what cannot be computed, and warn of keys that are not known.

    Raises `CheckpointError` that names the key, its value's reason, and what to do.
    """
    kind = raw.get("peft_type")
    if kind != "LORA":
        reason = OTHER_TYPES.get(str(kind).upper())
        raise CheckpointError(
            f"{source}: peft_type is {kind!r}; only 'LORA' adapters are supported"
            f"{f': {reason}' if reason else ''}."
        )
    _refuse_odd_values(raw, source)
    reasons = [f"{key}: {why}" for key, why in REFUSED.items() if raw.get(key)]
    initial = str(raw.get("init_lora_weights", True)).lower()
    if initial.startswith("pissa_niter"):
        reasons.append(
            f"init_lora_weights={initial}: PEFT subtracts a randomised decomposition from the base "
            "weights at every load, another one each time"
        )
    elif initial.startswith("corda"):
        reasons.append(
            f"init_lora_weights={initial}: the base weights were changed by covariances that the "
            "adapter does not hold"
        )
    if reasons:
        raise CheckpointError(
            f"{source}: the adapter uses {'; '.join(reasons)}. Merge it with the program that made "
            "it, or save it as a plain LoRA (in PEFT: "
            "save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    unknown = sorted(key for key in raw if key not in KNOWN and raw[key] not in (None, False))
    if unknown:
        log.warning("%s: unknown keys are ignored: %s", source, listing(unknown))


def initialisation(raw: Mapping[str, Any]) -> str:
    """What PEFT does to the base weights as it loads the adapter: "pissa", ..., or ""."""
    if raw.get("kasa_config"):
        return "kasa"
    initial = str(raw.get("init_lora_weights", True)).lower()
    return initial if initial in _REPEATABLE else ""
