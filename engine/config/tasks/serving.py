"""Settings of chat and serve, which answer until they are stopped."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.config.choices import DETERMINISTIC
from engine.config.numbers import MOST_SECONDS
from engine.config.settings import setting
from engine.config.spelling import as_text, json_object, one_or_many
from engine.config.tasks.inference import Machine, OneModel, Sampling

Texts = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


class ChatSettings(Sampling, OneModel):
    """`engine chat`. Sampling that is not given is that of generation_config.json, if any."""

    system: str | None = setting(None, "Text", "system message")
    max_new_tokens: int = setting(1024, "Text", "longest answer", ge=1)
    stop: Texts = setting((), "Text", "end an answer before this text", repeat=True)


class ServeSettings(Machine):
    """`engine serve`."""

    model: Annotated[str, BeforeValidator(as_text)] = setting(
        ..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1
    )
    adapter: Texts = setting(
        (), "Model", "adapter to serve as a model of its own: NAME=PATH, or PATH", repeat=True
    )
    name: str | None = setting(None, "Model", "what requests call the model; else its own name")
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(json_object)] = setting(
        {}, "Model", "variables of the chat template where a request sets none"
    )
    deterministic: bool = setting(False, "Machine", DETERMINISTIC)
    host: str = setting(
        "127.0.0.1", "Network", "address to listen on; any but this machine's own needs a key"
    )
    port: int = setting(8000, "Network", "port to listen on; 0 takes a free one", ge=0, le=65535)
    ui: bool = setting(
        False, "Network", "also a page for chats in a browser, two models side by side"
    )
    api_key: str | None = setting(
        None,
        "Network",
        "key that requests must bring; better in ENGINE_API_KEY, which other users cannot see",
    )
    allow_origin: Texts = setting(
        (), "Network", "origin whose pages may use the server: https://example.org", repeat=True
    )
    allowed_host: Texts = setting(
        (), "Network", "further name under which a local server may be asked", repeat=True
    )
    max_running: int = setting(32, "Limits", "answers that are made at a time", ge=1, le=1024)
    max_waiting: int = setting(512, "Limits", "answers that may wait for their turn", ge=0)
    max_tokens: int = setting(4096, "Limits", "longest answer in tokens", ge=1)
    max_context: int | None = setting(
        None, "Limits", "longest prompt with its answer, in tokens; else the model's own", ge=1
    )
    max_cache_tokens: int | None = setting(
        None, "Limits", "tokens of keys and values of all running answers together", ge=1
    )
    max_body: float = setting(4.0, "Limits", "largest request in MiB", gt=0, le=1024)
    max_connections: int = setting(
        2048, "Limits", "clients that may be connected", ge=1, le=1 << 20
    )
    request_timeout: float = setting(
        600.0, "Limits", "seconds until an answer is given up", gt=0, le=MOST_SECONDS
    )
    shutdown_timeout: float = setting(
        30.0,
        "Limits",
        "seconds that running answers get when the server is stopped",
        ge=0,
        le=MOST_SECONDS,
    )
