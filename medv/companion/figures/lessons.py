"""Computations of the tutorials (notebooks 00, 01, 02, 12): phantoms, questions, counts, masks, the noise of the loss."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medv import paper
from medv.companion.audit.check import check_dataset
from medv.companion.audit.controls import majority_answers
from medv.companion.figures.plots import PALETTE, drawing
from medv.companion.figures.words import tokens_of
from medv.data.example import Example, Turn
from medv.data.readers import DATASETS
from medv.diffusion.corruption import corrupt, draw_noise
from medv.diffusion.loss import NORMALIZATIONS
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import evaluate_vqa
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.phantoms.pictures import phantom_image, phantom_scene
from medv.phantoms.questions import ask, kinds_of
from medv.phantoms.scene import DOMAINS, FINDINGS, NORMAL, Scene
from medv.phantoms.wording import caption
from medv.training.collate import Collator, Encoder

# --- Data (notebooks 00, 01) ---


def phantom_gallery(size: int = 128) -> tuple[list, list[str], pd.DataFrame]:
    """One test phantom of each domain and finding, its caption, and both as a frame with the facts; domain by domain."""
    scenes = [
        phantom_scene("test", index, domain=domain, finding=finding)
        for index, domain in enumerate(DOMAINS)
        for finding in (NORMAL, *FINDINGS[domain])
    ]
    captions = [caption(scene, np.random.default_rng([place, 0x9A11])) for place, scene in enumerate(scenes)]
    facts = [dict(sorted(scene.facts())) | {"caption": said} for scene, said in zip(scenes, captions, strict=True)]
    return [phantom_image(scene, size) for scene in scenes], captions, pd.DataFrame(facts)


def questions_about(scene: Scene, *, image_size: int = 64, seed: int = 0) -> list[Example]:
    """One question of every kind that the scene has an answer to, open and closed in turn, in the words of stage 3."""
    rng = np.random.default_rng([seed, 0xA5C])
    image, examples = partial(phantom_image, scene, image_size), []
    for place, kind in enumerate(kinds_of(scene)):
        question = ask(scene, kind, ("open", "closed")[place % 2], rng)
        turns = (Turn("user", question.text), Turn("assistant", question.answer))
        meta = {"scene": scene, "kind": question.kind}
        examples.append(Example(f"tutorial/{place}", image, turns, question.form.upper(), meta))
    return examples


def answer_table(examples: Sequence[Example], answers: Sequence[str]) -> pd.DataFrame:
    """Question, answer, truth and, where there are answer types, whether the answer is right (open: all words said)."""
    questions, truths = [example.question for example in examples], [example.answer for example in examples]
    table = pd.DataFrame({"question": questions, "answer": answers, "truth": truths})
    if any(example.answer_type is None for example in examples):
        return table
    items = evaluate_vqa([Reference.of(example) for example in examples], answers).items
    right = [bool(item.strict_hit) if item.answer_type == "CLOSED" else item.set_recall == 1 for item in items]
    return table.assign(right=right)


def question_balance(train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Per kind of question the share of yes and the look-up's score: accuracy of closed, recall of open ones, in percent."""
    blind = majority_answers(train, test).lookup
    items = evaluate_vqa([Reference.of(example) for example in test], blind).items
    rows = []
    for example, item in zip(test, items, strict=True):
        closed = example.answer_type == "CLOSED"
        scores = {"yes": float(example.answer == "yes"), "blind": item.hit} if closed else {"yes": np.nan, "blind": item.recall}
        rows.append({"kind": example.meta["kind"], "form": example.answer_type.lower()} | scores)
    frame = pd.DataFrame(rows)
    frame = pd.concat([frame, frame.assign(kind="all")])
    grouped = frame.groupby(["form", "kind"], sort=False)
    table = grouped.agg(n=("blind", "size"), yes=("yes", "mean"), blind=("blind", "mean")).reset_index()
    table[["yes", "blind"]] *= 100
    return table.rename(columns={"yes": "answer is yes (%)", "blind": "question-only look-up (%)"})


