"""Text that a causal tower writes itself, to be adapted on it without any download: `medv train adapt --self`.

A folder of JSON lines (`medv.data.texts` reads them), one file a batch. What a file holds depends on the tower, the settings
and its number alone; a stopped run goes on with the next file. All prompts of a batch have one length in tokens: no padding,
hence no attention mask, hence the fastest attention.
"""

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from medv.artifacts import fingerprint, write_json, write_text
from medv.checkpoints.assembly import token_ids
from medv.checkpoints.loading import load_tokenizer
from medv.data.chat import SpecialTokens
from medv.data.texts import Document, all_prompts
from medv.training.adapt import half_on, load_tower

CANDIDATES = 64  # the most probable tokens among which is drawn: to sort a whole vocabulary at each token takes too long
LOOK = 32  # tokens between two looks at whether all answers have ended


@dataclass(frozen=True)
class Writing:
    """How text is written. new_tokens: at most so many an answer, which is cut off there."""

    batch_size: int = 64
    new_tokens: int = 256
    temperature: float = 0.9
    top_p: float = 0.95
    seed: int = 0


def write_text_of(
    language: Path, folder: Path, tokens: int, writing: Writing, *, device: str | torch.device = "cpu", quiet: bool = False
) -> dict:
    """Write files to `folder` until they hold `tokens` tokens of answers; returns files, tokens and tokens a second.

    Raises ValueError where the folder holds the text of another tower or of other settings.
    """
    note, settings = folder / "written.json", asdict(writing) | {"tower": fingerprint(language)}
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{folder} holds text that was written otherwise: choose another folder or delete it")
    write_json(note, settings)
    tokenizer = load_tokenizer(language)
    prompts = by_length(tokenizer)
    causal, number, total, fresh, seconds = None, 0, 0, 0, 0.0
    with tqdm(total=tokens, unit="token", desc="writing", disable=quiet) as bar:
        while total < tokens:
            file = folder / f"batch-{number:05d}.jsonl"
            if not file.exists():
                causal = causal or load_tower(language, dtype=half_on(device), causal=True).to(device)
                started = time.perf_counter()
                rows = write_batch(causal, tokenizer, prompts, writing, number)
                write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                fresh, seconds = fresh + sum(row["tokens"] for row in rows), seconds + time.perf_counter() - started
            written = sum(json.loads(line)["tokens"] for line in file.read_text(encoding="utf-8").split("\n") if line)
            total, number = total + written, number + 1
            bar.update(written)
    return {"files": number, "tokens": total, "tokens_per_second": fresh / seconds if seconds else None, "seconds": seconds}


def by_length(tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[str, list[int]]]]:
    """The prompts and their ids, those of one length together.

    A tokenizer that has a chat template of its own knows best how its model wants to be asked.
    """
    asked = all_prompts()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        if tokenizer.chat_template
        else Document("", p).opening()
        for p in asked
    ]
    groups: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for prompt, ids in zip(asked, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        groups[len(ids)].append((prompt, ids))
    return [groups[size] for size in sorted(groups)]


def write_batch(
    causal: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts, writing: Writing, number: int
) -> list[dict]:
    """The answers of one batch: rows of prompt, text, ended, tokens."""
    rng = np.random.default_rng([writing.seed, number, 0x5E1F])
    sizes = np.array([len(group) for group in prompts])
    group = prompts[rng.choice(len(prompts), p=sizes / sizes.sum())]
    chosen = [group[i] for i in rng.integers(len(group), size=writing.batch_size)]
    known = token_ids(SpecialTokens.of(tokenizer))
    stops = known["stop_token_ids"]
    ids = torch.tensor([ids for _, ids in chosen])
    banned = sorted({*tokenizer.all_special_ids, *known["suppress_token_ids"]} - set(stops))
    answers = continue_ids(causal, ids, writing, stops, banned, seed=int(rng.integers(2**31))).tolist()
    ends = [next((i for i, token in enumerate(answer) if token in stops), None) for answer in answers]
    texts = tokenizer.batch_decode([answer[:end] for answer, end in zip(answers, ends, strict=True)])
    return [
        {"prompt": prompt, "text": text.strip(), "ended": end is not None, "tokens": len(answer[:end])}
        for (prompt, _), text, answer, end in zip(chosen, texts, answers, ends, strict=True)
    ]


@torch.inference_mode()
def continue_ids(
    causal: LlamaForCausalLM, ids: torch.Tensor, writing: Writing, stops: list[int], banned: list[int], *, seed: int
) -> torch.Tensor:
    """What the causal tower writes after ids [B, P], drawn at the temperature from the nucleus: int64 [B, at most new_tokens].

    What stands behind a stop token has no meaning.
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
