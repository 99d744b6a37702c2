"""A stage-1 recipe: the `[train]` table of a TOML file beside its `[data]` table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...config import check_choices
from ...errors import UserError
from ..data.config import Stage1DataConfig, stage1_data_config
from ..recipe import Recipe, build_table, check_ranges, check_types, read_recipe

# Options that no trained number depends on; a resumed run may change them. Which backbone and which data a run
# is bound to is told by fingerprints, so the backbone may move to another folder.
FREE_OPTIONS = (
    "model",
    "log_every",
    "save_every",
    "dev_every",
    "dev_samples",
    "dev_min_tokens",
    "dev_max_tokens",
    "num_workers",
)
_FEWEST_PAGES = 4  # sink, previous and current page, and one to choose


@dataclass(frozen=True)
class Stage1TrainConfig:
    """How the page retriever is trained.

    Attributes:
        model: backbone: folder, Hugging Face id or demo name.
        dtype: dtype of the frozen backbone; trained weights are float32 always.
        page_size: tokens per page.
        encode: how the frozen backbone reads texts (D14): "dense" = whole, within its window; "streaming" = at any
            length, page by page as the engine does, on `encode_budget` tokens with pages that the retriever chooses.
        rank: rank of the W^b deltas; 0 = full matrices.
        init_from: folder of a retriever of the same backbone and rank to start from; "" = untrained.
        loss: "info_nce" = the paper's contrastive loss (eq 7); "attention_kl" = divergence from the question's true
            attention over the pages (needs no labels); "mixed" = both, the second with weight `kl_share`.
        batch_negatives: pages of the other texts of a forward pass count among a question's negatives, each as so many
            pages of its own text; 0 = they don't. Pages that share words with the evidence are left out.
        teacher_share: share of the loss that is each layer's divergence from what all layers together make of the
            pages, so that low layers learn from high ones; 0 = none.
        agreed_share: share of the loss that is the contrastive loss of what the last `agreed_layers` layers agree on,
            as a question's pages are chosen by default (`RetroConfig.agreement_layers`); 0 = none.
        agreed_words: how much words that page and question share count in it, as `RetroConfig.word_weight` does: what
            words find by themselves needs no bookmark. They are counted anew for each text; 0 = they don't count.
        ema: decay of a running mean of the weights, which is then measured and kept in their place; 0 = none.
        num_steps: optimiser steps. tokens_per_batch: text tokens of one forward pass at most.
        accumulate: forward passes per optimiser step, over all processes.
        lr: peak learning rate of the deltas; embedding_lr of the bookmark embedding, temperature_lr of the scales.
        weight_decay, beta2, max_grad_norm: AdamW and clipping. Decay pulls W^b back to the backbone's own weights.
        warmup: share of the steps with rising rate. final_lr: share of the peak at the end (cosine in between).
        calibrate: scale each layer's scores to a standard deviation of 1 on the first step's batches, so that layers
            with large scores don't dominate the mean.
        learn_temperature: let each layer's scale be trained further (it changes no ranking).
        num_skip_layers: layers without a loss of their own, counted from the first (D7).
        bookmarks: "visible" = tokens see bookmarks, and gradients flow through them (D1 a; slower): texts are read once
            more for each step, whole and differentiably, and positions run on by one per page.
        bookmark_span, score_rope: as in `RetroConfig` (D13, D3); an engine must be set up alike to use the retriever.
        select_by: "layer" = one choice for all heads; "kv_head" = each KV head scores and is trained by itself (D4),
            which no engine offers yet: for ablations.
        num_local_pages: most recent pages that recall takes as attended anyway (D9).
        recall_pages: pages of which recall asks whether one holds the evidence.
        seed: initial deltas.
        log_every, save_every, dev_every: steps between log lines, checkpoints and dev recall (0 = never).
        dev_samples: held-out samples per dev round. dev_min_tokens, dev_max_tokens: their lengths; 0 = the recipe's.
        num_workers: processes that build samples.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    page_size: int = 128
    encode: Literal["dense", "streaming"] = "dense"
    encode_budget: int = 2048
    rank: int = 48
    init_from: str = ""
    loss: Literal["info_nce", "attention_kl", "mixed"] = "info_nce"
    kl_share: float = 0.5
    batch_negatives: float = 0.0
    teacher_share: float = 0.0
    agreed_share: float = 0.0
    agreed_layers: int = 8
    agreed_words: float = 1.0
    ema: float = 0.0
    num_steps: int = 1000
    tokens_per_batch: int = 65536
    accumulate: int = 1
    lr: float = 5e-4
    embedding_lr: float = 1e-3
    temperature_lr: float = 1e-2
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    warmup: float = 0.03
    final_lr: float = 0.05
    calibrate: bool = True
    learn_temperature: bool = True
    num_skip_layers: int = 1
    bookmarks: Literal["invisible", "visible"] = "invisible"
    bookmark_span: Literal["sink_page", "page"] = "sink_page"
    score_rope: bool = False
    select_by: Literal["layer", "kv_head"] = "layer"
    num_local_pages: int = 1
    recall_pages: int = 8
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    dev_every: int = 0
    dev_samples: int = 64
    dev_min_tokens: int = 0
    dev_max_tokens: int = 0
    num_workers: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_ranges(
            self,
            at_least_one=(
                "page_size",
                "encode_budget",
                "num_steps",
                "tokens_per_batch",
                "accumulate",
                "agreed_layers",
                "log_every",
                "dev_samples",
                "recall_pages",
            ),
            not_negative=(
                "rank",
                "num_skip_layers",
                "num_local_pages",
                "save_every",
                "dev_every",
                "dev_min_tokens",
                "dev_max_tokens",
                "num_workers",
                "weight_decay",
                "agreed_words",
            ),
            inside_unit=("lr", "embedding_lr", "temperature_lr", "beta2"),
            shares=("kl_share", "batch_negatives", "teacher_share", "agreed_share", "ema", "warmup", "final_lr"),
            positive=("max_grad_norm",),
        )
        if self.encode == "streaming" and self.loss != "info_nce":
            raise UserError(f"loss={self.loss!r} needs attention over the whole text. Use encode='dense' with it.")
        if self.bookmarks == "visible" and (self.encode, self.loss) != ("dense", "info_nce"):
            raise UserError("bookmarks='visible' is trained with encode='dense' and loss='info_nce' alone.")


@dataclass(frozen=True)
class Stage1Recipe(Recipe):
    """Everything a run depends on besides code, backbone and data files; `UserError` if its parts don't fit."""

    train: Stage1TrainConfig
    data: Stage1DataConfig

    free_options = FREE_OPTIONS

    def __post_init__(self) -> None:
        most = self.data.longest // _FEWEST_PAGES
        if self.train.page_size > most:
            raise UserError(
                f"page_size={self.train.page_size} leaves no page to choose in texts of {self.data.longest} tokens: "
                f"they need {_FEWEST_PAGES}. Use {most} at most, or longer texts (max_tokens)."
            )


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Stage1Recipe:
    """Read a recipe; `overrides` replace keys of its `[train]` table.

    Raises:
        UserError: unreadable file, missing table, unknown or unusable key.
    """
    values, data = read_recipe(path, overrides)
    return Stage1Recipe(build_table(Stage1TrainConfig, values, "training option"), stage1_data_config(data))
