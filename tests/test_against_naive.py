"""F3: budgets smaller than the text, against an independent naive implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from grids import some
from naive_reference import NaiveOptions, NaivePage, NaiveRetroLM
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.retriever import PageRetriever, RetrieverCard
from tiny_models import EOS, exact_model, random_ids, tiny_model, wide_softmax
from tiny_tokenizer import STORY, tiny_tokenizer

W = 8
TOLERANCE = 3e-6  # stock norms compute in float32 even for a float64 model


def random_retriever(lm: RetroLM, rank: int, seed: int = 3) -> PageRetriever:
    """A retriever whose every delta and embedding is non-zero."""
    torch.manual_seed(seed)
    shapes = lm.backbone.projection_shapes()
    card = RetrieverCard(lm.backbone.fingerprint(), rank, W)
    retriever = PageRetriever(shapes, torch.randn(lm.backbone.hidden_size), card)
    with torch.no_grad():
        for value in retriever.deltas.parameters():
            value.copy_(torch.randn(value.shape) * (0.5 if rank else 0.2))
    return retriever


def delta_matrices(lm: RetroLM, retriever: PageRetriever | None) -> dict[tuple[int, str], Tensor]:
    if retriever is None:
        return {}
    found = {}
    for shape in lm.backbone.projection_shapes():
        delta: Any = retriever.deltas[shape.key]
        matrix = delta.up.double() @ delta.down.double() if retriever.card.rank else delta.weight.double()
        found[shape.layer, shape.name] = matrix.detach()
    return found


def pair(name: str, rank: int | None = 0, **options: Any) -> tuple[RetroLM, NaiveRetroLM]:
    """The engine and the naive implementation on one model, with a random retriever unless `rank` is None."""
    model = exact_model(name)
    lm = RetroLM(model, config=RetroConfig.from_options({"page_size": W, "chunk_pages": 3, **options}))
    retriever = None if rank is None else random_retriever(lm, rank)
    if retriever is not None:
        lm.use_retriever(retriever)
    known = {key: value for key, value in options.items() if key in NaiveOptions.__dataclass_fields__}
    bookmark = model.get_input_embeddings()(torch.tensor(EOS)) if retriever is None else retriever.embedding
    naive = NaiveRetroLM(
        model, NaiveOptions(**{"page_size": W, **known}), bookmark.detach(), delta_matrices(lm, retriever)
    )
    return lm, naive


def cut(ids: list[int], size: int = W) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def check_reading(lm: RetroLM, naive: NaiveRetroLM, num_tokens: int = 75) -> None:
    """Logits of all tokens agree, and some page had to do without some past page."""
    ids = random_ids(num_tokens)
    with wide_softmax():
        found = lm.logits(ids)
    expected = torch.cat([torch.from_numpy(page.logits) for page in naive.read(cut(ids.tolist(), lm.config.page_size))])
    assert any(len(chosen) < number for number, page in enumerate(naive.pages) for chosen in page.selected)
    assert (found - expected).abs().max() <= TOLERANCE


FAMILIES = [
    *("llama", "llama-mha", "llama-mqa", "llama-yarn", "mistral-sliding", "qwen2", "qwen2-sliding", "qwen3"),
    *("phi3", "gemma2", "gemma3"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    check_reading(*pair(name, kv_budget=4 * W))


OPTIONS: list[dict[str, Any]] = [
    {"strict_budget": False},
    {"num_local_pages": 0},
    {"num_local_pages": 2},
    {"bookmark_span": "page"},
    {"first_layer_mode": "mean_key", "num_skip_layers": 2},
    {"first_layer_mode": "full"},
    {"num_skip_layers": 0},
    {"causal_selection": True},
    {"causal_selection": True, "first_layer_mode": "mean_key"},
    {"score_rope": True},
    {"selection_scope": "head"},
    {"selection_scope": "head", "first_layer_mode": "mean_key", "num_local_pages": 0, "causal_selection": True},
    {"kv_budget": 4 * W + 5},
    {"page_positions": "true"},
]


@pytest.mark.parametrize(("options", "name"), some(OPTIONS, ["qwen2", "llama-mqa"], each=1))
def test_every_option(name: str, options: dict[str, Any]) -> None:
    check_reading(*pair(name, **{"kv_budget": 4 * W, **options}))


@pytest.mark.parametrize("score_rope", [False, True])
def test_large_key_bias(score_rope: bool) -> None:
    """Qwen2's key biases reach 211: a constant before RoPE, not after."""
    lm, naive = pair("qwen2", kv_budget=5 * W, score_rope=score_rope)
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.k_proj.bias *= 30
    check_reading(lm, naive)


def test_large_key_bias_does_not_blur_half_precision() -> None:
    """A bfloat16 key of 200 has a spacing of 1; scores must come from what is left without the bias."""
    scores = []
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_model("qwen2", vocab_size=600)
        with torch.no_grad():
            bias = model.model.layers[1].self_attn.k_proj.bias
            bias.copy_(200.0 * bias.sign())
        model = model.to(torch.bfloat16).to(dtype)
        lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=96, page_size=W, agreement_layers=0))
        found = lm.read(STORY * 2).retrieve("Who counted the lamps?").scores[1]
        scores.append(found - found.mean())
    assert (scores[0] - scores[1]).abs().max() < 0.1 * scores[0].std()


@pytest.mark.parametrize(("name", "rank"), some(["llama", "phi3"], [None, 0, 4], each=2))
def test_untrained_full_and_low_rank_retrievers(name: str, rank: int | None) -> None:
    check_reading(*pair(name, rank, kv_budget=4 * W))


