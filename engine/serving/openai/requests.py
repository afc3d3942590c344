"""Read requests for chats and completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.conversation.prompts import RESERVED
from engine.data.rows.fields import RowFault, json_name
from engine.data.rows.turns import parse_message
from engine.serving.openai.api_errors import Notes, wrong
from engine.serving.openai.decoding import IGNORED, MOST_TOP, REFUSED, Decoding, read_decoding
from engine.serving.openai.fields import Fields

_MOST_TOKENS = 1 << 24
_MOST_PROMPTS, _MOST_MESSAGES, _MOST_TOOLS = 256, 4096, 256
_TEMPLATE_SETTINGS = ("enable_thinking", "reasoning_effort")


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer may call tools (`auto`), must (`required`), or may not (`none`).

    `name` is the tool that must be called, if one was named.
    """

    kind: str
    name: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A request of `/v1/chat/completions`."""

    model: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    tool_choice: ToolChoice
    several_calls: bool
    template_kwargs: dict[str, Any]
    decoding: Decoding


@dataclass(frozen=True)
class CompletionRequest:
    """A request of `/v1/completions`; each prompt is a text or a list of ids."""

    model: str | None
    prompts: list[str | list[int]]
    echo: bool
    decoding: Decoding


def read_completion(body: Mapping[str, Any], notes: Notes) -> CompletionRequest:
    """A request for completions. Raises `ApiError`."""
    fields = Fields(body)
    model, prompts = fields.text("model"), _prompts(fields.given("prompt"))
    asked = fields.whole("max_tokens", 0, _MOST_TOKENS)
    logprobs = fields.whole("logprobs", 0, MOST_TOP)
    decoding = read_decoding(fields, logprobs, 16 if asked is None else asked)
    echo = fields.flag("echo") or False
    if decoding.max_tokens == 0 and not echo:
        raise wrong("max_tokens", "max_tokens is 0, so nothing would be answered; send echo too")
    best_of = fields.whole("best_of", 1, _MOST_TOKENS)
    if best_of not in (None, decoding.choices):
        raise wrong("best_of", "best_of is not done here; leave it out, or make it equal to n")
    if fields.text("suffix"):
        raise wrong("suffix", "suffix is not done here: a text is only gone on from its end")
    fields.rest(IGNORED, REFUSED, notes)
    return CompletionRequest(model, prompts, echo, decoding)


def read_chat(body: Mapping[str, Any], notes: Notes) -> ChatRequest:
    """A request for a chat's next message. Raises `ApiError`."""
    fields = Fields(body)
    model, messages = fields.text("model"), _messages(fields.items("messages"), notes)
    earlier = fields.whole("max_tokens", 1, _MOST_TOKENS)
    asked = fields.whole("max_completion_tokens", 1, _MOST_TOKENS)
    if asked is not None and earlier not in (None, asked):
        raise wrong("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
    decoding = read_decoding(fields, _chat_logprobs(fields), asked or earlier)
    tools = _tools(fields.items("tools"), notes)
    choice = _tool_choice(fields.given("tool_choice"), tools)
    several = fields.flag("parallel_tool_calls")
    kwargs = _template_kwargs(fields)
    _only_text(fields)
    if fields.given("add_generation_prompt") not in (None, True):
        raise wrong("add_generation_prompt", "an answer is always begun; leave it out")
    fields.rest(IGNORED, REFUSED, notes)
    return ChatRequest(model, messages, tools, choice, several is not False, kwargs, decoding)


def _prompts(given: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or a list of ids."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise wrong(
            "prompt",
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
        )
    if all(_is_id(item) for item in given):
        return [given]
    if len(given) > _MOST_PROMPTS:
        raise wrong("prompt", f"prompt is a list of {len(given)}; at most {_MOST_PROMPTS} are read")
    prompts: list[str | list[int]] = []
    for index, item in enumerate(given):
        ids = isinstance(item, list) and item and all(_is_id(inner) for inner in item)
        if not isinstance(item, str) and not ids:
            raise wrong(
                "prompt",
                f"prompt[{index}] is {json_name(item)} where a text or a list of token ids was "
                "expected",
            )
        prompts.append(item)
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(given: list[Any] | None, notes: Notes) -> list[dict[str, Any]]:
    if not given or len(given) > _MOST_MESSAGES:
        raise wrong("messages", f"messages must be a list of 1 to {_MOST_MESSAGES} messages")
    unused: set[str] = set()
    messages = []
    for index, item in enumerate(given):
        try:
            messages.append(parse_message(item, f"messages[{index}]", unused))
        except RowFault as fault:
            raise wrong(f"messages[{index}]", str(fault)) from None
    notes.ignored += sorted(unused)
    return messages


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "top_logprobs was sent without logprobs: true; send both")
    return (top or 0) if wanted else None


def _tools(given: list[Any] | None, notes: Notes) -> list[dict[str, Any]] | None:
    if not given:
        return None
    if len(given) > _MOST_TOOLS:
        raise wrong("tools", f"tools has {len(given)} entries; at most {_MOST_TOOLS} are read")
    for index, tool in enumerate(given):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise wrong(where, f'{where} must be an object with "type": "function"')
        function = tool.get("function")
        if not isinstance(function, dict):
            raise wrong(where, f"{where}.function is {json_name(function)}, not an object")
        inner = Fields(function, f"{where}.function.")
        name = inner.text("name")
        if not name or len(name) > 256 or any(c in name for c in '<>\n"'):
            raise wrong(
                where, f"{where}.function.name must be a plain name of up to 256 characters"
            )
        inner.text("description")
        inner.mapping("parameters")
        if inner.flag("strict"):
            notes.ignored.append(f"{where}.function.strict")
    return given


def _tool_choice(given: Any, tools: list[dict[str, Any]] | None) -> ToolChoice:
    if given is None:
        return ToolChoice("auto")
    if given in ("none", "auto"):
        return ToolChoice(given)
    names = [tool["function"]["name"] for tool in tools or []]
    if not names:
        raise wrong("tool_choice", "tool_choice asks for a call, and there are no tools; send some")
    if given == "required":
        return ToolChoice("required")
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(given, dict) or given.get("type") != "function" or name not in names:
        raise wrong(
            "tool_choice",
            "tool_choice must be none, auto, required, or the name of one of the tools: "
            f'{{"type": "function", "function": {{"name": "{names[0]}"}}}}',
        )
    return ToolChoice("required", str(name))


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    kwargs = dict(fields.mapping("chat_template_kwargs") or {})
    for name in _TEMPLATE_SETTINGS:
        value = fields.given(name)
        if value is not None:
            kwargs.setdefault(name, value)
    taken = sorted(RESERVED & kwargs.keys())
    if taken:
        raise wrong("chat_template_kwargs", f"{taken[0]} is no setting of a template; leave it out")
    return kwargs


def _only_text(fields: Fields) -> None:
    """Refuse answers in any other form than text."""
    form = fields.mapping("response_format")
    if form is not None and form.get("type") != "text":
        raise wrong(
            "response_format",
            f"response_format {str(form.get('type'))[:80]!r} is not done here: "
            f"{REFUSED['json_schema']}",
            "unsupported",
        )
    modalities = fields.items("modalities")
    if modalities not in (None, ["text"]):
        raise wrong("modalities", 'modalities must be ["text"]: answers are text', "unsupported")
