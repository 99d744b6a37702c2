"""What should the first layer of a composed answer take, pages by mean keys or the last ones? What does composing cost?

Plants one fact in each of several stretches of a text, puts each stretch into a base as a document of its own, and asks
for the facts: with all documents composed, under both settings; with the one document that has it (exact); with that
one and the other stretches as they were (one_fact: composed, but nothing to mistake the fact for); and with all
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
SETTINGS = ("mean_key", "recent", "exact", "one_fact", "joined")
SENTENCE = " One of the special magic numbers for {key} is: {value}. "


def main() -> None:
    options = _options()
    shutil.rmtree(options.folder / "base", ignore_errors=True)
    base = KnowledgeBase.create(options.folder / "base", options.model, kv_budget=options.kv_budget)
    facts = random_facts(random.Random(options.seed), options.documents, "word_pair", "number")
    stretches = [_stretch(options, index, fact) for index, fact in enumerate(facts)]
    for index, (fact, text) in enumerate(zip(facts, stretches, strict=True)):
        base.add(text, name=fact.key)
        base.add(_part(options, index), name=_without(fact))
    base.add("".join(stretches), name="joined")
    rows = {setting: [_ask(base, facts, fact, setting) for fact in facts] for setting in SETTINGS}
    summary = {
        setting: {key: sum(row[key] for row in found) / len(found) for key in found[0]}
        for setting, found in rows.items()
    }
    sizes = {"num_documents": len(facts), "num_tokens": base.documents[-1].num_tokens}
    print(json.dumps({**sizes, "settings": summary, **provenance(sys.argv)}, indent=1))


def _stretch(options: argparse.Namespace, index: int, fact: Fact) -> str:
    """One document: its own part of the text, with its fact somewhere inside."""
    part = _part(options, index)
    place = part.find(" ", random.Random(options.seed + index).randrange(len(part) // 5, 4 * len(part) // 5))
    return part[:place] + SENTENCE.format(key=fact.key, value=fact.values[0]) + part[place:]


def _part(options: argparse.Namespace, index: int) -> str:
    """The text's part of one document."""
    size = options.tokens * 4
    part: str = options.text.read_text(encoding="utf-8")[(index + 1) * size : (index + 2) * size]
    return part


def _without(fact: Fact) -> str:
    return f"{fact.key}, without the fact"


def _which(facts: list[Fact], fact: Fact, setting: str) -> dict[str, Any]:
    """What a setting asks, as `KnowledgeBase.ask` takes it."""
    if setting in ("exact", "joined"):
        return {"documents": fact.key if setting == "exact" else "joined"}
    if setting == "one_fact":
        return {"documents": [fact.key, *(_without(other) for other in facts if other is not fact)]}
    return {"documents": [each.key for each in facts], "first_layer": setting}


def _ask(base: KnowledgeBase, facts: list[Fact], fact: Fact, setting: str) -> dict[str, Any]:
    which = _which(facts, fact, setting)
    answer: KnowledgeAnswer = base.ask(QUESTION.format(key=fact.key), max_new_tokens=32, **which)
    value = fact.values[0]
    layers = [len(one.layers) for one in answer.passages if value in one.text]
    scoring = base.lm.backbone.num_layers - base.lm.config.num_skip_layers
    return {
        "answered": float(value in answer.text),
        "evidence_recall": max(layers, default=0) / scoring,
        "evidence_ranked_first": float(value in answer.passages[0].text),
    }


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
