"""From causal to diffusion (notebook 14): a tower adapted on text, what it writes before and after, and the 2 x 2 x 2 ablation
of attention, alignment and weighting.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from medv.artifacts import write_json
from medv.data.chat import SpecialTokens
from medv.data.texts import Document, read_documents, split_documents
from medv.diffusion.sampler import SamplerConfig, sample
from medv.model.assembly import token_ids
from medv.training.adapt import adapt, half_on, load_tower
from medv.training.adapt_batches import AdaptRecipe
from medv.training.packing import pack
from medv.training.self_text import Writing, write_text_of

HELD_ROWS = 64
OPENING = 24  # tokens of a text without a prompt that are given
CONTINUE = SamplerConfig(gen_length=64, block_length=32, steps=64)


def adapt_on_text(
    language: Path,
    out: Path,
    recipe: AdaptRecipe,
    *,
    text: str | None = None,
    writing: Writing | None = None,
    self_tokens: int = 2_000_000,
    continuations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = False,
    **options,
) -> dict:
    """Read `text` (or let the tower write `self_tokens` by `writing` into out/self_text), adapt the tower, and leave beside
    it `continuations.json`: what it makes of held-out openings before and after. `options` are those of `adapt`. Returns the
    facts of the adaptation.
    """
    if (text is None) == (writing is None):
        raise ValueError("give either a text to adapt on or let the tower write its own, one of the two")
    written = {}
    if writing is not None:
        text = out / "self_text"
        written = {"written": write_text_of(language, text, self_tokens, writing, device=device, quiet=quiet)}
    documents, held_out = split_documents(read_documents(text))
    tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True)
    rows = pack(documents, tokenizer, recipe.length, seed=seed)
    held_rows = pack(held_out, tokenizer, recipe.length, name="held-out part of the text")[:HELD_ROWS]
    facts = adapt(language, rows, held_rows, recipe, out, seed=seed, device=device, quiet=quiet, **options)
    if facts and continuations and not (out / "continuations.json").exists():
        asked = held_out[:continuations]
        towers = {"before": language, "after": out}
        said = {name: continue_documents(folder, asked, device=device) for name, folder in towers.items()}
        given = [{"prompt": document.prompt, "written": document.text} for document in asked]
        answers = [dict(zip(said, pair, strict=True)) for pair in zip(*said.values(), strict=True)]
        write_json(out / "continuations.json", [given | answer for given, answer in zip(given, answers, strict=True)])
    return facts | written


def continue_documents(
    folder: Path, documents: Sequence[Document], *, device: str = "cpu", config: SamplerConfig = CONTINUE
) -> list[str]:
    """How a tower, read as a diffusion model, goes on after the prompt of each document, or after its first words."""
    tower = load_tower(folder, dtype=half_on(device), causal=False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    openings = [
        tokenizer.encode(document.opening(), add_special_tokens=False)
        if document.prompt
        else tokenizer.encode(document.text, add_special_tokens=False)[:OPENING]
        for document in documents
    ]
    return unmask(tower, tokenizer, openings, config)


def unmask(
    tower: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    openings: Sequence[Sequence[int]],
    config: SamplerConfig,
) -> list[str]:
    """The text that a bidirectional tower unmasks after each opening (ids), all in one batch."""
    known = token_ids(SpecialTokens.of(tokenizer))
    fill, width = known["fill_token_id"], max(len(ids) for ids in openings)
    prompt = torch.tensor([[fill] * (width - len(ids)) + list(ids) for ids in openings], device=tower.device)  # [B, P]
    seen = torch.tensor([[0] * (width - len(ids)) + [1] * (len(ids) + config.gen_length) for ids in openings])
    seen = seen.to(tower.device)  # [B, P + L]
    positions = (seen.cumsum(dim=1) - 1).clamp_min(0)

    def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        states = tower.model(canvas, attention_mask=seen, position_ids=positions, use_cache=False).last_hidden_state
        return tower.lm_head(states[:, columns])

    config = replace(
        config, suppress_tokens=tuple(known["suppress_token_ids"]), stop_tokens=tuple(known["stop_token_ids"])
    )
    output = sample(denoise, prompt, config, mask_token_id=known["mask_token_id"], fill_token_id=fill)
    ids = [row[:length] for row, length in zip(output.sequences.tolist(), output.lengths, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(ids)]
