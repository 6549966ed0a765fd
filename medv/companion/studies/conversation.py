"""Open conversation (notebook 20): questions and requests for descriptions, answered by several models and scored by facts.

The benchmark has the paper's proportions, 143 conversation questions to 50 descriptions. The findings score of an answer is F1
of precision (share of its facts that are true of the image) and recall (share of the reference's facts that it states). No
language model judges, and style does not count. Real questions are those of qa50, and a judge scores their answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medv import paper
from medv.artifacts import read_jsonl, write_text
from medv.companion.studies.generation import PLAIN, canvas_of
from medv.companion.studies.node import Node
from medv.companion.studies.requests import Judge, requests_for
from medv.companion.studies.summaries import estimates
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example
from medv.data.rows import answers_to as rows_for
from medv.evaluation import judge
from medv.evaluation.answering import Answerer
from medv.evaluation.baselines import BASELINES, availability
from medv.evaluation.benchmark import answer_file
from medv.intervals import Estimate, own_items
from medv.phantoms.facts import stated_facts
from medv.phantoms.scene import DOMAINS
from medv.phantoms.sets import description_set, instruct_set
from medv.profiles import Profile
from medv.training.examples import PHANTOMS, TrainingData

NODE = Node(
    "open_conversation",
    "20_open_conversation.ipynb",
    "Open conversation, and the baseline models",
    needs=("models/stage1", "models/stage2", "models/twin"),
    makes=("answers/open_conversation",),
    results=("table1", "table7", "fig01", "fig02", "fig06", "fig07", "fig08"),
    reads=("qa50",),
    may_read=("general", "judge", "baselines"),
    heavy=True,
)

CONVERSATIONS, DESCRIPTIONS = 143, 50
GROUPS = ("conversation", "description", *DOMAINS, "overall")
TWIN = "autoregressive twin"
COLUMN = {"ct": "ct_scan"}
"""Our domain -> the paper's column, where they differ."""
DOMAIN = {theirs: ours for ours, theirs in COLUMN.items()}


def questions(profile: Profile, source: TrainingData = PHANTOMS) -> list[Example]:
    """The benchmark on test phantoms: open questions from held-out dialogues, then descriptions; or a real one (qa50).

    At most 193, in the paper's proportion; a smaller profile takes fewer. A question is kept if its reference states a fact.
    """
    if source.name != PHANTOMS.name:
        types = {"detailed_description": "description"}
        real = requests_for(profile, source)
        return [replace(ex, meta=ex.meta | {"type": types.get(ex.meta["type"], ex.meta["type"])}) for ex in real]
    share = min(1.0, 2 * profile.evaluation_descriptions / (CONVERSATIONS + DESCRIPTIONS))
    wanted, described = max(3, round(share * CONVERSATIONS)), max(2, round(share * DESCRIPTIONS))
    size, found = profile.model.image_size, []
    for example in instruct_set("test", 8 * wanted, image_size=size):
        turns = example.turns[-2:]  # an answer may lean on the image alone: questions of a dialogue do not refer back
        if example.meta["kind"] == "dialogue" and stated_facts(turns[1].text):
            found.append(replace(example, turns=turns, meta={**example.meta, "type": "conversation"}))
    descriptions = description_set("test", described, image_size=size)
    return found[:wanted] + [replace(ex, meta={**ex.meta, "type": "description"}) for ex in descriptions]


def findings_score(text: str, example: Example) -> float:
    """The findings score of one answer, 0..100; NaN where nobody listed the facts of the image."""
    if "scene" not in example.meta:
        return np.nan
    stated, wanted = stated_facts(text), stated_facts(example.answer)
    precision = len(stated & example.meta["scene"].facts()) / max(len(stated), 1)
    recall = len(stated & wanted) / max(len(wanted), 1)
    return 200.0 * precision * recall / (precision + recall) if precision + recall else 0.0


def systems(models: Mapping[str, Path], twin: Path | None) -> dict[str, tuple[Path, bool]]:
    """Systems by name: (model folder, whether questions get a short canvas). `models`: name -> diffusion model folder."""
    chosen = {name: (folder, False) for name, folder in models.items()}
    last = next(reversed(models))
    chosen[f"{last}, canvas to fit"] = (models[last], True)
    return chosen | ({} if twin is None else {TWIN: (twin, False)})


