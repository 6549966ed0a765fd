"""Documents laid end to end and cut into rows of one length, so that no position of a batch is padding.

A document that has ended is followed by end-of-text tokens, one at least and up to `ENDS` by a draw of its own: they are
hidden and scored like all others, and teach a model to go on with them where a text is over. Attention does not stop at the
seams between documents.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from medv.data.chat import SpecialTokens
from medv.data.texts import Document

ENDS = 32


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int, *, seed: int = 0, name: str = "text"
) -> torch.Tensor:
    """int64 [rows, length]; documents come in an order drawn from `seed`, and what does not fill the last row is left out.

    Raises ValueError where they do not fill one row.
    """
    special, rng = SpecialTokens.of(tokenizer), np.random.default_rng([seed, 0x9AC2])
    texts = [document.string() for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    counts = rng.integers(1, ENDS + 1, size=len(documents))
    stream: list[int] = []
    for index in rng.permutation(len(documents)):
        stream += encoded[index]
        if documents[index].ended:
            stream += [special.end_of_text] * int(counts[index])
    rows = len(stream) // length
    if not rows:
        raise ValueError(f"the {name} has {len(stream)} tokens, less than one row of {length}: shorten the rows")
    return torch.tensor(stream[: rows * length]).view(rows, length)
