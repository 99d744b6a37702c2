"""`RetroLM`: a stock transformers model that reads texts page by page on a fixed KV budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextGenerationPipeline

from ..config import RetroConfig
from ..errors import UserError
from ..methods import METHODS, PageMethod
from ..paging import page_lengths
from ..retriever import PageRetriever, check_choices, load_retriever, read_card
from ..store import DigestIndex, PageLayout, PageStore
from . import answer_dense, answer_landmark, answer_pages, answer_prune, answer_tokens  # noqa: F401  (file programs)
from .adapter import LoraAdapter, load_adapter
from .agreement import with_agreement
from .answer_stream import stream_answer
from .answering import PROGRAMS, Prompt
from .attachment import Attachment
from .backbone import Backbone
from .chunk_size import with_chunk_size
from .continuing import continue_prompts
from .document import Document, Past
from .encoder import Encoder, Progress
from .generate_options import GenerateOptions
from .loading import eos_ids, load_model, pad_id
from .page_asking import question_ids, retrieve, turn
from .page_reading import cut_pages, page_spans
from .page_stores import new_store, page_layout
from .pipeline import RetroLMPipeline
from .prefill_parts import PrefillParts
from .prompts import PromptFormat, prompt_format
from .pull import resolve_model
from .results import Answer, Retrieval
from .shipped import find_shipped, resolve_retriever
from .shipped_adapters import adapter_for
from .sources import is_ids, tokenise
from .visible import require_bookmarks


class RetroLM:
    """Answers questions over texts far longer than the model's window.

    Build one with `from_pretrained`, or around a model that is already loaded. The model itself stays as it is;
    `detach` removes the last trace.

    Args:
        model: a transformers causal language model of a supported family.
        tokenizer: its tokenizer; None if only token ids are read.
        config: budget and options. method: name of the method. method_options: its knobs.
        retriever: trained page retriever, or None for the untrained copy (the paper's "w/o Stage1").
        chat: put documents into the chat template; None = if the tokenizer has one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        config: RetroConfig | None = None,
        method: str = "retrolm",
        method_options: Mapping[str, Any] | None = None,
        retriever: PageRetriever | None = None,
        chat: bool | None = None,
    ) -> None:
        self.config = config or RetroConfig()
        self.tokenizer = tokenizer
        self.method = METHODS.get(method).with_options(method_options)
        require_bookmarks(self.config, self.method)
        self.retriever: PageRetriever | None = None
        self.adapter: LoraAdapter | None = None
        self.disk_tier: tuple[Path, int] | None = None
        self.model = model
        self.backbone = Backbone(model, self._position_limit())
        self.config = with_agreement(
            with_chunk_size(self.config, self.backbone), self.method, has_words=tokenizer is not None
        )
        if self.method.has_budget and self.config.kv_budget > self.backbone.window:
            raise UserError(
                f"kv_budget={self.config.kv_budget} exceeds the model's window of {self.backbone.window} positions. "
                f"Use at most {self.backbone.window}."
            )
        if self.method.has_budget:
            self.method.check_budget(self.config.kv_budget)
        self.program = PROGRAMS.get(self.method.kind)(self)
        self.attachment = Attachment(self.backbone)
        self.format: PromptFormat | None = None if tokenizer is None else prompt_format(tokenizer, chat)
        self.eos_ids = eos_ids(model.generation_config, self.backbone.config, tokenizer)
        self.pad_id = pad_id(tokenizer, self.eos_ids)
        self._bookmark = self._bookmark_row()
        if retriever is not None:
            self.use_retriever(retriever)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        retriever: str | Path | None = "auto",
        adapter: str | Path | None = None,
        method: str = "retrolm",
        method_options: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        chat: bool | None = None,
        model_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> RetroLM:
        """Load a stock model and attach to it.

        Args:
            model: Hugging Face id, local folder, or the name of a demo backbone (`retrolm pull`).
            retriever: folder of a trained page retriever; "auto" = the one shipped for this backbone, if any;
                None = untrained.
            adapter: folder of a LoRA adapter (stage 2, or PEFT's), the name of a shipped one, or "auto" = the one
                shipped for this backbone, if any; bookmark rows go past it.
            method: name of the method (`retrolm methods`). method_options: its knobs.
            dtype, device_map: as transformers' `from_pretrained`; by default a CUDA device is used if there is one,
                and demo backbones compute in bfloat16 there (in float32 on a CPU). A function is called with the loaded
                model, to place it.
            model_options: further arguments for transformers' `from_pretrained` (quantization_config, …).
            options: fields of `RetroConfig` (kv_budget, …). Without `page_size` pages are as long as those that the
                retriever was trained with.

        Raises:
            UserError: unknown option, method or model; UnsupportedModelError: a family RetroLM can't attach to;
            IncompatibleRetrieverError: the retriever belongs to another backbone.
        """
        config = RetroConfig.from_options(options)
        require_bookmarks(config, METHODS.get(method).with_options(method_options))
        folder = resolve_model(str(model))
        loaded, tokenizer = load_model(folder, dtype, device_map, model_options or {})
        attach = partial(cls, loaded, tokenizer, method=method, method_options=method_options, chat=chat)
        lm = attach(config=config)
        path = find_shipped(lm.backbone) if retriever == "auto" else retriever and resolve_retriever(str(retriever))
        if path is not None:
            trained = read_card(path).page_size
            if "page_size" not in options and trained != config.page_size:
                lm.detach()
                lm = attach(config=config.replace(page_size=trained))
            lm.use_retriever(path)
        folder_of_adapter = None if adapter is None else adapter_for(lm.backbone, adapter)
        if folder_of_adapter is not None:
            lm.use_adapter(folder_of_adapter)
        return lm

    def use_retriever(self, retriever: PageRetriever | str | Path) -> None:
        """Use a trained retriever, given as such or as a folder, for documents read from now on.

        Raises:
            IncompatibleRetrieverError: it was trained for another backbone, or for bookmarks that are read otherwise.
        """
        if not isinstance(retriever, PageRetriever):
            retriever = load_retriever(retriever, self.backbone.projection_shapes(), self.backbone.fingerprint())
        check_choices(retriever.card, self.config)
        self.retriever = retriever.place([info.device for info in self.backbone.layers]).eval()
        self._bookmark = self._bookmark_row()

    def use_adapter(self, adapter: LoraAdapter | str | Path) -> None:
        """Let a LoRA adapter act on the model until `detach`; bookmark rows go past it.

        Raises:
            UserError: there is an adapter already (the method may have its own), or it is of another kind or backbone.
        """
        if self.program.brings_adapter:
            raise UserError(f"Method {self.method.name!r} brings an adapter of its own. Leave out --adapter.")
        if self.adapter is not None:
            raise UserError(f"The adapter {self.adapter.card.name!r} is in use already. Load the model anew.")
        self.adapter = adapter if isinstance(adapter, LoraAdapter) else load_adapter(adapter, self.backbone)
        self.attachment.keep(self.adapter.attach(self.backbone))

    @property
    def retriever_name(self) -> str:
        """Name of the retriever, or what stands in for one."""
        if not self.method.needs_bookmarks:
            return f"none ({self.method.name} needs no training)"
        return self.retriever.card.name if self.retriever else "untrained bookmarks (the paper's w/o Stage1)"

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def detach(self) -> None:
        """Leave the model as it was."""
        self.attachment.detach()
        self.adapter = None

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, source: Any, *, progress: Progress | None = None) -> Any:
        """Read one text, or several side by side.

        Args:
            source: a text, a `pathlib.Path` to a file, or token ids (whole numbers or int64 tensor [T]); or a list of
                these.
            progress: called with (pages done, pages in all) before the first chunk and after each.

        Returns:
            A `Document`, or a list of them; a `PromptDocument` with methods that take each prompt as a whole.

        Raises:
            UserError: nothing to read, or a file that can't be.
        """
        if isinstance(source, list) and not is_ids(source):
            if not source:
                raise UserError("Nothing to read: the list of texts is empty.")
            return self.program.read(source, progress)
        return self.program.read([source], progress)[0]

    def tokenise(self, source: Any) -> tuple[str | None, list[int], list[tuple[int, int]]]:
        """Text, ids and character offsets of one source; raises `UserError` if there is nothing to read."""
        return tokenise(self, source)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Next-token logits [T, vocabulary] at each of `input_ids` int64 [T], read with the method on its budget."""
        return self.program.logits(input_ids)

    def split_head(self, head: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """What stands before a text (by default BOS and the template's head): ids with pages of their own, and ids
        joined to the text."""
        head = list(self.format.prefix_ids if self.format else ()) if head is None else list(head)
        return (head, []) if self.config.prefix_page else ([], head)

    def use_disk_tier(self, folder: str | Path, host_kv_bytes: int) -> None:
        """Keep at most `host_kv_bytes` of KV in host memory from now on; the rest lies in a file in `folder`.

        Changes where pages live, not results. The file has no name and goes with the process.
        """
        self.disk_tier = (Path(folder), host_kv_bytes)

    def page_layout(self) -> PageLayout:
        """Shape and dtype of this model's stored pages."""
        return page_layout(self)

    def new_store(self, num_pages: int) -> PageStore:
        """An empty page store with room for `num_pages` pages, where the settings say that pages live."""
        return new_store(self, num_pages)

    def encoder_over(self, store: PageStore, **parts: Any) -> Encoder:
        """An encoder over the pages of `store`; `parts`: fields of `PrefillParts` that differ."""
        if not isinstance(self.method, PageMethod):
            raise UserError(f"This works on pages, which method {self.method.name!r} doesn't have. Use a page method.")
        found = PrefillParts(self.backbone, self.config, self.retriever, self.method, store, DigestIndex())
        return Encoder(found, self.attachment, self._bookmark).with_parts(**parts)

    def cut(self, text: str) -> tuple[list[list[int]], list[tuple[int, int]], int]:
        """A text as pages, not read yet: token ids and character span of each, and how many are prefix pages."""
        _, ids, offsets = self.tokenise(text)
        prefix, joined = self.split_head()
        pages = cut_pages(prefix, joined + ids, self.config.page_size)
        return pages, page_spans(pages, offsets), len(page_lengths(len(prefix), self.config.page_size))

    # --- asking ---------------------------------------------------------------------------------------------

    def ask_batch(
        self,
        pairs: Sequence[tuple[Any, str | Sequence[int]]],
        *,
        max_new_tokens: int = 64,
        raw: bool = False,
        **options: Any,
    ) -> list[Answer]:
        """Answer several (document, question) pairs at once; the same as one at a time.

        A question given as token ids is taken as it stands, up to where the answer begins. Documents that were read
        together are answered in one batch; others one after the other.
        """
        return self.program.ask(pairs, max_new_tokens, raw, **options)

    def answer(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, **options: Any) -> list[Answer]:
        """Answer whole prompts side by side, with any method; the same as one at a time. Nothing is kept.

        Args:
            options: passed to transformers' `generate`.

        Raises:
            UserError: an option that can't be honoured, or a prompt that can't be served from the budget;
            BudgetError: the method attended more than its budget.
        """
        answers = self.program.answer(prompts, max_new_tokens, **options)
        for prompt, found in zip(prompts, answers, strict=True):
            self.program.check_attended(found, len(prompt.ids))
        return answers

    def turn(
        self, document: Document, past: Past, question: str, *, max_new_tokens: int, raw: bool = False, **options: Any
    ) -> tuple[Answer, Past]:
        """One turn of a conversation, and what is past for the next one: the turn has become pages."""
        return turn(self, document, past, question, max_new_tokens=max_new_tokens, raw=raw, **options)

    def stream(
        self, document: Any, question: str, *, max_new_tokens: int, raw: bool = False, **options: Any
    ) -> Iterator[str]:
        """Yield the answer's text as it is generated; errors of the generating thread are raised here.

        Generation stops when the iterator is closed.
        """
        return stream_answer(self, document, question, max_new_tokens=max_new_tokens, raw=raw, **options)

    def retrieve(self, document: Document, question: str, *, raw: bool = False) -> Retrieval:
        """Which pages of `document` the question attends in each layer."""
        return retrieve(self, document, question, raw=raw)

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue any prompt, as transformers' `generate` does; the last page acts as the query (D11 a).

        Args:
            input_ids: int64 [B, T]. attention_mask: [B, T], 0 marks padding on either side.
            max_new_tokens: tokens to generate at most; None = what the generation config says, or 64.
            options: passed to transformers' `generate`.

        Returns:
            int64 [B, T + new], padded behind the end of shorter continuations.

        Raises:
            UserError: an empty prompt, ids outside the vocabulary, or an option that can't be honoured.
        """
        return continue_prompts(self, input_ids, attention_mask, max_new_tokens, **options)

    def question_ids(self, question: str | Sequence[int], raw: bool = False, follow_up: bool = False) -> list[int]:
        """Token ids of a question page, chat template's tail included; ids are taken as they stand."""
        return question_ids(self, question, raw, follow_up)

    def pipeline(self, **options: Any) -> TextGenerationPipeline:
        """Transformers' text-generation pipeline over `generate`, for prompts and chats of any length.

        Args:
            options: as for `transformers.pipeline("text-generation", …)`, without model, tokenizer and device.
        """
        if self.tokenizer is None:
            raise UserError("A pipeline needs a tokenizer. Pass one to RetroLM.")
        return RetroLMPipeline(self, **options)

    def options_for(self, options: dict[str, Any], eos_ids: tuple[int, ...]) -> GenerateOptions:
        """Options of transformers' `generate`, checked; `eos_ids` end a sequence."""
        return GenerateOptions(self.model, options, eos_ids, self.pad_id, self.tokenizer)

    def _position_limit(self) -> int:
        """Positions that will be used at most, which decides between frequency sets (longrope)."""
        if self.method.true_positions:
            return int(self.model.config.get_text_config().max_position_embeddings)
        return self.config.kv_budget + self.config.page_room

    def _bookmark_row(self) -> Tensor:
        """The bookmark embedding [hidden], trained or not."""
        if self.retriever is not None:
            return self.retriever.embedding.detach()
        return self.untrained_bookmark()

    def untrained_bookmark(self) -> Tensor:
        """Bookmark embedding [hidden] without training: the end-of-sequence row (D18)."""
        return self.backbone.embed(torch.tensor([self.eos_ids[0] if self.eos_ids else 0]))[0].detach()

    def wait(self) -> None:
        """Wait until all devices have done their work, so that times can be taken."""
        for device in {self.device, *(info.device for info in self.backbone.layers)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
