"""Tasks whose samples are made for a tokenizer and a length, and kept in a cache."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from .cache import cached
from .fit import Fitter, TooLongError
from .generator import Draft, Generator
from .prompt import Tokenizer, fingerprint
from .sample import EvalSample
from .task import Task, check_num_samples

FORMAT = 1


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task over a `Generator`. `length` counts prompt, chat template, prefix and the tokens kept for the answer.

    Attributes:
        default_samples: how many samples `num_samples=None` means; `None` = all that the generator has.
    """

    default_samples: int | None = None

    @abstractmethod
    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """Return what makes the drafts; raises `UserError` for missing data."""

    def samples(
        self,
        tokenizer: Tokenizer,
        length: int | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        data_dir: Path | str | None = None,
        cache_dir: Path | str | None = None,
    ) -> list[EvalSample]:
        """See `Task.samples`."""
        check_num_samples(num_samples)
        generator = self.generator(tokenizer, length, seed, data_dir)
        limits = (num_samples or self.default_samples, generator.num_samples())
        count = min(limit for limit in limits if limit is not None)
        key = {
            "format": FORMAT,
            "task": self.name,
            "length": length,
            "num_samples": count,
            "seed": seed,
            "tokenizer": fingerprint(tokenizer),
            "max_new_tokens": self.max_new_tokens,
            "chat": self.chat,
            **generator.facts(),
        }
        fitter = Fitter(generator, tokenizer, length, self.max_new_tokens, self.name, seed, self.chat)
        name = f"{self.name}_{length or 'natural'}_{count}"
        return cached(cache_dir, name, key, lambda: self._make(generator, fitter, count, length))

    def _make(self, generator: Generator, fitter: Fitter, count: int, length: int | None) -> list[EvalSample]:
        samples: list[EvalSample] = []
        too_long: list[TooLongError] = []
        for index in range(generator.num_samples() or count):
            if len(samples) == count:
                break
            try:
                samples.append(self._sample(index, length, *fitter.sample(index)))
            except TooLongError as error:
                too_long.append(error)
                if not generator.fit_each:
                    raise
        if not samples:
            raise min(too_long, key=lambda error: error.needed)
        return samples

    def _sample(self, index: int, length: int | None, draft: Draft, num_tokens: int) -> EvalSample:
        return EvalSample(
            sample_id=draft.extra.pop("id", str(index)),
            task=self.name,
            length=length,
            context=draft.context,
            question=draft.question,
            answers=draft.answers,
            max_new_tokens=self.max_new_tokens,
            answer_prefix=draft.answer_prefix,
            chat=self.chat,
            extra={"gold_spans": [list(span) for span in draft.gold_spans], "num_tokens": num_tokens} | draft.extra,
        )
