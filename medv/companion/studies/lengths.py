"""Length control (notebook 21, Table 3, Figure 4): the length that is asked for, the length that is written, and its cost.

A masked diffusion model gets its length as the size of its canvas. An autoregressive model ends by itself; the request can ask
for more words, or its end can be forbidden. Both answer the same requests; `medv.model.twin` is the autoregressive model of the
same size, data and recipes. All lengths of the paper, its 200 words included, are divided by `generation.divisor`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from medv import paper
from medv.companion.studies.conversation import given_answers
from medv.companion.studies.generation import METRICS, ask_all, canvas_of, divisor, measured
from medv.companion.studies.node import Node
from medv.companion.studies.requests import Judge
from medv.companion.studies.summaries import cells, means, summarize_answers
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example, Turn
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.profiles import Profile

NODE = Node(
    "length_control",
    "21_length_control.ipynb",
    "Length control: how long, and at what cost",
    needs=("models/stage2", "models/twin"),
    makes=("answers/length_control",),
    results=("table3", "fig04", "effects_length_control"),
    reads=("qa50",),
    may_read=("judge", "baselines"),
    heavy=True,
)

PAPER_WORDS = 200
DIFFUSION, TWIN = "diffusion", "twin"
Requests = Mapping[int, Sequence[Example]]
Ways = dict[str, tuple[Answerer, SamplerConfig]]
"""Name -> the model that is asked, and with what sampler."""


def asked_words(profile: Profile) -> int:
    """The paper's 200 words in this profile's lengths."""
    return PAPER_WORDS // divisor(profile)


def asking_for_words(asked: Requests, words: int) -> dict[int, list[Example]]:
    """The same requests, each followed by the wish for at least so many words."""
    wish = f" Use at least {words} words."
    return {seed: [replace(ex, turns=(Turn("user", ex.question + wish),)) for ex in group] for seed, group in asked.items()}


def _twin_ways(twin: Answerer | None, length: int, free: str, forced: str) -> Ways:
    """The twin with a canvas of this length, free to end (name `free`) and kept from ending (name `forced`)."""
    if twin is None:
        return {}
    size = (length, length, length)
    return {free: (twin, SamplerConfig(*size)), forced: (twin, SamplerConfig(*size, min_length=length))}


def table3_ways(profile: Profile, model: Answerer, twin: Answerer | None) -> Ways:
    """The rows of Table 3: the twin, free and kept from ending, if there is one; diffusion with ever fewer steps."""
    length, block = canvas_of(profile)
    printed = paper.table("table3").dropna(subset="sampling_steps")
    ways = _twin_ways(twin, length, f"{TWIN}, default", f"{TWIN}, kept from ending")
    for steps in (max(int(z) // divisor(profile), length // block) for z in printed["sampling_steps"]):
        ways[f"{DIFFUSION}, Z = {steps}"] = model, sampler_config(profile.describe.sized(length, block, steps))
    return ways


def length_ways(profile: Profile, model: Answerer, twin: Answerer | None) -> Ways:
    """The same models asked for a quarter, a half and three quarters of the longest canvas, one token a forward."""
    longest, block = canvas_of(profile)
    ways: Ways = {}
    for length in (longest // 4, longest // 2, 3 * longest // 4):
        size = (length, block if length % block == 0 else length, length)
        ways[f"{DIFFUSION}, {length} tokens"] = model, sampler_config(profile.describe.sized(*size))
        ways |= _twin_ways(twin, length, f"{TWIN}, at most {length} tokens", f"{TWIN}, exactly {length} tokens")
    return ways


def ask_lengths(
    profile: Profile,
    model: Path,
    twin: Path | None,
    asked: Requests,
    folder: Path,
    *,
    judge: Judge | None = None,
    given: Mapping[str, Path] | None = None,
) -> pd.DataFrame:
    """All answers of the notebook as rows of `generation.ask_all`. given: other models by the file of their answers."""
    both = [None if folder is None else Answerer.load(folder, dtype=profile.dtype) for folder in (model, twin)]
    words, main = asked_words(profile), table3_ways(profile, *both)
    how = {"batch_size": profile.describe.batch_size, "judge": judge}
    frames = [ask_all(main, asked, folder / "table3", **how)]
    if twin is not None:
        default = {f"{TWIN}, asked for {words} words": main[f"{TWIN}, default"]}
        frames.append(ask_all(default, asking_for_words(asked, words), folder / "words", **how))
    frames.append(ask_all(length_ways(profile, *both), asked, folder / "lengths", **how))
    everything = [example for examples in asked.values() for example in examples]
    for place, (name, file) in enumerate((given or {}).items()):
        out = folder / "given" / f"{place:02d}.jsonl"
        for seed, examples in asked.items():
            rows = given_answers(file, examples, out, among=everything)
            scores = judge(out, out.with_suffix(".judged.jsonl")) if judge else {}
            frames.append(measured(rows, examples, scores).assign(setting=f"{name}, default", seed=seed))
    return pd.concat(frames, ignore_index=True)


def table3(items: pd.DataFrame, profile: Profile, *, score: str = "facts, F1 (%)") -> pd.DataFrame:
    """Table 3, ours beside the paper's row of the same place. score: the name of the items' score."""
    summary = summarize_answers(items, METRICS)
    names = [name for name in items["setting"].unique() if "tokens" not in name]
    order = sorted(names, key=lambda name: (name.startswith(DIFFUSION), names.index(name)))
    value, text = means(summary, ["words", "seconds", "forwards"]), cells(summary, ["words", "score"])
    table = pd.DataFrame({"model": order})
    table["s per query"] = value["seconds"][order].to_numpy()
    table["words per query"] = text["words"][order].to_numpy()
    table["s per word"] = (value["seconds"] / value["words"])[order].to_numpy()
    table["forwards"] = value["forwards"][order].to_numpy()
    table[score] = text["score"][order].to_numpy()
    table["n"] = [int((items["setting"] == name).sum()) for name in order]
    printed = paper.table("table3")
    kinds = ["default prompt", "asked", *[f"Z = {z:.0f}" for z in printed["sampling_steps"].dropna()]]

    def counterpart(name: str) -> str:
        if name in (f"{TWIN}, default", "LLaVA-Med, default"):  # the model of the paper's row
            return "default prompt"
        if "asked for" in name:
            return "asked"
        return f"Z = {int(name.rpartition(' ')[2]) * divisor(profile)}" if name.startswith(DIFFUSION) else "none"

    for column in ("seconds_per_query", "words_per_query", "seconds_per_word", "overall_score"):
        found = dict(zip(kinds, printed[column], strict=True))
        table[f"{column.replace('_', ' ')} (paper)"] = [found.get(counterpart(name)) for name in order]
    return table


def length_frame(items: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """For Figure 4: asked tokens, model, metric, value, low, high. The longest canvas is that of Table 3 with Z = L."""
    longest = canvas_of(profile)[0]
    same = {
        f"{DIFFUSION}, Z = {longest}": f"{DIFFUSION}, {longest} tokens",
        f"{TWIN}, default": f"{TWIN}, at most {longest} tokens",
        f"{TWIN}, kept from ending": f"{TWIN}, exactly {longest} tokens",
    }
    rows = summarize_answers(items.replace({"setting": same}), ["words", "seconds", "score"])
    rows = rows[rows["setting"].str.endswith("tokens")].copy()
    rows["asked"] = rows["setting"].str.extract(r"(\d+) tokens").astype(int)[0]
    labels = {f"{DIFFUSION}, ": "diffusion", f"{TWIN}, at most ": "twin, may end", f"{TWIN}, exactly ": "twin, may not end"}
    rows["model"] = [next(label for start, label in labels.items() if name.startswith(start)) for name in rows["setting"]]
    return rows[["asked", "model", "metric", "value", "low", "high", "n", "seeds"]]


def length_claims(profile: Profile, *, twin: bool = True) -> list[tuple[str, str, str, str, str]]:
    """The claims of Table 3, for `check_effects`; without a `twin` those about an autoregressive model are left out."""
    longest, words = canvas_of(profile)[0], asked_words(profile)
    full, default = f"{DIFFUSION}, Z = {longest}", f"{TWIN}, default"
    few = list(table3_ways(profile, None, None))[-1]
    asked = "asking the autoregressive model for words adds a few"
    compared = [
        ("diffusion writes more words", "words", default, full, "rises"),
        ("and takes more time", "seconds", default, full, "rises"),
        ("and scores higher", "score", default, full, "rises"),
        (asked, "words", default, f"{TWIN}, asked for {words} words", "rises"),
    ]
    own = [
        ("fewer steps take less time", "seconds", full, few, "falls"),
        ("fewer steps score lower", "score", full, few, "falls"),
        ("fewer steps write more words", "words", full, few, "rises"),
    ]
    return [*compared, *own] if twin else own