def table8(folders: Mapping[str, str | Path | None], phantoms: Mapping[str, Sequence[Example]]) -> pd.DataFrame:
    """Table 8 by (data, split): the paper's counts, ours where `folders` has one, a remark. `phantoms`: split -> questions."""
    published = paper.table("table8").set_index("detail")
    quantities, rows = list(published.index), []
    for column in published.columns:
        name, _, split = column.rpartition("_")
        row = {"data": name, "split": split} | {f"{q} (paper)": int(published.at[q, column]) for q in quantities}
        split = {"val": "validation"}.get(split, split)
        if folders.get(name) is None:
            known = [f"{q}: {why}" for q in quantities if (why := DATASETS[name].misprints.get((split, q), (0, ""))[1])]
            rows.append(row | {"remark": "; ".join(["not counted in this run", *known])})
            continue
        counts = [count for count in check_dataset(name, folders[name]).counts if count.split == split]
        row |= {f"{count.quantity} (ours)": count.counted for count in counts if count.quantity in quantities}
        verdicts = {f"{count.quantity}: {count.note or count.verdict}" for count in counts if "mis" in count.verdict}
        remark = "; ".join(sorted(verdicts)) or ("equal" if counts else "this split is not in the folder")
        rows.append(row | {"remark": remark})
    for split, examples in phantoms.items():
        closed = sum(example.answer_type == "CLOSED" for example in examples)
        counts = (len({e.image.args for e in examples}), len(examples), closed, len(examples) - closed)
        ours = {f"{q} (ours)": count for q, count in zip(quantities, counts, strict=True)}
        rows.append({"data": "phantoms", "split": split} | ours | {"remark": "ours alone, one image per question"})
    order = ["data", "split", *(f"{q} ({side})" for q in quantities for side in ("ours", "paper")), "remark"]
    return pd.DataFrame(rows).reindex(columns=order).convert_dtypes()


# --- Noise and loss (notebook 02) ---


