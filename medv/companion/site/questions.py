"""The page "Questions nobody answered": what users of related projects asked in public, with what was measured here.

Every number, and every word that depends on one, comes from the CSV files of a run when the page is built; the sentences around
them hold no results. A question whose files the run lacks is left out.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medv.intervals import Estimate

ISSUE = "https://github.com/{}/issues/{}"
DRAWN = "A tiny model on drawings shows an effect, not its size in a model of billions of parameters on real images."


class Tables:
    """The CSV files of a folder of results, by name."""

    def __init__(self, figures: Path):
        self.figures = figures
        self.read: dict[str, pd.DataFrame] = {}

    def __call__(self, name: str, **where: object) -> pd.DataFrame:
        """The rows of `name`.csv with these values, numbered from 0; raises LookupError where there is no file or no row."""
        path = self.figures / f"{name}.csv"
        if name not in self.read:
            if not path.is_file():
                raise LookupError(f"{path} is not there")
            self.read[name] = pd.read_csv(path)
        frame = self.read[name]
        for column, value in where.items():
            frame = frame[frame[column] == value]
        if frame.empty:
            raise LookupError(f"{path} has no row with {where}")
        return frame.reset_index(drop=True)


@dataclass(frozen=True)
class Question:
    """asked: (repository, number) of the issues, and `said`, what they ask. answer: the paragraphs, from the tables. shown:
    (notebook, results) that made them. limit: what the answer cannot show.
    """

    title: str
    asked: tuple[tuple[str, int], ...]
    said: str
    answer: Callable[[Tables], list[str]]
    shown: tuple[tuple[str, tuple[str, ...]], ...]
    limit: str = DRAWN


def estimate(row: pd.Series, name: str = "") -> Estimate:
    """The estimate in the columns value, low, high of a row, or in `name`, `name`_low, `name`_high."""
    keys = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    return Estimate(*(float(row[key]) for key in keys))


def moves(first: Estimate, second: Estimate) -> str:
    """How a value goes from the first estimate to the second: by their intervals, if these do not overlap."""
    apart = Estimate(second.value - first.value, second.low - first.high, second.high - first.low)
    way = apart.verdict("rises", "falls", "does not change beyond the intervals")
    return f"{way}, from {first.cell()} to {second.cell()}"


def grid(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; the text of a cell is shown as it is."""
    lines = [list(head)]
    lines += [["" if isinstance(cell, float) and cell != cell else escaped(str(cell)) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """Text without anything that Markdown or HTML would obey."""
    return re.sub(r"([\\`*<$|]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))  # and a link


def _loss(tables: Tables) -> list[str]:
    table, known = tables("table_loss_band"), {"normalization": "sample"}
    reference = tables("table_loss_band", t="iid", **known).iloc[0]
    last = tables("loss_band", times="iid", scale="start", **known).iloc[-1]
    end = Estimate(last["median"], last["low"], last["high"])
    whole = {split: tables("stage2", split=split).sort_values("step") for split in ("train", "validation")}
    went = {split: f"from {rows['loss'].iloc[0]:.2f} to {rows['loss'].iloc[-1]:.2f}" for split, rows in whole.items()}
    columns = ["normalization", "t", "last against first fifth (%)", "noise of one step (%)", "width of the band (%)"]
    columns += ["noise, stratified / iid", "stratified t"]
    return [
        f"With the loss of LLaDA's guidelines (normalization *sample*, every t drawn by itself) one step of "
        f"{last['batch_size']} examples scatters around the trend by {reference['noise of one step (%)']} percent of the loss. "
        f"After {last['steps']} steps at {last['rate']:g} of the recipe's learning rate the loss is {end.cell('.2f')} of "
        "its own mean over the first fifth of them: "
        f"median and 5 to 95 % of {last['seeds']} seeds. Of a healthy training, laid over the band of the others, this "
        f"percentage of the windows lies outside: {reference['left-out seed outside (%)']}. "
        "What the other normalizations and stratified t do:",
        grid([*columns, "seeds"], table[[*columns, "n"]].itertuples(index=False)),
        f"The whole stage 2 of this run, {whole['validation']['step'].max():.0f} steps and one seed, shows what a longer "
        f"training does: its logged loss, each row a mean over many steps, goes {went['train']} nats, its validation loss "
        f"{went['validation']}. Read the validation loss first: its times and masks are the same every time.",
        "`medv compare-loss trainer_state.json` lays your own log over the band and names the steps at which it leaves it.",
    ]


def _repetition(tables: Tables) -> list[str]:
    steps = tables("fig10", sweep="steps")
    longest, shortest, most = steps["gen_length"].max(), steps["gen_length"].min(), steps["tokens_per_step"].max()

    def at(length: int, share: int, metric: str) -> Estimate:
        where = {"gen_length": length, "tokens_per_step": share, "metric": metric}
        return estimate(tables("fig10", sweep="steps", **where).iloc[0])

    words = {"adjacent_duplicates": "equal neighboring words", "repeated_share": "words in phrases that were said before"}
    by_steps = [f"The share of {words[m]} {moves(at(longest, most, m), at(longest, 1, m))} percent." for m in words]
    by_length = [f"The share of {words[m]} {moves(at(longest, 1, m), at(shortest, 1, m))} percent." for m in words]
    ways = tables("less_repetition", way="linear, phrase veto")
    columns = ["Z", "repeated words (%)", "repeated words (%), against linear", "adjacent duplicates (%), against linear"]
    columns += ["facts, F1 (%), against linear", "n"]
    return [
        f"There are two kinds. *More steps*: {longest} tokens, from {most} tokens a forward to one, {steps['n'].iloc[0]} "
        f"answers, {steps['seeds'].iloc[0]} sets of images. {' '.join(by_steps)}",
        f"*A shorter answer*: one token a forward, from {longest} tokens to {shortest}. {' '.join(by_length)}",
        "*At equal forwards*: a filter that defers a token which would complete a phrase said before (`--filter phrases`). "
        "Z counts the forwards; *against linear* is the difference from the plain sampler in points, paired by answer.",
        grid(columns, ways[columns].itertuples(index=False)),
    ]


def _padding(tables: Tables) -> list[str]:
    rows = []
    for arm, named in (("without padding", "not scored"), ("with padding", "hidden and scored")):
        for way in ("stop token", "chosen length", "fixed canvas"):
            row = tables("chosen_length", arm=arm, way=way).iloc[0]
            words = tables("table_chosen_length", arm=arm, way=way).iloc[0]["words"]
            rows.append([named, way, estimate(row, "error").cell(), words, estimate(row, "score").cell(), row["n"]])
    head = ["end-of-text behind the answers", "the answer ends by", "length error (%)", "words", "facts, F1 (%)", "n"]

    def error(arm: str, way: str) -> Estimate:
        return estimate(tables("chosen_length", arm=arm, way=way).iloc[0], "error")

    turn = [
        f"the length error with the {way} {moves(error('without padding', way), error('with padding', way))} percent"
        for way in ("stop token", "chosen length")
    ]
    return [
        "Both worries can be measured. Two arms continue one model of instruction tuning with the same examples for the same "
        "steps; one of them hides and scores end-of-text behind the answers. Each answer ends at a fixed length, at the first "
        "end-of-text (*stop token*), or at a length that one forward reads from the probabilities of end-of-text before the "
        "text is written (*chosen length*). The length error is the median of |words - reference| / reference.",
        grid(head, rows),
        f"From the arm without scored padding to the arm with it {', and '.join(turn)}. So ask both questions of your own "
        "model: what its padding teaches, and whether its sampler takes the first end-of-text at its word.",
    ]


def _lora(tables: Tables) -> list[str]:
    scores, costs = tables("lora_vs_full", metric="score"), tables("table_lora_vs_full").set_index("arm")
    sizes, rows = sorted(scores["size"].unique()), []
    for arm, part in scores.groupby("arm", sort=False):
        cells = [estimate(part[part["size"] == size].iloc[0]).cell() for size in sizes]
        rows.append([arm, f"{costs.at[arm, 'trained (thousands)']:.0f}", f"{costs.at[arm, 'checkpoint (MB)']:.1f}", *cells])
    head = ["arm", "trained (thousands)", "checkpoint (MB)", *(f"score, {size:.0f} training questions (%)" for size in sizes)]
    return [
        "Masked diffusion asks nothing special of LoRA: the loss is the same, and after the training the product of the thin "
        "matrices is added to the weights. `medv train vqa --lora --rank R --init MODEL --out FOLDER` does it for a LLaDA-V or "
        f"LLaDA-MedV checkpoint that `medv convert` has read. Measured: tuning on questions, {scores['n'].max():.0f} test "
        f"questions, {scores['seeds'].max():.0f} seeds; every arm has its own learning rate and the same number of steps.",
        grid(head, rows),
        "Which differences are shown, paired by question and seed, the notebook computes below its table.",
    ]


def _adaptation(tables: Tables) -> list[str]:
    arms, curve = tables("table_adaptation"), tables("adaptation")
    loss, repeats = "held-out masked cross-entropy (nats)", "adjacent duplicates (%)"
    own = tables("table_adaptation", attention="the text itself").iloc[0][repeats]
    arms = arms[arms["attention"] != "the text itself"]
    best, last = arms.iloc[0], arms.iloc[-1]
    name = ", ".join(str(best[column]) for column in ("attention", "alignment", "weights"))
    seen = tables("adaptation", arm=name).sort_values("tokens")["loss"].to_list()
    tokens = sorted(curve["tokens"].unique())
    middle = len(tokens) // 2
    columns = ["attention", "alignment", "weights", loss, repeats]
    return [
        f"Equal neighboring words in the texts after our adaptation: {best[repeats]} percent with the recipe of the lowest "
        f"cross-entropy, {own} in the held-out text ({best['seeds']:.0f} seeds). Two causes can be told apart. *The budget*: "
        f"the held-out cross-entropy of that recipe is {seen[0]:.2f} nats at the start, {seen[middle]:.2f} after "
        f"{tokens[middle]} tokens and {seen[-1]:.2f} after all {tokens[-1]}. *The recipe*: after all tokens it is {best[loss]} "
        f"with the best of the recipes and {last[loss]} with the worst. Compare the two distances.",
        grid(columns, arms[columns].itertuples(index=False)),
    ]


def _metrics(tables: Tables) -> list[str]:
    audit, columns = tables("audit"), ["where", "printed", "arithmetic", "reading"]
    found = audit[audit["check"].isin(["metric variants", "gaming", "published elsewhere"])]
    if found.empty:
        raise LookupError("audit.csv has no row on metric variants")
    row = tables("table2", **{"test set": "phantoms", "system": "before stage 3"}).iloc[0]
    return [
        "Two published scripts count a closed answer as right in different ways: one wherever the reference stands in the "
        "answer (*batch*), the other only if the answer also says yes or no (*gated*). Counted on the published annotations, "
        "before any model; a number that was recorded after tuning on the file of VQA-RAD that re-words test questions is not "
        "comparable with one of a general release:",
        grid(["cell", "printed", "counted", "reading"], found[columns].itertuples(index=False)),
        "These are counts and have no interval. Our own answers under two variants: the model that was not tuned on questions "
        f"reaches closed accuracy {row['closed_accuracy']} percent where the reference may stand anywhere in the answer, and "
        f"{row['closed_strict_accuracy']} percent by the first yes or no ({row['n closed']:.0f} questions on drawings). "
        "`medv evaluate vqa --variant` scores a file of answers either way; `medv audit` counts the ceilings, and scores "
        "answers that see no image, from the folder of a data set.",
    ]


LLAVA_MED = (("microsoft/LLaVA-Med", 28), ("microsoft/LLaVA-Med", 74), ("microsoft/LLaVA-Med", 106))
QUESTIONS = (
    Question(
        "What does a healthy loss of instruction tuning look like?",
        (("ML-GSAI/LLaDA-V", 11), ("ML-GSAI/LLaDA", 52)),
        "The loss is not stable and does not converge; is there a reference curve?",
        _loss,
        (("15_loss_band", ("table_loss_band", "loss_band")), ("11_stage2_instruction", ("stage2",))),
        "The band is of short trainings of a tiny model on drawings: compare the shape and the scatter, not the size.",
    ),
    Question(
        "Why does it repeat itself, and what helps?",
        (("ML-GSAI/LLaDA-V", 14), ("ML-GSAI/LLaDA", 59), ("ZichenWen1/DIJA", 5)),
        "Answers repeat words or whole sentences; the advice was a higher temperature or a shorter answer.",
        _repetition,
        (("33_repetition", ("fig10",)), ("34_less_repetition", ("less_repetition",))),
        f"The temperature is not measured. {DRAWN}",
    ),
    Question(
        "Should end-of-text padding be masked and supervised?",
        (("ZHZisZZ/dllm", 81),),
        "Does it teach the model to end, or does it dilute the signal and change when answers end?",
        _padding,
        (("22_choosing_the_length", ("table_chosen_length", "chosen_length")),),
        f"One training of each arm: the intervals cover the answers, not the training. {DRAWN}",
    ),
    Question(
        "Can it be tuned with LoRA?",
        (("ML-GSAI/LLaDA-V", 6),),
        "The training script has options for LoRA that LLaDA's classes do not seem to use.",
        _lora,
        (("31_lora_vs_full", ("table_lora_vs_full", "lora_vs_full")),),
        "The best rank of a tiny model says nothing about a large one, nor does its memory.",
    ),
    Question(
        "Why does a short adaptation of a causal model degenerate?",
        (("HKUNLP/DiffuLLaMA", 19), ("HKUNLP/DiffuLLaMA", 23)),
        "Multiple-choice tests come out well, but the text is commas, line breaks and repeats.",
        _adaptation,
        (("14_from_causal_to_diffusion", ("table_adaptation", "adaptation")),),
        "How many tokens are enough for billions of parameters, and what was the cause in the case that was asked about.",
    ),
    Question(
        "Why do published numbers on medical questions not reproduce?",
        (*LLAVA_MED, ("alibaba-damo-academy/MedEvalKit", 13)),
        "The same model gets very different closed accuracies; which script, which split?",
        _metrics,
        (("90_report", ("audit",)), ("12_stage3_vqa", ("table2",))),
        "Arithmetic tells what a printed number can be, not what was run. Scores given by a judge are not among the variants.",
    ),
)


def questions_page(figures: Path) -> str:
    """The page in MyST Markdown, from the CSV files in the folder `figures`; its links to notebooks are `notebooks/NAME`."""
    tables, parts, missing = Tables(Path(figures)), [], 0
    for question in QUESTIONS:
        try:
            paragraphs = question.answer(tables)
        except LookupError:  # no such file, row or column in this run
            missing += 1
            continue
        issues = [f"[{repo.partition('/')[2]} #{number}]({ISSUE.format(repo, number)})" for repo, number in question.asked]
        places = [
            f"[notebook {name[:2]}](notebooks/{name}), {' and '.join(f'`{result}`' for result in results)}"
            for name, results in question.shown
        ]
        parts += [f"## {question.title}", f"*Asked in {', '.join(issues)}:* {question.said}", *paragraphs]
        parts += [f"**What this cannot show.** {question.limit}", f"*Made by* {'; '.join(places)}."]
    left = [f"Questions that are left out because this run lacks their results: {missing}."] if missing else []
    intro = (
        "Users of LLaDA, LLaDA-V, DIJA, DiffuLLaMA, dllm, LLaVA-Med and MedEvalKit asked these in public and got no measured "
        "answer. Each has one here, with 95 % intervals in brackets and the number of answers or seeds. What the models of "
        "this run cannot answer is not listed. The numbers are read from the results when this page is built."
    )
    return "\n\n".join(["# Questions nobody answered", intro, *parts, *left]) + "\n"
