"""A small real tokenizer (byte-level BPE trained on a few sentences), so that tests need no download."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
STORY = (
    "It was late when the ship came in. Nobody spoke. The captain, who had seen worse nights, walked to the bow and "
    'counted the lamps. "Seven," he said. Mr. Hale wrote it down. What did it mean? There were 12 houses on the shore. '
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "One of the special magic numbers is hidden within the following text. Answer the question based on documents. "
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 600 tokens, with or without a chat template; each call's is its caller's to change."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_rules()), chat_template=CHAT if chat else None)


@cache
def _rules() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([STORY], trainer)
    return str(core.to_str())