def answer_all(
    profile: Profile,
    chosen: Mapping[str, tuple[Path, bool]],
    asked: Sequence[Example],
    folder: Path,
    *,
    judge: Judge | None = None,
    given: Mapping[str, Path] | None = None,
) -> pd.DataFrame:
    """Every system answers every question: system, id, type, domain, question, reference, text, score, words, seconds.

    The canvas is that of the paper's main setting, one token a forward; a system with a canvas to fit gets one block of it for
    conversation. Answers that `folder` holds are kept. judge: scores real answers. given: systems by the file of their answers.
    """
    if same := [name for name in given or {} if name in chosen]:
        raise ValueError(f"the baseline {same[0]!r} has the name of a model of this run: rename it in the configuration file")
    length, block = canvas_of(profile)
    sizes, spec = {False: (length, block, length), True: (block, block, block)}, profile.describe
    rows = []
    parts = {kind: [example for example in asked if example.meta["type"] == kind] for kind in ("conversation", "description")}
    answerers: dict[Path, Answerer] = {}
    for place, name in enumerate([*chosen, *(given or {})]):
        for kind, part in parts.items():
            out = folder / f"{place:02d}-{kind}.jsonl"
            if name in chosen:
                model, fits = chosen[name]
                if model not in answerers:
                    answerers = {model: Answerer.load(model, dtype=profile.dtype)}  # one at a time
                own = (PLAIN if name == TWIN else spec).sized(*sizes[fits and kind == "conversation"])
                answer_file(part, answerers[model], sampler_config(own), out, batch_size=spec.batch_size, quiet=True)
                answers = read_jsonl(out)
            else:
                answers = given_answers(given[name], part, out, among=asked)
            scores = {} if judge is None else judge(out, out.with_suffix(".judged.jsonl"))
            for example, answer in zip(part, answers, strict=True):
                text = answer["text"]
                score = scores.get(example.id, np.nan) if judge else findings_score(text, example)
                domain = DOMAIN.get(example.domain, example.domain)
                row = {"system": name, "id": f"{example.id}/{kind}", "type": kind, "domain": domain}
                row |= {"question": example.question, "reference": example.answer, "text": text}
                rows.append(row | {"score": score, "words": len(text.split()), "seconds": answer.get("seconds", np.nan)})
    return pd.DataFrame(rows)


def given_answers(file: Path, asked: Sequence[Example], out: Path, *, among: Sequence[Example] = ()) -> list[dict[str, Any]]:
    """Copy a file's answers to these questions to `out` and return them; answers without ids are those `among` all questions
    (default: `asked`) in order. Raises ValueError for a question without an answer, and as `medv.data.rows.answers_to` does.
    """
    given = rows_for(dict.fromkeys(example.id for example in among or asked), file)
    if missing := [example.id for example in asked if example.id not in given]:
        raise ValueError(f"{file} has no answer to question {missing[0]} ({len(missing)} of {len(asked)} are missing)")
    answers = []
    for example in asked:
        row = given[example.id]
        known = {key: amount for key in ("seconds", "forwards", "tokens") if (amount := row.amount(key)) is not None}
        answer = {"question_id": example.id, "question": example.question, "text": row.answer(), "finish_reason": "given"}
        answers.append(answer | known)
    write_text(out, "".join(json.dumps(answer) + "\n" for answer in answers))
    return answers


def score_name(asked: Sequence[Example]) -> str:
    """The name of the column `score` for these questions."""
    return "findings score" if all("scene" in example.meta for example in asked) else "judge's score"


def wrong_image(items: pd.DataFrame, asked: Sequence[Example], system: str) -> pd.DataFrame:
    """Each answer of a system scored against the next image's facts, by type; empty for real questions."""
    if score_name(asked) != "findings score":
        return items[:0]
    part = items[items["system"] == system].copy()
    by_id = {f"{example.id}/{example.meta['type']}": example for example in asked}
    for _, group in part.groupby("type"):
        part.loc[group.index, "text"] = np.roll(group["text"].to_numpy(), -1)
    part["score"] = [findings_score(row.text, by_id[row.id]) for row in part.itertuples()]
    return part.assign(system=f"{system}, answers of other images", words=np.nan, seconds=np.nan)


