"""A model of this engine as the harness's LM.

Texts become tokens as the harness's own Hugging Face model makes them: with the tokenizer's special
tokens unless the text begins with BOS already, the spaces at the end of a context given to the
continuation, and BOS (or EOS where there is none) before a continuation without a context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.tasks.inference import Sampling
from engine.errors import ConfigError
from engine.harness.scoring import TOKENS_PER_BATCH, score_pairs
from engine.inference.generation import complete
from engine.tokenization.tokenizer import Tokenizer
from models.decoder import Decoder

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `task_manager` says how to install it, before anything is loaded
    TemplateLM = object

_ANSWER_TOKENS = 256
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests with `model`, of inputs of at most `window` tokens."""

    def __init__(
        self,
        model: Decoder,
        own_tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        window: int,
        template_kwargs: Mapping[str, Any] | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer = model, own_tokenizer
        self._stop_ids, self._window = stop_ids, window
        self._template_kwargs = dict(template_kwargs or {})
        self._tokens = tokens_per_batch
        prefix = own_tokenizer.bos_token_id
        prefix = own_tokenizer.eos_token_id if prefix is None else prefix
        if prefix is None:
            raise ConfigError(
                "The model's tokenizer names neither a BOS nor an EOS token, and the harness puts "
                "one before texts without a context. Add eos_token to its tokenizer_config.json."
            )
        self._prefix = prefix

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        end = self._tokenizer.eos_token_id
        return self._prefix if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names this tokenizer in the harness's records."""
        return "engine"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; special tokens are added unless it begins with BOS or they are off."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self._prefix], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for key, _, continuation in requests:
            if not 0 < len(continuation) <= self._window:
                raise ConfigError(_not_scorable(key, len(continuation), self._window))
        scores = score_pairs(self._model, pairs, self._window, self._tokens)
        for (key, *_), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = list[tuple[list[int], list[int]]](), list[int]()
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self._window,
                context_len=1,
            )
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        scores = score_pairs(self._model, pairs, self._window, self._tokens)
        for number, (score, _) in zip(owners, scores, strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        kwargs = dict(normalize_gen_kwargs(asked, _ANSWER_TOKENS))
        end = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops: Sequence[str] = [s for s in handle_stop_sequences(kwargs["until"], end) if s]
        longest = self._window - kwargs["max_gen_toks"]
        if longest < 1:
            raise ConfigError(
                f"A task asks for answers of {kwargs['max_gen_toks']} tokens, and the model reads "
                f"{self._window} together with the question. Give a larger --max-length."
            )
        wanted = {key: kwargs[key] for key in _SAMPLING if kwargs.get(key) is not None}
        if not kwargs["do_sample"]:
            wanted["temperature"] = 0.0
        result = complete(
            self._model,
            self._tokenizer,
            self.tok_encode(context)[-longest:],
            max_new_tokens=kwargs["max_gen_toks"],
            stop_ids=self._stop_ids,
            stop=stops,
            sampling=Sampling(**wanted),
        )
        self.cache_hook.add_partial("generate_until", (context, asked), result.text)
        return result.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, ready for an answer or in the midst of one."""
        text = self._tokenizer.chat_template.render(
            chat_history, add_generation_prompt=add_generation_prompt, **self._template_kwargs
        )
        if add_generation_prompt:
            return text
        # The last message goes on: what the template puts after it is left out.
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's records; None where none is applied."""
        return self._tokenizer.chat_template.source if chat_template else None


def _not_scorable(texts: tuple[str, str] | None, tokens: int, window: int) -> str:
    """Why a continuation of so many tokens has no log-likelihood; `texts` are both, where known."""
    which = "" if texts is None else f" ({texts[1][:60]!r} after {texts[0][-60:]!r})"
    if not tokens:
        return (
            f"A task has an answer without a token of its own{which}: the tokenizer joins it to "
            "the question's end. Let the task's answers begin with a space, and leave out empty "
            "ones."
        )
    return (
        f"A task has an answer of {tokens} tokens{which}, and the model reads {window}. Give a "
        "larger --max-length, or a task with shorter answers."
    )
