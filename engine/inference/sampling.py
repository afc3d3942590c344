"""How the next token is drawn: by flags, else as generation_config.json says.

What transformers does with that file is done here: `do_sample` decides whether anything is drawn,
`temperature` 1, `top_p` 1 and `top_k` 50 hold where it draws and does not say otherwise, and a
repetition penalty holds for greedy answers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.tasks.inference import Sampling
from engine.errors import ConfigError, printable

_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
_ALWAYS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "bad_words_ids": (),
}
# Keys that change an answer and are not done here, with the value that changes nothing.
_NOT_DONE = {
    "num_beams": 1,
    "penalty_alpha": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "forced_eos_token_id": None,
}
_LONGEST = 80


def resolve_sampling(
    asked: Sampling, generation: Mapping[str, Any], where: str
) -> tuple[Sampling, str | None]:
    """How tokens are drawn, and one line about it if the file has a part in it.

    Args:
        asked: the settings; those that were given hold, whatever the file says.
        generation: generation_config.json.
        where: what errors call the model.

    Raises:
        ConfigError: the file gives a value that cannot be used.
    """
    given = {
        name: getattr(asked, name) for name in asked.model_fields_set & Sampling.model_fields.keys()
    }
    own = {key: generation[key] for key in (*_DRAWN, *_ALWAYS) if generation.get(key) is not None}
    samples = generation.get("do_sample") is True and own.get("temperature", 1.0) != 0
    drawn = given.get("temperature", 1.0 if samples else 0.0) > 0
    values = {key: value for key, value in own.items() if key in _ALWAYS or drawn}
    if samples and drawn:
        values = {**_DRAWN, **values}
    elif "temperature" not in given:
        values.pop("temperature", None)
    if isinstance(values.get("top_k"), int):
        values["top_k"] = max(values["top_k"], 0)
    try:
        result = Sampling(**{**values, **given})
    except ConfigError as error:
        raise ConfigError(
            f"{where}: generation_config.json says how to sample, and cannot be used. {error} "
            "Correct the file, or give the setting on the command line."
        ) from error
    neutral = {**_DRAWN, **_ALWAYS, "temperature": 0.0, "top_k": 0}
    used = [
        f"{name.replace('_', ' ')} {_shown(getattr(result, name))}"
        for name in (*_DRAWN, *_ALWAYS)
        if name in values and name not in given and getattr(result, name) != neutral[name]
    ]
    left = [
        f"{key} {printable(repr(generation[key]), _LONGEST)}"
        for key, value in _NOT_DONE.items()
        if generation.get(key) not in (None, value, [], {})
    ]
    if not used and not left:
        return result, None
    line = f"As generation_config.json says: {', '.join(used)}" if used else ""
    if used and drawn and "temperature" not in given:
        line += " (--temperature 0 takes the likeliest token)"
    if left:
        line += (
            f"{'; not' if line else 'Not'} done here of generation_config.json: {', '.join(left)}"
        )
    return result, f"{line}."


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else printable(str(value), _LONGEST)