def scores(items: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval per system and group of GROUPS: system, group, value, low, high, n."""
    found = {}
    for system, part in items.groupby("system", sort=False):
        for group in GROUPS:
            values = part[(part["type"] == group) | (part["domain"] == group) | (group == "overall")]["score"]
            if len(values):
                found[system, group] = own_items(values.to_numpy(float)[None])
    return estimates(found, ("system", "group")).drop(columns="seeds")


def judged_scores(files: Mapping[str, str | Path]) -> pd.DataFrame:
    """`scores` of the real benchmark; files: system -> a file of `medv judge`. ValueError where nothing is judged."""
    names = {"detailed_description": "description", **DOMAIN}
    found = {}
    for system, file in files.items():
        judged = judge.read_judgements(file)
        if not judged.judged:
            raise ValueError(f"{file} holds no judged answer of {system!r}: make it with `medv judge`")
        for group in judge.GROUPS:
            values = judged.relative(group)
            if len(values):
                found[system, names.get(group, group)] = own_items(np.asarray(values, dtype=float)[None])
    return estimates(found, ("system", "group")).drop(columns="seeds")


def table1(items: pd.DataFrame, judged: pd.DataFrame | None = None, *, score: str = "findings score") -> pd.DataFrame:
    """Table 1, ours above the paper's. judged: rows of `judged_scores`. score: the name of the score of the items."""
    found = scores(items)
    ours = _cells(found, f"ours: {score}")
    ours.insert(1, "words", items.groupby("system")["words"].mean().round(1))
    if judged is not None:
        counts = judged[judged["group"] == "overall"].set_index("system")["n"]
        named = judged.assign(system=[f"{system}, n = {counts[system]}" for system in judged["system"]])
        ours = pd.concat([ours, _cells(named, "ours: judge's score of real questions")])
    ends = found.groupby("group")["n"].agg(["min", "max"])  # of the systems: a judge may leave out answers of some
    counts = {row.Index: f"{row.min}" if row.min == row.max else f"{row.min} to {row.max}" for row in ends.itertuples()}
    head = pd.DataFrame([{"source": "ours: questions", "system": "", **counts}])
    printed = paper.table("table1").rename(columns={"model": "system", "ct_scan": "ct"})
    printed = printed.assign(source="paper: GPT score", **{g: printed[g].map("{:.1f}".format) for g in GROUPS})
    table = pd.concat([ours.reset_index(), head, printed], ignore_index=True)
    return table[["source", "system", "words", *GROUPS]].rename(columns=COLUMN)


def _cells(found: pd.DataFrame, source: str) -> pd.DataFrame:
    """A row per system, in their order: source, and "value [low, high]" per group."""
    cells = found.assign(cell=[Estimate.of(row).cell(ends=".0f") for row in found.itertuples()])
    wide = cells.pivot(index="system", columns="group", values="cell")
    wide = wide.reindex(index=found["system"].unique(), columns=GROUPS)
    wide.insert(0, "source", source)
    return wide


def table7() -> pd.DataFrame:
    """Table 7 with the id of each checkpoint, where one is published under a known id, and whether it can be asked here."""
    printed = paper.table("table7")
    ids = printed["model"].map(BASELINES)
    found = [availability(checkpoint if isinstance(checkpoint, str) else None) for checkpoint in ids]
    return printed.assign(checkpoint=ids, **{"on this machine": found})


def chosen_questions(asked: Sequence[Example], count: int = 4) -> list[Example]:
    """Figures 2, 6, 7 and 8: the first description of one domain, the first question of the next, or else of any domain."""
    chosen = []
    for place, domain in enumerate(DOMAINS[:count]):
        kind = ("description", "conversation")[place % 2]
        of_type = [example for example in asked if example.meta["type"] == kind] or asked
        names = (domain, COLUMN.get(domain, domain))
        chosen.append(next((ex for ex in of_type if ex.domain in names), of_type[0]))
    return chosen


def answers_to(items: pd.DataFrame, example: Example, names: Sequence[str]) -> pd.DataFrame:
    """The different answers to one question, and the reference: name, id, question, text, score, words."""
    part = items[items["id"] == f"{example.id}/{example.meta['type']}"].set_index("system").loc[list(names)].reset_index()
    rows = part.drop_duplicates("text").rename(columns={"system": "name"})
    rows = rows[["name", "id", "question", "text", "score", "words"]]
    reference = {"name": "reference", "text": example.answer, "score": findings_score(example.answer, example)}
    reference |= {"id": rows["id"].iloc[0], "question": example.question, "words": len(example.answer.split())}
    return pd.concat([rows, pd.DataFrame([reference])], ignore_index=True)
