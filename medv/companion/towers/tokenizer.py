"""The tokenizer of the models trained here: byte-level BPE on generated text, with LLaDA's special tokens.

Any text can be encoded (bytes are the fallback); words of the phantoms are one token each, the same at the start of a text
as inside it: what a model learns of a word in a report serves a one-word answer. Nothing is read but the texts.
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medv.data.chat import SpecialTokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, special ones included; raises ValueError where that is too few."""
    special = list(SpecialTokens.STRINGS.values())
    if vocab_size < 256 + len(special):
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {len(special)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_special(tokenizer)


def with_special(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer, which has the strings of `SpecialTokens`, with their roles, padding at the left."""
    begin, end, *others = SpecialTokens.STRINGS.values()
    roles = {"bos_token": begin, "eos_token": end, "pad_token": end, "additional_special_tokens": others}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, padding_side="left", **options)