@pytest.mark.parametrize("name", ["llama", "llama-mha", "mistral-sliding", "gemma2", "gemma3"])
def test_heads_that_choose_for_themselves(name: str) -> None:
    """Reading, a question behind full pages, and decoding; some KV heads must differ in what they choose."""
    lm, naive = pair(name, kv_budget=5 * W, selection_scope="head")
    text, question = random_ids(9 * W).tolist(), random_ids(5, 5).tolist()
    with wide_softmax():
        document = lm.read(torch.tensor(text))
        query, logits = generate(lm, document, question)
    naive.read(cut(text))
    page = naive.ask(question, query.generated)
    assert any(chosen != sets[0] for sets in page.by_head for chosen in sets)
    assert (logits - torch.from_numpy(page.logits[len(question) - 1 : -1])).abs().max() <= TOLERANCE
    check_choices(lm, query.choices, page)


class Recorder(LogitsProcessor):
    """Keeps the logits of every generated token."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


@pytest.mark.parametrize(
    ("name", "question_tokens"),
    some(["llama", "qwen2", "mistral-sliding", "gemma2", "gemma3", "phi3"], [1, 5, W, W + 3], each=2),
)
def test_question_page_and_decoding(name: str, question_tokens: int) -> None:
    """A text with a short last page, a question of odd length and 12 generated tokens, against the naive decode."""
    lm, naive = pair(name, kv_budget=5 * W)
    check_answer(lm, naive, random_ids(question_tokens, 5).tolist())


DISTANT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama-mqa", {"bookmarks": "visible"}),
    ("llama-yarn", {}),
    ("qwen2", {"selection_scope": "head"}),
    ("gemma2", {}),
    ("gemma3", {"first_layer_mode": "full"}),
    ("mistral-sliding", {}),
    ("phi3", {}),
    ("llama-dynamic", {"num_skip_layers": 0}),
]


@pytest.mark.parametrize(("name", "options"), DISTANT, ids=str)
def test_pages_at_their_true_distances(name: str, options: dict[str, Any]) -> None:
    """A question and its answer, behind pages that were read side by side, and behind such as were not."""
    for positions in ("true_for_questions", "true"):
        lm, naive = pair(name, kv_budget=4 * W, page_positions=positions, **options)
        check_answer(lm, naive, random_ids(5, 5).tolist())


@pytest.mark.parametrize(("name", "options"), DISTANT, ids=str)
def test_the_best_pages_next_to_the_question(name: str, options: dict[str, Any]) -> None:
    """By each layer's own scores, and by those that layers agree on."""
    for num_layers in (0, 2):
        changes = {"page_positions": "ranked_for_questions", "agreement_layers": num_layers, **options}
        lm, naive = pair(name, kv_budget=6 * W, **changes)
        check_answer(lm, naive, random_ids(5, 5).tolist())


AGREEING: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama-mqa", {"bookmarks": "visible"}),
    ("qwen2", {"selection_scope": "head"}),
    ("gemma2", {"num_local_pages": 0}),
    ("gemma3", {"first_layer_mode": "mean_key"}),
    ("mistral-sliding", {"page_positions": "true"}),
]


@pytest.mark.parametrize(("name", "options"), AGREEING, ids=str)
def test_layers_that_agree_on_a_questions_pages(name: str, options: dict[str, Any]) -> None:
    for num_layers in (1, 3):
        lm, naive = pair(name, kv_budget=5 * W, agreement_layers=num_layers, **options)
        check_answer(lm, naive, random_ids(5, 5).tolist())
        chosen = [
            naive.pages[-1].selected[layer] for layer in range(len(naive.windows)) if not naive._keeps_window(layer)
        ]
        assert all(pages == chosen[0] for pages in chosen) and len(chosen[0]) < len(naive.pages) - 1


@pytest.mark.parametrize("num_positions", [48, 64, 71])
def test_distances_shrink_to_fit_the_window(num_positions: int) -> None:
    """67 tokens of text: none left out counts, some, nearly all."""
    model = {"kv_budget": 4 * W, "page_positions": "true"}
    lm, naive = pair("llama", **model)
    lm.model.config.max_position_embeddings = num_positions
    check_answer(lm, naive, random_ids(5, 5).tolist())


def check_answer(lm: RetroLM, naive: NaiveRetroLM, question: list[int]) -> tuple[Any, NaivePage]:
    """Ask a text of 67 tokens, hold logits and choices to the naive decode, and return the query of both."""
    text = random_ids(67).tolist()
    with wide_softmax():
        document = lm.read(torch.tensor(text))
        query, logits = generate(lm, document, question)
    naive.read(cut(text))
    page = naive.ask(question, query.generated)
    expected = torch.from_numpy(page.logits[len(question) - 1 : -1])
    assert (logits - expected).abs().max() <= TOLERANCE
    check_choices(lm, query.choices, page)
    return query, page


def generate(lm: RetroLM, document: Any, question: list[int]) -> tuple[Any, Tensor]:
    """The query after 12 greedy tokens, and their logits [12, vocabulary]."""
    from retrolm.engine.decode_round import Query
    from retrolm.engine.generation import Generator

    query, recorder = Query(document.table, question, document.token_ids), Recorder()
    options = lm.options_for({"do_sample": False, "logits_processor": [recorder], "eos_token_id": None}, ())
    Generator(document.encoder).run([query], 12, options)
    return query, torch.cat(recorder.logits)


def check_choices(lm: RetroLM, choices: list[Any], page: NaivePage) -> None:
    for layer, choice in enumerate(choices):
        if not lm.backbone.retrieves(layer):
            continue
        assert choice.ordinals.tolist() == page.selected[layer]
        if layer:
            assert same_up_to_a_constant(choice.scores, page.scores[layer])


def same_up_to_a_constant(found: Tensor, expected: list[float]) -> bool:
    difference = found - torch.tensor(expected)
    return bool((difference - difference.mean()).abs().max() < 1e-4)
