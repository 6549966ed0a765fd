"""Repetition (notebook 33): its dependence on steps, length and schedule, at equal numbers of forwards.

Section 6.4 of the paper reports repetition by eye, worse for long answers with few steps, and leaves adaptive step allocation
and remasking open. Here both are sweeps over the same images, in rows of `generation.ask_all`. Only schedules that spend all
their forwards are compared; the forwards spent are shown.
"""

from collections.abc import Mapping

import pandas as pd

from medv.companion.studies.generation import METRICS, canvas_of, name_of
from medv.companion.studies.node import Node
from medv.companion.studies.summaries import change, direction, means, summarize_answers
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import DuplicateVeto
from medv.diffusion.revision import RevealRemask
from medv.diffusion.schedules import SCHEDULES, FixedSchedule
from medv.intervals import NOT_MEASURED
from medv.profiles import Profile

NODE = Node(
    "repetition",
    "33_repetition.ipynb",
    "Repetition, and what steps, length and schedule do to it",
    needs=("models/stage2",),
    makes=("answers/repetition",),
    results=("fig05", "fig10", "schedules", "effects_repetition"),
    reads=("qa50",),
    may_read=("judge",),
    heavy=True,
)

SHARES = (8, 4, 2, 1)
"""Tokens a forward writes on average, L / Z: few steps first."""
MEASURES = ("adjacent_duplicates", "repeated_share", "rep_4", "longest_run")


def sweep_settings(profile: Profile) -> pd.DataFrame:
    """Canvases of L, L / 2 and L / 4 in one block with Z = L / 8 ... L, and the longest in several blocks with Z = L / 4.

    Columns: sweep ("steps" or "block"), gen_length, block_length, steps, tokens_per_step, setting.
    """
    longest, _ = canvas_of(profile)
    lengths = (longest // 4, longest // 2, longest)
    rows = [("steps", length, length, max(length // share, 1), share) for length in lengths for share in SHARES]
    rows += [("block", longest, longest // blocks, max(longest // 4, blocks), 4) for blocks in (4, 2, 1)]
    frame = pd.DataFrame(rows, columns=["sweep", "gen_length", "block_length", "steps", "tokens_per_step"])
    sizes = frame[["gen_length", "block_length", "steps"]]
    return frame.assign(setting=[name_of(*row) for row in sizes.itertuples(index=False)])


def schedule_configs(profile: Profile) -> tuple[dict[str, SamplerConfig], list[int]]:
    """Schedules at equal forwards on the longest canvas: "name, Z forwards" -> configuration, and the numbers of forwards.

    "linear" is Algorithm 1. All fill one block, with L / 8 and L / 4 forwards.
    """
    longest, _ = canvas_of(profile)
    ways = {
        "linear": {},
        "cosine": {"schedule": SCHEDULES["cosine"]},
        "few first (shift 1/3)": {"schedule": FixedSchedule("shift", 1 / 3)},
        "budgeted by entropy": {"schedule": SCHEDULES["budgeted"]},
        "linear, duplicate veto": {"filters": (DuplicateVeto(),)},
        "linear, remask repeats": {"revision": RevealRemask(tokens=2)},
        "budgeted, duplicate veto": {"schedule": SCHEDULES["budgeted"], "filters": (DuplicateVeto(),)},
    }
    budgets = list(dict.fromkeys((max(longest // 8, 2), max(longest // 4, 2))))
    configs = {
        f"{name}, {steps} forwards": SamplerConfig(longest, longest, steps, **options)
        for steps in budgets
        for name, options in ways.items()
    }
    return configs, budgets


def steps_claims(settings: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """The claims of section 6.4 about steps and length, for `check_effects`."""
    steps = settings[settings["sweep"] == "steps"]
    claims = []
    for length, part in steps.groupby("gen_length"):
        few, many = part["setting"].iloc[0], part["setting"].iloc[-1]
        claims += [(f"fewer steps repeat more (L = {length})", metric, many, few, "rises") for metric in MEASURES[:2]]
    few = steps[steps["tokens_per_step"] == max(SHARES)].sort_values("gen_length")["setting"]
    ends = few.iloc[0], few.iloc[-1]
    return claims + [("longer answers with few steps repeat more", metric, *ends, "rises") for metric in MEASURES[:2]]


def schedule_table(items: pd.DataFrame, budgets: list[int], score: str = "facts, F1") -> pd.DataFrame:
    """Each schedule against the linear one at the same forwards: means, and the paired change of score and repetition."""
    value = means(summarize_answers(items, METRICS), METRICS)
    rows = []
    for budget in budgets:
        base = f"linear, {budget} forwards"
        for name in [name for name in items["setting"].unique() if name.endswith(f", {budget} forwards")]:
            row = {"schedule": name.removesuffix(f", {budget} forwards"), "forwards": value.loc[name, "forwards"]}
            for metric in ("score", "repeated_share", "adjacent_duplicates"):
                label = {"score": score}.get(metric, metric.replace("_", " "))
                row[label] = round(value.loc[name, metric], 1)
                row[f"{label}, against linear"] = "" if name == base else change(items, metric, base, name).cell("+.1f")
            rows.append(row)
    return pd.DataFrame(rows)


def schedule_verdict(items: pd.DataFrame, budgets: list[int]) -> str:
    """Per budget and measure: schedules that repeat less than the linear one, not shown to score lower, and the forwards."""
    kept = "and no lower score shown" if items["score"].notna().any() else f"whatever their score, which is {NOT_MEASURED}"
    lines = []
    for budget in budgets:
        base = f"linear, {budget} forwards"
        part = items[items["setting"].str.endswith(f", {budget} forwards")]
        spent = part.groupby("setting")["forwards"].mean()
        lines.append(f"With {budget} forwards (spent: {spent.min():.1f} to {spent.max():.1f}), {kept}:")
        for metric, words in (("repeated_share", "repeated words"), ("adjacent_duplicates", "equal neighbors")):
            better = [
                name.removesuffix(f", {budget} forwards")
                for name in spent.index.drop(base)
                if direction(change(part, metric, base, name)) == "falls"
                and direction(change(part, "score", base, name)) != "falls"
            ]
            lines.append(f"  fewer {words} than linear: {'; '.join(better) or 'none'}")
    return "\n".join(lines)


def most_repeating(items: pd.DataFrame, settings: Mapping[str, str]) -> pd.DataFrame:
    """For Figure 5: the answers of settings (name -> setting) to the request with the highest mean repeated share."""
    part = items[items["setting"].isin(settings.values())]
    worst = part.groupby("id")["repeated_share"].mean().idxmax()
    rows = part[part["id"] == worst].set_index("setting").loc[list(settings.values())].reset_index()
    rows.insert(0, "name", list(settings))
    return rows[["name", "setting", "id", "question", "text", "score", "words", "repeated_share"]]


def schedule_effects(budgets: list[int]) -> list[tuple[str, str, str, str, str]]:
    """Two answers to section 6.4 against the linear schedule, for `effects.claimed_effects`."""
    ways = {"linear, duplicate veto": budgets[0], "budgeted by entropy": budgets[-1]}
    ends = {f"{way}, {z} forwards": (f"linear, {z} forwards", f"{way}, {z} forwards") for way, z in ways.items()}
    return [(name, metric, *pair, "") for name, pair in ends.items() for metric in ("score", *MEASURES[:2])]
