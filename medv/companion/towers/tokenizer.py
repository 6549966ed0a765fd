"""The tokenizer of the models trained here: byte-level BPE on generated text, with LLaDA's special tokens.

Any text can be encoded (bytes are the fallback); words of the phantoms are one token each, the same at the start of a text
as inside it: what a model learns of a word in a report serves a one-word answer. Nothing is read but the texts.
"""

from collections.abc import Iterable

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
    strings = SpecialTokens.STRINGS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=strings["start_of_text"],
        eos_token=strings["end_of_text"],
        pad_token=strings["end_of_text"],
        additional_special_tokens=special[2:],
        padding_side="left",
    )
