"""Runs chunks through the model: reading documents page by page, and encoding question pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import RetroConfig
from ..errors import UserError
from ..paging import PageTable
from .attachment import Attachment
from .chunk import Chunk, PageGroup, query_group, text_group, text_lengths
from .prefill import PrefillParts, PrefillProgram, QueryCapture
from .prefill_layers import can_fuse, fused_rows
from .question_groups import with_joined_questions

Progress = Callable[[int, int], None]


@dataclass
class PagedText:
    """A text cut into pages: `table` and the token ids of each page."""

    table: PageTable
    pages: list[list[int]]


@dataclass
class Encoded:
    """Outcome of one chunk: captures of its query groups, most tokens attended, logits if asked for."""

    captures: list[QueryCapture]
    peak_attended: int
    logits: Tensor | None


class Encoder:
    """Streaming prefill over one page store."""

    def __init__(self, parts: PrefillParts, attachment: Attachment, bookmark: Tensor) -> None:
        self.parts = parts
        self.attachment = attachment
        self.bookmark = bookmark

    @property
    def kept_window(self) -> int:
        """Widest sliding window of layers that don't choose pages, in tokens; 0 if all choose."""
        backbone = self.parts.backbone
        windows = [info.window or 0 for i, info in enumerate(backbone.layers) if not backbone.retrieves(i)]
        return max(windows, default=0)

    def with_parts(self, **changes: Any) -> Encoder:
        """The same encoder over other pages, digests or settings (fields of `PrefillParts`)."""
        return Encoder(replace(self.parts, **changes), self.attachment, self.bookmark)

    def read(self, texts: list[PagedText], progress: Progress | None = None, logits: bool = False) -> list[Encoded]:
        """Encode all pages of all texts, a chunk at a time; texts advance side by side."""
        for text in texts:
            require_sink_room(text.table, self.parts.config)
            self._require_window(text.table.num_tokens)
        total = sum(len(text.pages) for text in texts)
        done, results = 0, []
        tell = progress or (lambda done, total: None)
        tell(done, total)
        for chunk in self._chunks(texts):
            results.append(self.encode(chunk, logits))
            done += chunk.num_pages
            tell(done, total)
        return results

    def extend(self, table: PageTable, pages: list[list[int]]) -> tuple[PageTable, Tensor]:
        """Read further pages behind those of `table`: the table with them, and their store pages."""
        store = self.parts.store
        ids = store.reserve(len(pages))
        try:
            longer = table.extended(ids, text_lengths(pages, self.parts.config))
            self._require_window(longer.num_tokens)
            for first in range(0, len(pages), self.parts.config.chunk_pages):
                part = pages[first : first + self.parts.config.chunk_pages]
                group = text_group(longer, len(table) + first, part, self.parts.config, self.kept_window)
                self.encode(Chunk([group], max(map(len, part))))
        except BaseException:
            store.release(ids)
            raise
        return longer, ids

    def query(self, table: PageTable, ids: Tensor, tokens: list[int], pinned: tuple[int, ...] = ()) -> PageGroup:
        """The group of one query page; raises `UserError` if the query leaves no room for the text."""
        group = query_group(table, ids, tokens, self.parts.config, self.kept_window, pinned)
        require_room(group, self.parts.config)
        self._require_window(table.num_tokens + int(group.lengths.sum()))
        return group

    @torch.no_grad()
    def encode(self, chunk: Chunk, logits: bool = False) -> Encoded:
        """One forward pass, with logits [tokens, vocabulary] of all normal tokens if asked for."""
        backbone = self.parts.backbone
        backbone.require_positions(max(max(g.end) + max(map(len, g.tokens)) for g in chunk.groups) + 1)
        backbone.require_positions(max(g.table.sink_tokens for g in chunk.groups) + chunk.width + 2)
        self._assert_positions(chunk)
        program = self._program(chunk)
        rows = backbone.embed(chunk.token_ids())
        marks = self.bookmark.to(rows).expand(program.num_bookmarks, -1)
        inputs = torch.cat([rows, marks])[None]
        with self.attachment.run(program):
            found = self._forward(program, inputs, len(rows), logits)
        program.finish()
        return Encoded(program.captures, program.peak_attended, found)

    def _program(self, chunk: Chunk) -> PrefillProgram:
        return PrefillProgram(self.parts, with_joined_questions(chunk, self.parts))

    def _forward(self, program: PrefillProgram, inputs_1TE: Tensor, num_rows: int, logits: bool) -> Tensor | None:
        """All layers; logits of the first `num_rows` rows if asked for."""
        backbone = self.parts.backbone
        if can_fuse(backbone):
            states = fused_rows(backbone, program, inputs_1TE, logits)
            return None if states is None else backbone.model.get_output_embeddings()(states[0, :num_rows])
        kwargs = {
            "inputs_embeds": inputs_1TE,
            "position_ids": torch.zeros(inputs_1TE.shape[:2], dtype=torch.int64, device=inputs_1TE.device),
            "use_cache": False,
        }
        if not logits:
            backbone.decoder(**kwargs)
            return None
        found: Tensor = backbone.model(**kwargs).logits[0]  # places to keep would have to be where the last layer is
        return found[:num_rows]

    def _assert_positions(self, chunk: Chunk) -> None:
        """However long the text, no page begins beyond the budget (or beyond what a kept sliding window reaches).

        So no position passes kv_budget + question + generated tokens.
        """
        config = self.parts.config
        if config.first_layer_mode != "full" or not config.num_skip_layers:
            most = max(config.kv_budget, self.kept_window + config.page_room)
            for end in (end for group in chunk.groups for end in group.end):
                assert 0 <= end <= most, f"a page begins at position {end}, beyond {most}"

    def _require_window(self, num_tokens: int) -> None:
        """A layer that attends the whole text can't take a text longer than the model's window."""
        config, window = self.parts.config, self.parts.backbone.window
        if config.first_layer_mode == "full" and config.num_skip_layers and num_tokens > window:
            raise UserError(
                f"first_layer_mode='full' attends all {num_tokens} tokens in the first layer, but the model's window "
                f"is {window}. Use first_layer_mode='recent' or 'mean_key', or a shorter text."
            )

    def _chunks(self, texts: list[PagedText]) -> Iterator[Chunk]:
        share = max(1, self.parts.config.chunk_pages // max(len(texts), 1))
        probes: list[dict[int, Tensor]] = [{} for _ in texts]
        for first in range(0, max((len(text.pages) for text in texts), default=0), share):
            groups = []
            for text, probe in zip(texts, probes, strict=True):
                pages = text.pages[first : first + share]
                if pages:
                    groups.append(text_group(text.table, first, pages, self.parts.config, self.kept_window, probe))
            yield Chunk(groups, max(len(page) for group in groups for page in group.tokens))


def require_sink_room(table: PageTable, config: RetroConfig) -> None:
    """Raise `UserError` if the sink pages of a text leave no room for another page and the current one."""
    own = table.page_size if config.strict_budget else 0
    if table.num_tokens > config.kv_budget and table.sink_tokens + own + table.page_size > config.kv_budget:
        raise UserError(
            f"The prefix (BOS and the chat template's head) takes {table.sink_tokens} tokens and leaves no room for "
            f"the text in kv_budget={config.kv_budget}. Raise kv_budget, or use prefix_page=False or chat=False."
        )


def require_room(query: PageGroup, config: RetroConfig) -> None:
    """Raise `UserError` if a query page leaves no room for the text it asks about."""
    table = query.table
    needed = min(1 + len(query.pinned), max(len(table) - table.num_sink, 0))
    if query.room[0] < needed or int(query.lengths.sum()) > config.kv_budget:
        raise UserError(
            f"The question takes {len(query.tokens[0])} tokens and leaves room for {max(query.room[0], 0)} pages of "
            f"the text in kv_budget={config.kv_budget}; at least {needed} needed. Shorten it or raise kv_budget."
        )
