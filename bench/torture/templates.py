"""Chat templates that try to leave their sandbox, or never end."""

from __future__ import annotations

import random
import resource
from collections import Counter

from bench.torture.campaign import Campaign, Figures
from bench.torture.damage import damaged
from engine.errors import DataError
from engine.tokenization.chat_template import ChatTemplate
from tests.engine.tokenization.test_chat_template import ESCAPES, HOGS, LEAKS

_VALUES = (
    "''", "messages", "messages[0]", "cycler", "joiner", "lipsum", "namespace", "dict", "range",
    "raise_exception", "strftime_now", "self", "loop", "{}", "[]", "()", "1", "none",
)  # fmt: skip
_ACCESSES = (
    ".__class__.__mro__", "['__class__']", "|attr('__init__')", ".__init__.__globals__",
    "|attr('\\x5f\\x5fclass\\x5f\\x5f')", "|map(attribute='__class__')|list",
)  # fmt: skip
PAYLOADS = [
    *ESCAPES, *("{{ " + value + access + " }}" for value in _VALUES for access in _ACCESSES),
]  # fmt: skip
ENDLESS = [
    *HOGS,
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{{ range(99999)|list|length }}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ (3 ** 99999999) % 7 }}",
    "{% set x = 'ab' * 9999999 %}{% for i in range(999) %}{{ x|replace('a', '')|length }}"
    "{% endfor %}",
    "{{ ('a ' * 9999999)|wordwrap(1)|length }}",
    "{{ ('http://a.b ' * 999999)|urlize|length }}",
    "{{ ('<' * 99999999)|striptags|length }}",
    "{{ lipsum(n=99999)|length }}",
    "{{ ('-a' * 9999999)|title|length }}",
    "{% for i in range(99999) %}{{ range(9999)|sort|length }}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "{{ ('&' * 99999999)|escape|length }}",
    "{{ messages|tojson(indent=99999999)|length }}",
]
_REAL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PIECES = (
    b"{{",
    b"}}",
    b"{%",
    b"%}",
    b"'",
    b"|",
    b"(",
    b")",
    b"range(9)",
    b"~",
    b"*",
    b"__",
    b"\0",
)
_MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def _rendered(source: str) -> tuple[str, str, float]:
    """What came of a template, its text or message, and the processor time of both processes."""
    before = _seconds()
    try:
        text, outcome = ChatTemplate(source, {"bos_token": "<s>"}).render(_MESSAGES), "rendered"
    except DataError as error:
        text, outcome = str(error), "named"
        if len(text) > 2000 or not text.isprintable():
            outcome = "unprintable"
    except Exception as error:
        text, outcome = repr(error), f"raw {type(error).__name__}"
    return outcome, text, _seconds() - before


def _seconds() -> float:
    parts = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, parts))


def templates(trials: int, seed: int) -> Figures:
    """All payloads and endless templates, and so many damaged ones."""
    chance, counts, worst = random.Random(seed), Counter[str](), 0.0
    leaks = sum(
        outcome == "rendered" and any(leak in text for leak in LEAKS)
        for outcome, text, _ in map(_rendered, PAYLOADS)
    )
    endless = [_rendered(source) for source in ENDLESS]
    for _ in range(trials):
        source = damaged(_REAL.encode(), chance, _PIECES).decode("utf-8", "replace")
        outcome, _, seconds = _rendered(source)
        counts[outcome] += 1
        worst = max(worst, seconds)
    return {
        "payloads": len(PAYLOADS),
        "leaks": leaks,
        "endless": len(ENDLESS),
        "worst_endless_seconds": round(max(seconds for _, _, seconds in endless), 2),
        "raw_endless": sum(outcome.startswith("raw") for outcome, _, _ in endless),
        "damaged": trials,
        "worst_damaged_seconds": round(worst, 2),
        **counts,
    }


def _passes(figures: Figures) -> bool:
    raw = any(key.startswith(("raw ", "unprintable")) for key in figures)
    return not (raw or figures["leaks"] or figures["raw_endless"]) and (
        figures["worst_endless_seconds"] <= 3
    )


TEMPLATES = {
    "T14": Campaign("templates that escape, never end, or are damaged", 2_000, templates, _passes)
}
