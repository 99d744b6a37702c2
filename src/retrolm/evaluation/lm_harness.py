"""RetroLM as a model of lm-eval (EleutherAI's evaluation harness), so that its tasks run on all our methods.

`python -m retrolm.evaluation.lm_harness run --model retrolm --model_args pretrained=…,method=…,kv_budget=… --tasks …`
takes all arguments of `lm_eval`; in Python call `register()` first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..engine.model import RetroLM
from ..errors import RetroLMError, UserError
from .plain_prompts import PlainPrompts

DEFAULT_TOKENS = 256


def register() -> type[Any]:
    """File the model under "retrolm" in lm-eval's registry and return its class; raises `UserError` without lm-eval."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("This needs lm-eval: pip install 'retrolm[harness]'.") from None

    @register_model("retrolm")
    class RetroHarnessModel(HarnessModel, LM):
        def __init__(self, **options: Any) -> None:
            LM.__init__(self)
            HarnessModel.__init__(self, **options)

    return RetroHarnessModel


class HarnessModel:
    """What lm-eval asks of a model. `requests` are lm-eval's instances: objects with their arguments as `args`.

    Args:
        pretrained: model name or folder. method: see `retrolm methods`. retriever: as `from_pretrained`.
        batch_size: prompts continued side by side. device: "cuda" or "cpu"; None = a GPU if there is one.
        options: fields of `RetroConfig` (kv_budget, page_size, …), and knobs of the method as METHOD.knob.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "retrolm",
        retriever: str = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        own = {key: options.pop(key) for key in [*options] if key.startswith(f"{method}.")}
        lm = RetroLM.from_pretrained(
            pretrained,
            method=method,
            method_options={key.removeprefix(f"{method}."): value for key, value in own.items()},
            retriever=None if retriever == "none" else retriever,
            dtype=dtype,
            device_map=_device(device),
            **options,
        )
        self.tokenizer = lm.tokenizer
        self._prompts = PlainPrompts(lm)
        self._batch_size = int(batch_size or 1) if str(batch_size or 1).isdecimal() else 1
        self._name = pretrained

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, where one is asked for."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages in the model's chat format."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, in the order of the requests."""
        found: dict[int, str] = {}
        for numbers, max_new_tokens, stops in self._batches([request.args for request in requests]):
            contexts = [requests[number].args[0] for number in numbers]
            texts = self._prompts.continue_all(contexts, max_new_tokens, stops)
            found |= dict(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _batches(self, arguments: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[list[int], int, tuple[str, ...]]]:
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, (_, settings) in enumerate(arguments):
            groups.setdefault(_limits(settings), []).append(number)
        for (max_new_tokens, stops), numbers in groups.items():
            for first in range(0, len(numbers), self._batch_size):
                yield numbers[first : first + self._batch_size], max_new_tokens, stops

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        return [self._prompts.log_likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        return [self._prompts.log_likelihood_rolling(request.args[0]) for request in requests]


def _device(name: str | None) -> str | None:
    """The device to load on; lm-eval names "cuda" of its own accord, on machines without a GPU too."""
    return None if name is None or (name.startswith("cuda") and not torch.cuda.is_available()) else name


def _limits(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Limit on new tokens and stop strings of a request; raises `UserError` for sampling."""
    if settings.get("do_sample"):
        raise UserError("Only greedy generation is supported here. Set do_sample=False in the task's settings.")
    limit = settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_TOKENS
    until = settings.get("until") or []
    return int(limit), tuple([until] if isinstance(until, str) else until)


def main() -> None:
    """Run lm-eval's own command line with the model known to it; what we refuse ends it in one line of error."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except RetroLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
