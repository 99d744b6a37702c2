"""Generation with re-retrieval in which the last generated pages are revised (RetroAttention over pages)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.retro_pages import RevisesPages
from .chunk import Chunk, PageGroup, text_group
from .decode_round import Query
from .encoder import Encoder
from .generate_options import GenerateOptions
from .generation import Generator
from .prefill import QueryCapture
from .retro_prefill import RetroEncoder, RevisedGroup


@dataclass
class RecentPages:
    """The last generated pages of one query.

    Attributes:
        number: of the query. tokens: ids of each page. seen_LnP: pages that each has attended, by layer.
    """

    number: int
    tokens: list[list[int]]
    seen_LnP: Tensor

    def add(self, tokens: list[int], chosen_LP: Tensor, most: int) -> None:
        """Put a page behind the others and keep the last `most`."""
        grown = chosen_LP.shape[1] - self.seen_LnP.shape[2]
        seen = torch.nn.functional.pad(self.seen_LnP, (0, grown))
        self.seen_LnP = torch.cat([seen, chosen_LP[:, None]], 1)[:, -most:]
        self.tokens = [*self.tokens, tokens][-most:]


class RetroGenerator(Generator):
    """A `Generator` that encodes, with each generated page, the `num_revised` ones before it once more."""

    def __init__(self, encoder: Encoder, method: RevisesPages) -> None:
        super().__init__(RetroEncoder(encoder.parts, encoder.attachment, encoder.bookmark))
        self._method = method
        self._recent: dict[int, RecentPages] = {}

    def run(self, queries: list[Query], max_new_tokens: int, options: GenerateOptions) -> list[Tensor]:
        """See `Generator.run`; raises `UserError` also for generated pages that are longer than a page."""
        config = self._encoder.parts.config
        if config.agreement_layers:
            raise UserError(
                f"{self._method.name} encodes pages anew by its own rule. Use agreement_layers=0 with it, or method "
                "'retrolm'."
            )
        if config.page_positions == "ranked_for_questions":
            raise UserError(
                f"{self._method.name} attends the union of several choices, which has no order of its own. Use "
                "page_positions='compact' with it, or method 'retrolm'."
            )
        if config.retrieve_every > config.page_size:
            raise UserError(
                f"{self._method.name} revises generated pages whole: retrieve_every={config.retrieve_every} is more "
                f"than page_size={config.page_size}. Lower it, or raise page_size."
            )
        num_layers = self._encoder.parts.backbone.num_layers
        nothing = torch.zeros(num_layers, 0, 0, dtype=torch.bool)
        self._recent = {id(query): RecentPages(number, [], nothing) for number, query in enumerate(queries)}
        held = super().run(queries, max_new_tokens, options)
        if not config.retrieve_every:
            for query in queries:
                query.decode_path += "; nothing was revised (retrieve_every=0)"
        return held

    def _encode(self, queries: list[Query], groups: list[PageGroup]) -> list[QueryCapture]:
        revised = [self._revised(query, group) for query, group in zip(queries, groups, strict=True)]
        chunk = [*(group for group in revised if group is not None), *groups]
        encoded = self._encoder.encode(Chunk(chunk, max(len(page) for group in chunk for page in group.tokens)))
        for query, group, capture in zip(queries, revised, encoded.captures, strict=True):
            query.peak_prefill = max(query.peak_prefill, encoded.peak_attended)
            if query.generated:
                self._note(query, group, _chosen(capture, len(query.table)))
        return encoded.captures

    def _revised(self, query: Query, newest: PageGroup) -> RevisedGroup | None:
        """The query's last generated pages, with room for as many budgets as they may have seen."""
        recent, config = self._recent[id(query)], self._encoder.parts.config
        if not recent.tokens:
            return None
        wide = config.replace(kv_budget=config.kv_budget * self._method.knobs.window)
        first = len(query.table) - len(recent.tokens)
        plain = text_group(query.table, first, recent.tokens, wide, self._encoder.kept_window)
        parts = {item.name: getattr(plain, item.name) for item in fields(plain)}
        return RevisedGroup(**parts, newest=newest, seen_LnP=recent.seen_LnP)

    def _note(self, query: Query, group: RevisedGroup | None, chosen_LP: Tensor) -> None:
        """Keep what the query's pages have seen by now."""
        recent, fresh_LnP = self._recent[id(query)], chosen_LP[:, None]
        if group is not None:
            union_LnP = torch.stack([union.cpu() for union in group.union])
            before = torch.nn.functional.pad(recent.seen_LnP, (0, union_LnP.shape[2] - recent.seen_LnP.shape[2]))
            fresh_LnP = torch.cat([union_LnP & ~before, fresh_LnP], 1)
            recent.seen_LnP = union_LnP
        if self._method.meter is not None:
            scoring = [layer for layer in range(len(fresh_LnP)) if self._encoder.parts.backbone.retrieves(layer)]
            tokens_LnP = fresh_LnP[scoring] * query.table.lengths
            self._method.meter.note(tokens_LnP.sum(-1)[None], [recent.number])
        recent.add(query.tokens, chosen_LP, self._method.num_revised)


def _chosen(capture: QueryCapture, num_pages: int) -> Tensor:
    """The pages that a query page attended, bool [L, P]."""
    found = torch.zeros(len(capture.choices), num_pages, dtype=torch.bool)
    for row, choice in zip(found, capture.choices, strict=True):
        row[choice.ordinals] = True
    return found


def generator_over(encoder: Encoder) -> Generator:
    """What generates with the encoder's method."""
    method = encoder.parts.method
    if isinstance(method, RevisesPages) and method.num_revised:
        return RetroGenerator(encoder, method)
    return Generator(encoder)
