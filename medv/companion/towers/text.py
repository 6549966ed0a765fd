"""Text for the adaptation: documents packed into rows, and documents that a causal tower writes itself (`--self`).

Rows are documents laid end to end and cut to one length, without padding. A document that has ended is followed by 1 to `ENDS`
end-of-text tokens, masked and scored like all others. Attention crosses the seams. Written text is a folder of JSON lines, one
file a batch, a function of tower, settings and file number; a stopped run continues with the next file. All prompts of a batch
have the same number of tokens, so that no padding and no attention mask is needed.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from medv.artifacts import fingerprint, write_json, write_text
from medv.checkpoints.assembly import token_ids
from medv.checkpoints.loading import load_tokenizer
from medv.companion.towers.adapt import half_on, load_tower
from medv.data.chat import SpecialTokens
from medv.data.texts import Document, all_prompts
from medv.ownership import check_empty

ENDS = 32
CANDIDATES = 64  # sampling is among the most probable tokens: sorting the whole vocabulary at each token takes too long
LOOK = 32  # tokens between two checks whether all answers have ended


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int, *, seed: int = 0, name: str = "text"
) -> torch.Tensor:
    """int64 [rows, length]; documents come in an order drawn from `seed`, and an incomplete last row is dropped.

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


@dataclass(frozen=True)
class Writing:
    """How text is written. new_tokens: of an answer at most, which is cut off there."""

    batch_size: int = 64
    new_tokens: int = 256
    temperature: float = 0.9
    top_p: float = 0.95
    seed: int = 0


def write_text_of(
    language: Path, folder: Path, tokens: int, writing: Writing, *, device: str | torch.device = "cpu", quiet: bool = False
) -> dict:
    """Write files to `folder` until they hold `tokens` tokens of answers; returns files, tokens and tokens a second.

    Raises ValueError where the folder holds the text of another tower or of other settings, or other files alone.
    """
    note, settings = folder / "written.json", asdict(writing) | {"tower": fingerprint(language)}
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{folder} holds text that was written otherwise: choose another folder or delete it")
    if folder.exists() and not note.exists():  # else files of somebody else would be read as what the tower wrote
        check_empty(folder)
    write_json(note, settings)
    tokenizer = load_tokenizer(language)
    asked = all_prompts()
    texts = [Document("", prompt).opening() for prompt in asked]
    if tokenizer.chat_template:
        dialogues = [[{"role": "user", "content": prompt}] for prompt in asked]
        texts = tokenizer.apply_chat_template(dialogues, add_generation_prompt=True, tokenize=False)
    groups: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)  # prompts and their ids, by number of tokens
    for prompt, ids in zip(asked, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        groups[len(ids)].append((prompt, ids))
    prompts = [groups[size] for size in sorted(groups)]
    causal, number, total, fresh, seconds = None, 0, 0, 0, 0.0
    with tqdm(total=tokens, unit="token", desc="writing", disable=quiet) as bar:
        while total < tokens:
            file = folder / f"batch-{number:05d}.jsonl"
            if not file.exists():
                causal = causal or load_tower(language, dtype=half_on(device), causal=True).to(device)
                started = time.perf_counter()
                rows = _write_batch(causal, tokenizer, prompts, writing, number)
                write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                fresh, seconds = fresh + sum(row["tokens"] for row in rows), seconds + time.perf_counter() - started
            written = sum(json.loads(line)["tokens"] for line in file.read_text(encoding="utf-8").split("\n") if line)
            total, number = total + written, number + 1
            bar.update(written)
    return {"files": number, "tokens": total, "tokens_per_second": fresh / seconds if seconds else None, "seconds": seconds}


def _write_batch(
    causal: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts, writing: Writing, number: int
) -> list[dict]:
    """The answers of one batch: rows of prompt, text, ended, tokens."""
    rng = np.random.default_rng([writing.seed, number, 0x5E1F])
    sizes = np.array([len(group) for group in prompts])
    group = prompts[rng.choice(len(prompts), p=sizes / sizes.sum())]
    chosen = [group[i] for i in rng.integers(len(group), size=writing.batch_size)]
    known = token_ids(SpecialTokens.of(tokenizer))
    stops = known["stop_token_ids"]
    banned = sorted({*tokenizer.all_special_ids, *known["suppress_token_ids"]} - set(stops))
    ids = torch.tensor([ids for _, ids in chosen])
    answers = continue_ids(causal, ids, writing, stops, banned, seed=int(rng.integers(2**31))).tolist()
    rows = []
    for (prompt, _), answer in zip(chosen, answers, strict=True):
        end = next((i for i, token in enumerate(answer) if token in stops), None)
        row = {"prompt": prompt, "text": tokenizer.decode(answer[:end]).strip()}
        rows.append(row | {"ended": end is not None, "tokens": len(answer[:end])})
    return rows


@torch.inference_mode()
def continue_ids(
    causal: LlamaForCausalLM, ids: torch.Tensor, writing: Writing, stops: list[int], banned: list[int], *, seed: int
) -> torch.Tensor:
    """Continuations of ids [B, P] by the causal tower, sampled at the temperature from the nucleus: int64 [B, <= new_tokens].

    Tokens behind a stop token have no meaning.
    """
    generator = torch.Generator(causal.device).manual_seed(seed)
    stop, never = (torch.tensor(tokens, device=causal.device) for tokens in (stops, banned))
    cache, step, written = DynamicCache(config=causal.config), ids.to(causal.device), []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=causal.device)
    for place in range(writing.new_tokens):
        logits = causal(step, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [B, V]
        best = logits.index_fill(1, never, -torch.inf).topk(CANDIDATES)
        shares = (best.values.float() / writing.temperature).softmax(dim=-1)  # [B, CANDIDATES], falling
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= writing.top_p, 0)
        step = best.indices.gather(1, torch.multinomial(shares, 1, generator=generator))  # [B, 1]
        written.append(step)
        ended |= torch.isin(step[:, 0], stop)
        if place % LOOK == LOOK - 1 and bool(ended.all()):
            break
    return torch.cat(written, dim=1)
