"""Random conversations: texts equal transformers', spans what the rendered beginnings say."""

import random
from typing import Any

import pytest

from engine.errors import DataError
from engine.tokenization.chat_template import ChatTemplate
from tests.interop.tokenization.conversations import TOOLS, Chat, Messages
from tests.interop.tokenization.test_real_templates import (
    KWARGS,
    NAMED,
    TEMPLATES,
    check_spans,
    end_tokens,
    source,
    theirs,
)

pytestmark = pytest.mark.interop

PIECES = (
    "hello", "  pad ", "\n\nline\n", "<think>", "</think>", "<think>\nx\n</think>\n\n",
    "<|im_end|>", "<|im_start|>assistant\n", "</s>", "[INST]", "[/INST]", " é🙂", "{{ x }}",
    "/no_think", "<tool_response>", "</tool_response>", '"q" \\n', "A", "None", "<|eot_id|>",
    "[TOOL_CALLS]", "<tool_call>\n{}\n</tool_call>", "\t", "qmk0q1z", "",
)  # fmt: skip
FAMILIES = [
    name
    for name in sorted(TEMPLATES)
    if any(part in name for part in ("Qwen", "trl/qwen3", "llama3", "Llama", "mistral", "SmolLM3"))
    and "{% generation" not in source(name)
    and "{%- generation" not in source(name)
]


class Writer:
    """Writes conversations from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self) -> str:
        return "".join(self._random.choice(PIECES) for _ in range(self._random.randint(0, 4)))

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def value(self, depth: int = 0) -> Any:
        kind = self._random.randint(0, 5 if depth < 2 else 3)
        if kind == 4:
            return [self.value(depth + 1) for _ in range(self._random.randint(0, 3))]
        if kind == 5:
            return {self.text(): self.value(depth + 1) for _ in range(self._random.randint(0, 3))}
        return (self._random.randint(-5, 10**6), None, True, self.text())[kind]

    def call(self) -> dict[str, Any]:
        arguments = {key: self.value() for key in ("city", "k", "x y") if self.chance(0.5)}
        function = {"name": self._random.choice(("get_weather", "now")), "arguments": arguments}
        identity = f"{self._random.randint(0, 10**9 - 1):09d}"
        return {"type": "function", "id": identity, "function": function}

    def answer(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text()}
        if self.chance(0.25):
            message[self._random.choice(("reasoning_content", "thinking"))] = self.text()
        if self.chance(0.1):
            message["weight"] = 0
        return message

    def chat(self) -> Chat:
        messages: Messages = []
        if self.chance(0.4):
            messages.append({"role": "system", "content": self.text()})
        for _ in range(self._random.randint(1, 5)):
            messages.append({"role": "user", "content": self.text()})
            if self.chance(0.35):
                calls = [self.call() for _ in range(self._random.randint(1, 2))]
                messages.append({**self.answer(), "tool_calls": calls})
                messages += [
                    {"role": "tool", "content": self.text(), "tool_call_id": call["id"]}
                    for call in calls
                ]
            messages.append(self.answer())
        return Chat(messages, TOOLS if self.chance(0.4) else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations(name: str) -> None:
    template = ChatTemplate(source(name), NAMED, end_tokens=end_tokens(name))
    writer = Writer(20)
    for _ in range(25):
        chat, kwargs = writer.chat(), KWARGS[writer.chance(0.5)]
        expected = theirs(name, chat.messages, chat.tools, **kwargs)
        try:
            text = template.render(chat.messages, tools=chat.tools, **kwargs)
        except DataError:
            text = None
        assert text == expected, chat
        try:
            spans = template.locate(chat.messages, tools=chat.tools, **kwargs).spans
        except DataError:
            continue
        check_spans(name, chat, kwargs, text or "", spans)
    template.close()
