"""Rendering: the sandbox, the limits around it, and what the caller is told."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.errors import DataError
from engine.tokenization.chat_template import (
    CHATML,
    PLAIN,
    ChatTemplate,
    default_template,
    plain_messages,
)
from engine.tokenization.messages import ConversationError
from engine.tokenization.sandbox import MAX_SOURCE_BYTES, Limits

ROOT = Path(__file__).parents[3]
USER = [{"role": "user", "content": "hi"}]
CHAT = [*USER, {"role": "assistant", "content": "hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
QUICK = Limits(cpu_seconds=1)


def render(source: str) -> str:
    template = ChatTemplate(source, TOKENS, limits=QUICK)
    try:
        return template.render(USER)
    finally:
        template.close()


def test_special_tokens_messages_and_keyword_arguments_are_variables() -> None:
    source = (
        "{{ bos_token }}{{ messages[0].content }}{{ tools }}{{ mood }}{{ add_generation_prompt }}"
    )
    template = ChatTemplate(source, TOKENS)
    text = template.render(USER, True, tools=[{"name": "f"}], mood="!")
    assert text == "<s>hi[{'name': 'f'}]!True"
    assert template.render(USER, bos_token="B") == "BhiNoneFalse"


def test_blocks_are_trimmed_as_hugging_face_trims_them() -> None:
    source = "a\n  {% if true %}\n  b\n  {% endif %}\nc\n"
    assert render(source) == "a\n  b\nc"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'k': 'é<&>'} | tojson }}", '{"k": "é<&>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ dict(a=1)['a'] }}{{ dict.fromkeys([7]) }}", "1{7: None}"),
        ("{% set n = namespace(x=1) %}{% if 1 %}{% set n.x = 2 %}{% endif %}{{ n.x }}", "2"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{{ 'x'.split('-')[0].strip().startswith('x') }}", "True"),
        ("{{ '\\u00e9' ~ 'é' | upper ~ '😀' | length }}", "éÉ1"),
    ],
)
def test_filters_globals_and_extensions_of_chat_templates_work(source: str, text: str) -> None:
    assert render(source) == text


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__name__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ ('{0.__class__.__mro__}' | format).format(messages) }}",
    "{{ (''.format)('{0.__class__}', messages).__class__ }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ messages.append({}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ (range(1).__iter__).__self__ }}",
    "{{ [].__reduce_ex__(2) }}",
]
LEAKS = ("<class", "<module", "<function", "<built-in", "object at 0x", "root:", "uid=", "Popen")


@pytest.mark.parametrize("source", ESCAPES)
def test_an_attempt_to_leave_the_sandbox_is_one_clear_error_or_shows_nothing(source: str) -> None:
    try:
        text = render(source)
    except DataError as error:
        text = str(error)
        is_clear = "\n" not in text and "chat template" in text
    else:
        is_clear = not any(leak in text for leak in LEAKS)
    assert is_clear, text


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}"]
)
def test_a_sandbox_violation_is_called_one(source: str) -> None:
    with pytest.raises(DataError, match="tried to leave the sandbox"):
        render(source)


HOGS = [
    "{{ 'a' * 1000000000 }}",
    "{% set x = messages[0].content * 500000000 %}ok",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ range(1000000000) | list }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
]


@pytest.mark.parametrize("source", HOGS, ids=range(len(HOGS)))
def test_a_template_that_takes_too_much_memory_is_stopped(source: str) -> None:
    with pytest.raises(DataError, match=r"limit|stopped|not a valid"):
        render(source)


def test_a_template_without_end_is_stopped_and_the_next_one_works() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(
        "{% if messages[0].content == 'go' %}" + loop + "{% endif %}ok", limits=QUICK
    )
    assert template.render(USER) == "ok"
    before = time.process_time()
    with pytest.raises(DataError, match="used more than 1 s of processor time") as caught:
        template.render([{"role": "user", "content": "go"}])
    assert time.process_time() - before < 1
    assert "\n" not in str(caught.value)
    assert template.render(USER) == "ok"


def test_the_template_process_can_write_no_file(tmp_path: Path) -> None:
    """Should a hole in the sandbox open, no byte gets onto the disk."""
    target = tmp_path / "written"
    code = (
        "import pathlib, sys; from engine.tokenization import sandbox_worker as worker\n"
        "worker._limit_process(1 << 29)\n"
        "pathlib.Path(sys.argv[1]).write_text('x' * 100)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, check=False, cwd=ROOT
    )
    assert done.returncode != 0
    assert b"File too large" in done.stderr
    assert target.read_bytes() == b""


def test_a_template_that_is_not_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(DataError, match=r"not a valid Jinja template: line 2: .*endfor"):
        render("x\n{% endfor %}")


def test_a_template_beyond_the_size_limit_is_refused() -> None:
    with pytest.raises(DataError, match="larger than 256 KiB"):
        ChatTemplate("x" * (MAX_SOURCE_BYTES + 1))


def test_what_the_template_says_about_a_conversation_reaches_the_user() -> None:
    with pytest.raises(ConversationError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_row_takes_less_than_a_millisecond_of_both_processes() -> None:
    """Of the processor's time: other tests run at the same time."""
    template = ChatTemplate(CHATML, TOKENS, end_tokens=["<|im_end|>"])
    template.locate(CHAT)
    process = template._process._process
    assert process is not None
    worker, rows = psutil.Process(process.pid), 400

    def used() -> float:
        of_worker = worker.cpu_times()
        return time.process_time() + of_worker.user + of_worker.system

    start = used()
    for _ in range(rows):
        template.locate(CHAT)
    assert (used() - start) / rows < 1e-3


def test_the_process_is_started_again_after_it_was_closed_or_killed() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(USER) == "hi"
    template.close()
    assert template.render(USER) == "hi"
    process = template._process._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render(USER) == "hi"


def test_values_of_none_are_dropped_and_reasoning_stands_under_every_name() -> None:
    message = {"role": "assistant", "content": None, "thinking": "t", "name": "n"}
    assert plain_messages([message]) == [
        {"role": "assistant", "name": "n", "thinking": "t", "reasoning_content": "t"}
    ]


def test_the_default_is_chatml_where_its_tokens_exist_and_plain_text_elsewhere() -> None:
    assert default_template({"<|im_start|>": 1, "<|im_end|>": 2}, False) == CHATML
    assert default_template({"<|im_end|>": 2}, True) == PLAIN
    plain = ChatTemplate(default_template({}, False), {"eos_token": "</s>"})
    located = plain.locate(CHAT)
    assert located.text == "hi\nhello</s>"
    assert [located.text[start:end] for start, end in located.spans] == ["hello</s>"]
    assert plain.render(USER, add_generation_prompt=True) == "hi\n"
