"""docs/methods.md, the page that places each method among the others: written from what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

from ..registry import Registry
from .base import PLACE, Method

_COLUMNS = (*PLACE, "prefill", "positions", "keeps", "exact_when")
_HEADS = {"pages": "Whole pages", "tokens": "Token by token", "prune": "Pruned after the prefill"}
_HEADS |= {"landmarks": "Landmarks among the tokens"}
_HEADS |= {"dense": "Dense", "rag": "Another prompt (RAG)"}
_TOP = """# Methods

Written from the methods' own metadata by `python tests/test_methods_page.py`; a test holds it to them. All run behind
the same `--method`, so that one `retrolm eval` compares them; knobs are set by `--set NAME.knob=value`. Numbers are
defaults, at budgets that have room for them.

*trained*: what must be learned for it. *unit*: what is chosen. *index*: what a unit is known by. *query*: what looks
for it. *scope*: what shares a choice. *when*: when one is made. *prefill*: whether the budget holds while the prompt is
read, too (streaming), or the prompt is read in full (dense).
"""
_TAIL = """
## RetroAttention

`quest_retro` and `arkvale_retro` are the same methods behind a decorator (`methods/retro_attention.py`). With
`--set quest_retro.window=4` a step computes the newest token and the three before it. Those attend the pages that are
loaded for the newest and that they had not seen, at true positions, and overwrite their keys and values in the layers
behind the first sparse one. The paper's sources that we could read leave open what becomes of the outputs a token had,
once its queries have changed:

* `partials=kept` merges them as they are, which reads no page more than the base method;
* `partials=recomputed` attends all pages seen with the present queries, which reads up to `window` budgets, and says so
  in `attended_tokens`.

In the first sparse layer, where queries don't change, both are the same.

`retrolm_retro` is the same idea over RetroLM's pages (`methods/retro_pages.py`). With `retrieve_every=32` each 32
generated tokens become a page that retrieves anew; the `window` - 1 generated pages before it then go through all
layers once more, and attend what they had seen and what the new page chose. The union is always recomputed, at
compact positions of its own: outputs over different sets stand in different position frames. A revised page reads up to
`window` budgets, which `attended_tokens` states. Without `retrieve_every` no page loads anything later, nothing is
revised, and the answer says so.

What revisions gain on long answers is measured by `retrolm eval generation`.

## RetrievalAttention's index

`--set retrieval_attention.index=approximate` (`pip install 'retrolm[ann]'`) searches graphs of near neighbours by faiss
instead of all keys; `breadth` trades its time for recall, `links` its memory. They link keys to keys. The paper's own
index links the prompt's queries to their keys, because later queries lie far from the keys; no library on the package
index that is kept up builds such a graph (faiss, hnswlib, usearch and voyager take one set of vectors), so it isn't
there, and a wider search stands in for it. Exact search, the default, bounds what any index finds.

## Landmark Attention

A landmark token stands behind every 50 tokens. A query's softmax runs over its own block's tokens and the landmarks of
earlier blocks; what a landmark gets, its block's tokens share by a softmax of their own (`ops/landmark_attention.py`).
A model has to learn that:

```bash
retrolm train landmark configs/landmark/smollm2-135m.toml --data-root DATA --out run
retrolm ask book.txt "…" --method landmark --set landmark.weights=run/landmark
```

Training is language modelling in a short context, on the documents of stage 2, of the landmarks' embedding and a LoRA
adapter (the paper trains all weights). Asked for tokens beyond that context, it reads chunks and retrieves blocks by
their landmarks' keys, at the positions of the published code: chunks of `kv_budget` - (`top_k` + 1) blocks, where that
code has its training context, so `--kv-budget 1020` is the published rule for the recipe above. Its full attention is
that of the trained model, not the stock model's: with `top_k` blocks for the whole text it is grouped softmax over all
of it (tested). Landmarks count as attended tokens; those that are only scored don't, as digests of other methods. In
the first layer landmarks know nothing of their blocks and tie; of equal ones the later is taken. Not there: landmarks
as targets of the loss, kernels of its own, training of all weights.

## Left out

TCA-Attention ([2512.09238](https://arxiv.org/abs/2512.09238)): its redundancy metric, budget rule and block size aren't
published where we could read them, and a guess under its name would be no baseline.
ShadowKV keeps no less memory here, RazorAttention frees it only in layers without a retrieval head, and ActQKV's blocks
stay on the device: what they save is attention, and what can be compared is accuracy.
"""


def methods_page(methods: Registry[Method]) -> str:
    """The text of the page, Markdown; one table for each kind of method."""
    found = [methods.get(name) for name in methods]
    tables = [_table(head, [kind for kind in found if kind.kind == key]) for key, head in _HEADS.items()]
    return _TOP + "".join(tables) + _TAIL


def _table(head: str, found: list[type[Method]]) -> str:
    columns = ("method", *(column.replace("_", " ") for column in _COLUMNS))
    rows = [[f"[{kind.name}]({kind.paper})", *(getattr(kind, column) for column in _COLUMNS)] for kind in found]
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return f"\n## {head}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
