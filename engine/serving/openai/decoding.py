"""What a request says about how its answer is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.serving.openai.api_errors import Notes, wrong
from engine.serving.openai.fields import Fields

MOST_STOPS, MOST_CHOICES, MOST_TOP, MOST_BIASED = 4, 16, 20, 1024
_STOP_CHARACTERS = 1024

IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Parameters that change nothing about an answer's text, or ask for nothing but speed."""

_CONSTRAINED = "answers are not constrained to a grammar or schema; ask for the form in the prompt"
REFUSED = {
    "audio": "answers are text",
    "beam_width": "answers are drawn, not searched",
    "chat_template": "the template is the model's own; no request replaces it",
    "continue_final_message": "an answer is always a message of its own",
    "documents": "put the documents' text into a message",
    "function_call": "it is the earlier form of tool_choice; send that",
    "functions": "it is the earlier form of tools; send that",
    "grammar": _CONSTRAINED,
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "json_schema": _CONSTRAINED,
    "length_penalty": "answers are drawn, not searched",
    "mirostat": "draw by temperature, top_p, top_k and min_p",
    "prompt_logprobs": "send echo and logprobs to /v1/completions",
    "structured_outputs": _CONSTRAINED,
    "use_beam_search": "answers are drawn, not searched",
    "web_search_options": "nothing is fetched from the network",
}
"""Parameters that would change an answer and that nothing here does, with what to do instead."""


@dataclass(frozen=True)
class Decoding:
    """How the answers of one request are made.

    `sampling` has those settings of `engine.config.tasks.inference.Sampling` that were given;
    `logprobs` is the number of likeliest tokens to tell beside each chosen one, or None for none.
    """

    sampling: dict[str, Any]
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    choices: int
    seed: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool


def read_decoding(fields: Fields, logprobs: int | None, max_tokens: int | None) -> Decoding:
    """The parameters that chats and completions share. Raises `ApiError`."""
    sampling = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", -1, 1 << 30),
        "min_p": fields.number("min_p", 0, 1),
        "typical_p": fields.number("typical_p", 1e-6, 1),
        "min_new_tokens": fields.whole("min_tokens", 0, 1 << 24),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "logit_bias": _logit_bias(fields) or None,
    }
    if sampling["top_p"] == 0:  # The likeliest token alone, as 1e-9 would say.
        sampling["top_p"], sampling["top_k"] = None, 1
    if sampling["top_k"] == -1:
        sampling["top_k"] = 0
    stream = fields.flag("stream") or False
    return Decoding(
        sampling={name: value for name, value in sampling.items() if value is not None},
        max_tokens=max_tokens,
        stop=_stops(fields),
        stop_ids=_ids(fields, "stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos") or False,
        choices=fields.whole("n", 1, MOST_CHOICES) or 1,
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
        logprobs=logprobs,
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.given("stop")
    stops = [given] if isinstance(given, str) else given
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise wrong("stop", f"stop must be a text or a list of at most {MOST_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not stop or len(stop) > _STOP_CHARACTERS:
            raise wrong(
                "stop",
                f"each of stop must be a text of 1 to {_STOP_CHARACTERS} characters",
            )
    return tuple(stops)


def _ids(fields: Fields, name: str) -> tuple[int, ...]:
    given = fields.items(name) or []
    if len(given) > MOST_BIASED or any(
        isinstance(i, bool) or not isinstance(i, int) for i in given
    ):
        raise wrong(name, f"{name} must be a list of at most {MOST_BIASED} token ids")
    return tuple(given)


def _logit_bias(fields: Fields) -> dict[int, float]:
    given = fields.mapping("logit_bias") or {}
    if len(given) > MOST_BIASED:
        raise wrong("logit_bias", f"logit_bias may name at most {MOST_BIASED} tokens")
    biases: dict[int, float] = {}
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise wrong("logit_bias", f"logit_bias has the key {key[:80]!r}, which is no token id")
        if not number or not -100 <= value <= 100:
            raise wrong("logit_bias", f"logit_bias of token {key} is not a number from -100 to 100")
        biases[int(key)] = float(value)
    return biases


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.mapping("stream_options")
    if given is None:
        return False
    if not stream:
        raise wrong("stream_options", "stream_options was sent without stream: true; send both")
    inner = Fields(given, "stream_options.")
    usage = inner.flag("include_usage") or False
    inner.rest(frozenset({"include_obfuscation"}), {}, Notes())
    return usage