def masked_answer(
    processor: MedVProcessor, question: str, answer: str, times: Sequence[float], *, seed: int = 0, draw: int = 0
) -> tuple[list[int], int, list[list[bool]]]:
    """Question and answer as ids, the length of the question, and which tokens are masked at each time (Eq. 1).

    The question never masks. The uniforms are the same at all times, so a token that is masked at t stays so at later times.
    """
    prompt, response = (processor.tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
    ids = torch.tensor([prompt + response])  # [1, T]
    targets = torch.tensor([[False] * len(prompt) + [True] * len(response)])
    _, u = draw_noise(seed, draw, [0], ids.shape[1])
    mask = processor.special.mask
    masked = [corrupt(ids, targets, torch.tensor([float(t)]), u, mask).masked[0].tolist() for t in times]
    return prompt + response, len(prompt), masked


def corruption_rows(
    processor: MedVProcessor, question: str, answer: str, times: Sequence[float], *, seed: int = 0
) -> tuple[list[tuple[str, list[str], list[bool]]], pd.DataFrame]:
    """`masked_answer` as rows of `figures.words.masked_strip`, and as a frame: t, position, part, token, masked."""
    ids, width, masked = masked_answer(processor, question, answer, times, seed=seed)
    tokens = tokens_of(processor, ids)
    parts = ["prompt"] * width + ["response"] * (len(ids) - width)
    shared = {"position": range(len(ids)), "part": parts, "token": tokens}
    frames = [pd.DataFrame({"t": float(t)} | shared | {"masked": row}) for t, row in zip(times, masked, strict=True)]
    rows = [(f"t = {t:g}", tokens, row) for t, row in zip(times, masked, strict=True)]
    return rows, pd.concat(frames, ignore_index=True)


@torch.inference_mode()
def loss_noise(
    model: MedVForMaskedDiffusion, processor: MedVProcessor, examples: Sequence[Example], *, draws: int, seed: int = 0
) -> pd.DataFrame:
    """The loss of one batch under `draws` draws of the noise: normalization, times ("iid", "stratified"), draw, loss."""
    encode = Encoder(processor, loss_tokens="response", max_length=8192)
    collate = Collator(processor.special, padding="none")
    items, own = [encode(example) for example in examples], model.config.loss_normalization
    rows = []
    for draw in range(draws):
        for times in ("iid", "stratified"):
            strata = [(k, len(items)) if times == "stratified" else (0, 1) for k in range(len(items))]
            batch = collate([item | {"noise": (seed, draw, k), "stratum": strata[k]} for k, item in enumerate(items)])
            for name in NORMALIZATIONS:
                model.config.loss_normalization = name
                loss = float(model(**{key: value.to(model.device) for key, value in batch.items()}).loss)
                rows.append({"normalization": name, "times": times, "draw": draw, "loss": loss})
    model.config.loss_normalization = own
    return pd.DataFrame(rows)


def loss_spread(noise: pd.DataFrame) -> pd.DataFrame:
    """Mean and variance of `loss_noise` per normalization, and how many times smaller stratified times make the variance."""
    table = noise.pivot_table(index="normalization", columns="times", values="loss", aggfunc=["mean", "var"], sort=False)
    table.columns = [f"{'variance' if what == 'var' else what}, {times}" for what, times in table.columns]
    table["variance ratio"] = table["variance, iid"] / table["variance, stratified"]
    return table.reset_index()


def loss_weights_figure(noise: pd.DataFrame, eps: float) -> tuple[Figure, pd.DataFrame]:
    """Left: the weight 1 / p against t. Right: the losses of one batch under many draws, iid beside stratified times."""
    t = np.linspace(0, 1, 201)
    weight = 1 / ((1 - eps) * t + eps)
    names = list(dict.fromkeys(noise["normalization"]))
    with drawing(10.5, 3.6, ncols=2, gridspec_kw={"width_ratios": [1, 1.5]}) as (fig, (left, right)):
        left.plot(t, weight, color=PALETTE[0], lw=1.8)
        left.set(yscale="log", xlabel="time t", ylabel="weight 1 / p of a masked token", title="Few masks, large weight")
        for place, (name, times) in enumerate((n, s) for n in names for s in ("iid", "stratified")):
            losses = noise[(noise["normalization"] == name) & (noise["times"] == times)]["loss"]
            color = PALETTE[1] if times == "iid" else PALETTE[2]
            spread = np.linspace(-0.22, 0.22, len(losses))
            label = f"{times} t" if place < 2 else None
            right.scatter(place + spread, losses, s=10, color=color, alpha=0.7, lw=0, label=label)
        right.set_xticks([2 * k + 0.5 for k in range(len(names))], names)
        right.set(xlabel="normalization", ylabel="loss of the same batch", title="One batch, many draws of the noise")
        right.legend()
    curve = pd.DataFrame({"panel": "weight", "t": t, "weight": weight})
    return fig, pd.concat([curve, noise.assign(panel="loss")], ignore_index=True)


# --- Stage 3 (notebook 12) ---


def control_bars(summary: pd.DataFrame, test: str) -> pd.DataFrame:
    """Rows of `figures.plots.accuracy_bars` for one test set, from `medv.companion.studies.training_stages.scores`."""
    rows = summary[summary["test"] == test].rename(columns={"condition": "system"})
    names = {"closed_accuracy": "closed accuracy", "closed_strict_accuracy": "closed accuracy, strict"}
    names["open_recall"] = "open recall"
    return pd.concat([rows[rows["metric"] == metric].assign(metric=name) for metric, name in names.items()])


def chosen_answers(items: pd.DataFrame, test: str, *, condition: str = "after stage 3", count: int = 10) -> pd.DataFrame:
    """Answers of the first seed to look at: as many wrong as right where there are enough, of many kinds, in test order."""
    rows = items[(items["test"] == test) & (items["condition"] == condition) & (items["seed"] == items["seed"].min())]
    rows = rows.assign(right=(rows["closed_strict_accuracy"].fillna(rows["open_set_recall"]) == 100))
    nth = rows.groupby(["right", rows["kind"].fillna("any"), "answer_type"]).cumcount()
    rows = rows.assign(nth=nth).sort_values(["nth", "id"], kind="stable")
    wrong = rows[~rows["right"]].head(count // 2)
    right = rows[rows["right"]].head(count - len(wrong))
    wrong = rows[~rows["right"]].head(count - len(right))
    columns = ["id", "kind", "question", "reference", "answer", "right"]
    return pd.concat([right, wrong])[columns].reset_index(drop=True)
