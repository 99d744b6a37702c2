"""`RetroLM`: a stock transformers model that reads texts page by page on a fixed KV budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextGenerationPipeline, TextIteratorStreamer

from ..config import RetroConfig
from ..errors import UserError
from ..methods import METHODS, PageMethod
from ..paging import PageTable, page_lengths
from ..retriever import PageRetriever, load_retriever
from ..store import DigestIndex, DiskStore, PageLayout, PageStore, ResidentStore, TieredStore
from . import answer_dense, answer_pages, answer_prune, answer_tokens  # noqa: F401  (each files its program)
from .adapter import LoraAdapter, load_adapter
from .answering import PROGRAMS, Prompt
from .answers import build_answer, build_retrieval
from .attachment import Attachment
from .backbone import Backbone
from .chunk import Chunk
from .document import Document, Past
from .encoder import Encoder, PagedText, Progress
from .generate_options import GenerateOptions, StopWhen
from .generation import Generator, Query
from .loading import eos_ids, load_model, pad_id
from .pipeline import RetroLMPipeline
from .prefill import PrefillParts
from .prompts import QUESTION_TEMPLATE, PromptFormat, prompt_format
from .pull import resolve_model
from .results import Answer, Retrieval
from .shipped import find_shipped, resolve_retriever
from .text_files import read_text_file

SPARE_PAGES = 8
_STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        self.retriever: PageRetriever | None = None
        self.adapter: LoraAdapter | None = None
        self._disk_tier: tuple[Path, int] | None = None
        self.model = model
        self.backbone = Backbone(model, self._position_limit())
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
            adapter: folder of a LoRA adapter (stage 2, or PEFT's); bookmark rows go past it.
            method: name of the method (`retrolm methods`). method_options: its knobs.
            dtype, device_map: as transformers' `from_pretrained`; by default a CUDA device is used if there is one.
            model_options: further arguments for transformers' `from_pretrained` (quantization_config, …).
            options: fields of `RetroConfig` (kv_budget, page_size, …).

        Raises:
            UserError: unknown option, method or model; UnsupportedModelError: a family RetroLM can't attach to;
            IncompatibleRetrieverError: the retriever belongs to another backbone.
        """
        config = RetroConfig.from_options(options)
        METHODS.get(method).with_options(method_options)
        folder = resolve_model(str(model))
        loaded, tokenizer = load_model(folder, dtype, device_map, model_options or {})
        lm = cls(loaded, tokenizer, config=config, method=method, method_options=method_options, chat=chat)
        path = find_shipped(lm.backbone) if retriever == "auto" else retriever and resolve_retriever(str(retriever))
        if path is not None:
            lm.use_retriever(path)
        if adapter is not None:
            lm.use_adapter(adapter)
        return lm

    def use_retriever(self, retriever: PageRetriever | str | Path) -> None:
        """Use a trained retriever, given as such or as a folder, for documents read from now on."""
        if not isinstance(retriever, PageRetriever):
            retriever = load_retriever(retriever, self.backbone.projection_shapes(), self.backbone.fingerprint())
        self.retriever = retriever.place([info.device for info in self.backbone.layers]).eval()
        self._bookmark = self._bookmark_row()

    def use_adapter(self, adapter: LoraAdapter | str | Path) -> None:
        """Let a LoRA adapter act on the model until `detach`; bookmark rows go past it.

        Raises:
            UserError: there is an adapter already, or this one is of another kind or backbone.
        """
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
            progress: called with (pages done, pages in all) after each chunk.

        Returns:
            A `Document`, or a list of them; a `PromptDocument` with methods that take each prompt as a whole.

        Raises:
            UserError: nothing to read, or a file that can't be.
        """
        if isinstance(source, list) and not _is_ids(source):
            if not source:
                raise UserError("Nothing to read: the list of texts is empty.")
            return self.program.read(source, progress)
        return self.program.read([source], progress)[0]

    def read_pages(
        self, sources: list[Any], progress: Progress | None = None, heads: Sequence[Sequence[int]] | None = None
    ) -> list[Document]:
        """Read texts side by side, page by page, as `read` does for page methods.

        Args:
            heads: ids that stand before each text; None = BOS and the chat template's head.
        """
        inputs = [self.tokenise(source) for source in sources]
        given: Sequence[Sequence[int] | None] = heads if heads is not None else [None] * len(inputs)
        splits = [self.split_head(head) for head in given]
        started = time.perf_counter()
        pages = [self._cut(prefix, joined + ids) for (prefix, joined), (_, ids, _) in zip(splits, inputs, strict=True)]
        store = self.new_store(sum(map(len, pages)))
        sinks = [len(page_lengths(len(prefix), self.config.page_size)) for prefix, _ in splits]
        texts = [self._paged(store, cut, num_prefix) for cut, num_prefix in zip(pages, sinks, strict=True)]
        encoder = self._encoder(store)
        results = encoder.read(texts, progress)
        self._wait()
        seconds = time.perf_counter() - started
        peak = max(result.peak_attended for result in results)
        return [
            Document(self, encoder, text, paged.table, self._spans(paged.pages, offsets), paged.pages, seconds, peak)
            for (text, _, offsets), paged in zip(inputs, texts, strict=True)
        ]

    def logits(self, input_ids: Tensor) -> Tensor:
        """Next-token logits [T, vocabulary] at each of `input_ids` int64 [T], read with the method on its budget."""
        return self.program.logits(input_ids)

    def page_logits(self, input_ids: Tensor) -> Tensor:
        """`logits` of page methods: the text is read page by page."""
        cut = self._cut([], input_ids.tolist())
        store = self.new_store(len(cut))
        results = self._encoder(store).read([self._paged(store, cut, 0)], logits=True)
        return torch.cat([result.logits for result in results if result.logits is not None])

    def tokenise(self, source: Any) -> tuple[str | None, list[int], list[tuple[int, int]]]:
        """Text, ids and character offsets of one source."""
        if isinstance(source, Path):
            source = read_text_file(source)
        if isinstance(source, str):
            if not source.strip():
                raise UserError("Nothing to read: the text is empty or only whitespace.")
            if self.tokenizer is None:
                raise UserError("Reading text needs a tokenizer. Pass one, or read token ids.")
            found = self.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return source, found["input_ids"], found["offset_mapping"]
        if not isinstance(source, Tensor) and not _is_ids(source):
            kind = type(source).__name__
            raise UserError(f"Can't read a {kind}. Give a text, a pathlib.Path, token ids, or a list of these.")
        ids = [int(i) for i in source]
        if not ids:
            raise UserError("Nothing to read: there are no token ids.")
        self._require_vocabulary(ids)
        return None, ids, []

    def _require_vocabulary(self, ids: list[int]) -> None:
        size = self.model.get_input_embeddings().num_embeddings
        outside = [i for i in ids if not 0 <= i < size]
        if outside:
            raise UserError(
                f"Token id {outside[0]} is outside the model's vocabulary of {size}. Is it another tokenizer's?"
            )

    def split_head(self, head: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """What stands before a text (by default BOS and the template's head): ids with pages of their own, and ids
        joined to the text."""
        head = list(self.format.prefix_ids if self.format else ()) if head is None else list(head)
        return (head, []) if self.config.prefix_page else ([], head)

    def _cut(self, prefix: list[int], ids: list[int]) -> list[list[int]]:
        """Token ids by page: prefix pages broken off before the text (the attention sink), then the text."""
        size = self.config.page_size
        return [part[i : i + size] for part in (prefix, ids) for i in range(0, len(part), size)]

    def _paged(self, store: PageStore, pages: list[list[int]], num_prefix_pages: int) -> PagedText:
        lengths = torch.tensor([len(page) for page in pages], dtype=torch.int64)
        ids = store.reserve(len(pages))
        return PagedText(PageTable(ids, lengths, max(num_prefix_pages, 1), self.config.page_size), pages)

    def _spans(self, pages: list[list[int]], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if not offsets:
            return [(0, 0)] * len(pages)
        num_prefix = sum(map(len, pages)) - len(offsets)
        spans, at = [], -num_prefix
        for page in pages:
            stop = at + len(page)
            spans.append((offsets[max(at, 0)][0], offsets[stop - 1][1]) if stop > 0 else (0, 0))
            at = stop
        return spans

    def page_layout(self) -> PageLayout:
        """Shape and dtype of this model's stored pages."""
        backbone, config = self.backbone, self.config
        dtype = _STORE_DTYPES[config.store_dtype] if config.store_dtype else backbone.dtype
        devices = tuple(info.device for info in backbone.layers)
        shape = (config.page_size, backbone.num_kv_heads, backbone.head_dim)
        return PageLayout(*shape, dtype, devices, config.store_bits)

    def use_disk_tier(self, folder: str | Path, host_kv_bytes: int) -> None:
        """Keep at most `host_kv_bytes` of KV in host memory from now on; the rest lies in a file in `folder`.

        Changes where pages live, not results. The file has no name and goes with the process.
        """
        self._disk_tier = (Path(folder), host_kv_bytes)

    def new_store(self, num_pages: int) -> PageStore:
        """An empty page store with room for `num_pages` pages, where the settings say that pages live."""
        config, layout = self.config, self.page_layout()
        least = config.kv_budget // config.page_size + 3
        store: PageStore
        if self._disk_tier is not None:
            folder, host_bytes = self._disk_tier
            store = DiskStore(layout, host_bytes, folder, least, config.device_kv_bytes)
        elif config.device_kv_bytes is None:
            store = ResidentStore(layout)
        else:
            store = TieredStore(layout, config.device_kv_bytes, least)
        store.release(store.reserve(num_pages + SPARE_PAGES))
        return store

    def encoder_over(self, store: PageStore, **parts: Any) -> Encoder:
        """An encoder over pages kept elsewhere; `parts`: fields of `PrefillParts` that differ."""
        return self._encoder(store).with_parts(**parts)

    def cut(self, text: str) -> tuple[list[list[int]], list[tuple[int, int]], int]:
        """A text as pages, not read yet: token ids and character span of each, and how many are prefix pages."""
        _, ids, offsets = self.tokenise(text)
        prefix, joined = self.split_head()
        pages = self._cut(prefix, joined + ids)
        return pages, self._spans(pages, offsets), len(page_lengths(len(prefix), self.config.page_size))

    def _encoder(self, store: PageStore) -> Encoder:
        if not isinstance(self.method, PageMethod):
            raise UserError(f"This works on pages, which method {self.method.name!r} doesn't have. Use a page method.")
        parts = PrefillParts(self.backbone, self.config, self.retriever, self.method, store, DigestIndex())
        return Encoder(parts, self.attachment, self._bookmark, self.pad_id)

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

    def ask_pages(
        self,
        pairs: Sequence[tuple[Document, str | Sequence[int]]],
        max_new_tokens: int,
        raw: bool,
        **options: Any,
    ) -> list[Answer]:
        """`ask_batch` of page methods."""
        checked = self._answer_options(options)
        for document, _ in pairs:
            document.require_open()
        groups: dict[int, list[int]] = {}
        for index, (document, _) in enumerate(pairs):
            groups.setdefault(id(document.encoder), []).append(index)
        answers: dict[int, Answer] = {}
        for members in groups.values():
            part = [pairs[i] for i in members]
            queries = [Query(doc.table, self.question_ids(question, raw), doc.token_ids) for doc, question in part]
            encoder = part[0][0].encoder
            for ids in Generator(encoder).run(queries, max_new_tokens, checked):
                encoder.parts.store.release(ids)
            for i, (document, _), query in zip(members, part, queries, strict=True):
                answers[i] = build_answer(document, query)
        return [answers[i] for i in range(len(pairs))]

    def turn(
        self,
        document: Document,
        past: Past,
        question: str,
        *,
        max_new_tokens: int,
        raw: bool = False,
        **options: Any,
    ) -> tuple[Answer, Past]:
        """One turn of a conversation, and what is past for the next one: the turn has become pages."""
        encoder = document.encoder
        query = Query(past.table, self.question_ids(question, raw, follow_up=len(past.turn_ids) > 0), past.token_ids)
        checked = self._answer_options(options)
        (held,) = Generator(encoder).run([query], max_new_tokens, checked)
        lengths = page_lengths(len(query.tokens), self.config.page_size)
        table = query.table.extended(held[-len(lengths) :], torch.tensor(lengths))
        token_ids = [*query.past, query.tokens]
        try:
            rest = self._cut([], self._unencoded(query))
            if rest:
                table, ids = encoder.extend(table, rest)
                held = torch.cat([held, ids])
        except BaseException:
            encoder.parts.store.release(held)
            raise
        return build_answer(document, query), Past(table, [*token_ids, *rest], torch.cat([past.turn_ids, held]))

    def _unencoded(self, query: Query) -> list[int]:
        """Generated tokens that are not pages yet, without the end-of-sequence token (the next turn begins with it)."""
        every = self.config.retrieve_every
        start = (max(len(query.generated) - 1, 0) // every) * every if every else 0
        return [token for token in query.generated[start:] if token not in self.eos_ids]

    def stream(
        self, document: Any, question: str, *, max_new_tokens: int, raw: bool = False, **options: Any
    ) -> Iterator[str]:
        """Yield the answer's text as it is generated; errors of the generating thread are raised here.

        Generation stops when the iterator is closed.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = threading.Event(), list[BaseException]()
        options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), StopWhen(stop)]

        def work() -> None:
            try:
                self.ask_batch(
                    [(document, question)], max_new_tokens=max_new_tokens, raw=raw, streamer=streamer, **options
                )
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]

    def retrieve(self, document: Document, question: str, *, raw: bool = False) -> Retrieval:
        """Which pages of `document` the question attends in each layer."""
        document.require_open()
        encoder, tokens = document.encoder, self.question_ids(question, raw)
        ids = encoder.parts.store.reserve(-(-len(tokens) // self.config.page_size))
        try:
            encoded = encoder.encode(Chunk([encoder.query(document.table, ids, tokens)], len(tokens)))
        finally:
            encoder.parts.store.release(ids)
        return build_retrieval(document, document.table, encoded.captures[0].choices)

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
        rows = torch.atleast_2d(input_ids)
        keep = torch.ones_like(rows) if attention_mask is None else torch.atleast_2d(attention_mask)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(rows, keep, strict=True)]
        if not all(prompts):
            raise UserError("Nothing to continue: a prompt has no tokens.")
        for ids in prompts:
            self._require_vocabulary(ids)
        checked = self._options(options, eos_ids(self.model.generation_config))
        cut = [self._cut([], ids) for ids in prompts]
        store = self.new_store(sum(map(len, cut)))
        encoder = self._encoder(store)
        texts = [self._paged(store, pages[:-1], 0) for pages in cut]
        if any(text.pages for text in texts):
            encoder.read([text for text in texts if text.pages])
        queries = [Query(text.table, pages[-1], pages[:-1]) for text, pages in zip(texts, cut, strict=True)]
        new = checked.max_new_tokens if max_new_tokens is None else max_new_tokens
        Generator(encoder).run(queries, new, checked)
        sequences = [tokens for query in queries for tokens in query.sequences]
        per_prompt = len(sequences) // len(prompts)
        width = max(map(len, sequences))
        out = torch.full((len(sequences), rows.shape[1] + width), checked.pad_id)
        out[:, : rows.shape[1]] = rows.cpu().repeat_interleave(per_prompt, 0)
        for row, tokens in zip(out, sequences, strict=True):
            row[rows.shape[1] : rows.shape[1] + len(tokens)] = torch.tensor(tokens)
        return out.to(input_ids.device)

    def pipeline(self, **options: Any) -> TextGenerationPipeline:
        """Transformers' text-generation pipeline over `generate`, for prompts and chats of any length.

        Args:
            options: as for `transformers.pipeline("text-generation", …)`, without model, tokenizer and device.
        """
        if self.tokenizer is None:
            raise UserError("A pipeline needs a tokenizer. Pass one to RetroLM.")
        return RetroLMPipeline(self, **options)

    def question_ids(self, question: str | Sequence[int], raw: bool = False, follow_up: bool = False) -> list[int]:
        """Token ids of a question page, chat template's tail included; ids are taken as they stand."""
        if not isinstance(question, str):
            ids = [int(i) for i in question]
            if not ids:
                raise UserError("The question is empty.")
            self._require_vocabulary(ids)
            return ids
        if self.format is None:
            raise UserError("Asking needs a tokenizer. Pass one, or use generate(input_ids).")
        if not question.strip():
            raise UserError("The question is empty.")
        if raw or follow_up:
            return self.format.question_ids(question, follow_up)
        return self.format.question_ids(QUESTION_TEMPLATE.format(question=question))

    def _answer_options(self, options: dict[str, Any]) -> GenerateOptions:
        checked = self._options(options, self.eos_ids)
        if checked.num_return_sequences > 1:
            raise UserError("A question has one answer: leave out num_return_sequences, or use generate(input_ids).")
        return checked

    def _options(self, options: dict[str, Any], eos_ids: tuple[int, ...]) -> GenerateOptions:
        return GenerateOptions(self.model, options, eos_ids, self.pad_id, self.tokenizer)

    def _position_limit(self) -> int:
        """Positions that will be used at most, which decides between frequency sets (longrope)."""
        if self.method.true_positions:
            return int(self.model.config.get_text_config().max_position_embeddings)
        return self.config.kv_budget + self.config.page_size

    def _bookmark_row(self) -> Tensor:
        """The bookmark embedding [hidden], trained or not."""
        if self.retriever is not None:
            return self.retriever.embedding.detach()
        return self.untrained_bookmark()

    def untrained_bookmark(self) -> Tensor:
        """Bookmark embedding [hidden] without training: the end-of-sequence row (D18)."""
        return self.backbone.embed(torch.tensor([self.eos_ids[0] if self.eos_ids else 0]))[0].detach()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _is_ids(source: Any) -> bool:
    """Whether a list is one row of token ids rather than several texts."""
    return isinstance(source, (list, tuple)) and len(source) > 0 and all(isinstance(i, int) for i in source)
