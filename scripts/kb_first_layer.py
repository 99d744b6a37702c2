"""What should the first layer of a composed answer take: pages by mean keys, or the last ones?

Plants one fact in each of several stretches of a text, puts each stretch into a base as a document of its own, and asks
for the facts: with all documents composed, under both settings; with the one document that has it (exact); and with all
stretches read as one text (joined), which shows what documents lose that haven't seen each other.

    python scripts/kb_first_layer.py --text BOOK --folder DIR [--documents 6] [--tokens 1500] [--kv-budget 1024]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from retrolm import KnowledgeBase
from retrolm.engine.provenance import provenance
from retrolm.knowledge_base.answers import KnowledgeAnswer
from retrolm.planting import Fact, random_facts

QUESTION = "What is the special magic number for {key} mentioned in the text?"
SENTENCE = " One of the special magic numbers for {key} is: {value}. "


def main() -> None:
    options = _options()
    shutil.rmtree(options.folder / "base", ignore_errors=True)
    base = KnowledgeBase.create(options.folder / "base", options.model, kv_budget=options.kv_budget)
    facts = random_facts(random.Random(options.seed), options.documents, "word_pair", "number")
    stretches = [_stretch(options, index, fact) for index, fact in enumerate(facts)]
    for fact, text in zip(facts, stretches, strict=True):
        base.add(text, name=fact.key)
    rows = {setting: [_ask(base, fact, setting) for fact in facts] for setting in ("mean_key", "recent", "exact")}
    base.remove([fact.key for fact in facts])
    base.add("".join(stretches), name="joined")
    rows["joined"] = [_ask(base, fact, "joined") for fact in facts]
    summary = {
        setting: {key: sum(row[key] for row in found) / len(found) for key in found[0]}
        for setting, found in rows.items()
    }
    sizes = {"num_documents": len(facts), "num_tokens": base.documents[0].num_tokens}
    print(json.dumps({**sizes, "settings": summary, **provenance(sys.argv)}, indent=1))


def _stretch(options: argparse.Namespace, index: int, fact: Fact) -> str:
    """One document: its own part of the text, with its fact somewhere inside."""
    text: str = options.text.read_text(encoding="utf-8")
    size = options.tokens * 4
    part = text[(index + 1) * size : (index + 2) * size]
    place = part.find(" ", random.Random(options.seed + index).randrange(size // 5, 4 * size // 5))
    return part[:place] + SENTENCE.format(key=fact.key, value=fact.values[0]) + part[place:]


def _ask(base: KnowledgeBase, fact: Fact, setting: str) -> dict[str, Any]:
    names = {"exact": fact.key, "joined": "joined"}
    which: dict[str, Any] = {"documents": names[setting]} if setting in names else {"first_layer": setting}
    answer: KnowledgeAnswer = base.ask(QUESTION.format(key=fact.key), max_new_tokens=32, **which)
    value = fact.values[0]
    layers = [len(one.layers) for one in answer.passages if value in one.text]
    scoring = base.lm.backbone.num_layers - base.lm.config.num_skip_layers
    return {"answered": float(value in answer.text), "evidence_recall": max(layers, default=0) / scoring}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
