"""`medv evaluate` and `medv judge`: score predictions, judgements and texts; have answers judged."""

from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import AsJson, console, in_words, print_json, print_mapping
from medv.reading import visible

evaluate_app = typer.Typer(no_args_is_help=True, help="Score predictions.")


@evaluate_app.command("vqa")
@in_words
def evaluate_vqa_command(
    references: Annotated[Path, typer.Option(help="The official annotation file, as shipped.")],
    predictions: Annotated[Path, typer.Option(help="JSON lines with `text` or `answer`.")],
    variant: Annotated[
        str, typer.Option(help="batch (the published results) or gated (asks for a yes or no).")
    ] = "batch",
    as_json: AsJson = False,
) -> None:
    """Closed accuracy and open recall, exactly as the official evaluation computes them, and stricter values beside them."""
    from medv.evaluation.vqa import evaluate_vqa, pair, read_predictions, read_references

    wanted, given = pair(read_references(references), read_predictions(predictions))
    print_mapping(f"VQA, {variant} variant (percent)", evaluate_vqa(wanted, given, variant=variant).to_dict(), as_json)


@evaluate_app.command("judge")
@in_words
def evaluate_judge_command(
    judgements: Annotated[
        Path, typer.Option(help="JSON lines with question_id, type, domain and the judge's `result`.")
    ],
    as_json: AsJson = False,
) -> None:
    """Relative scores of a file of judgements, overall, by question type and by domain; what cannot be read is listed."""
    from medv.evaluation.judge import read_judgements

    _print_judged(read_judgements(judgements).to_dict(), as_json)


@evaluate_app.command("text")
@in_words
def evaluate_text_command(
    answers: Annotated[
        Path, typer.Option(help="JSON lines with `text`, and `seconds`, `forwards`, `tokens` if known.")
    ],
    asked_words: Annotated[
        int | None, typer.Option(min=1, help="The length asked for; default: the rows' own.")
    ] = None,
    marked: Annotated[bool, typer.Option("--marked", help="Also print each answer, its repeated spans in [].")] = False,
    as_json: AsJson = False,
) -> None:
    """Words, seconds and forwards per query, length error and repetition of a file of answers."""
    from medv.evaluation.repetition import mark_repeats
    from medv.evaluation.text import answer_text, measure_texts, read_answers

    rows = read_answers(answers)
    print_mapping(f"{answers.name}: means per answer", measure_texts(rows, asked_words=asked_words), as_json)
    for row in rows if marked and not as_json else ():
        console.print(f"\n{mark_repeats(answer_text(row))}")


@in_words
def judge(
    questions: Annotated[Path, typer.Option(help="The question file of qa50, as shipped.")],
    answers: Annotated[Path, typer.Option(help="JSON lines with question_id and text, as `medv generate` writes.")],
    out: Annotated[Path, typer.Option(help="Judgements as JSON lines, one for each question.")],
    base_url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint.")] = "https://api.openai.com/v1",
    judge_model: Annotated[str, typer.Option(help="The model that judges.")] = "gpt-4.1-mini",
    concurrency: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, help="Of each question, before it is left unjudged.")] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the replies; default: judge_cache beside --out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have answers judged; resumable. The key is read from MEDV_JUDGE_KEY or OPENAI_API_KEY and written nowhere."""
    from medv.evaluation.judging import Endpoint, judge_file, key_from_environment

    key = key_from_environment()
    endpoint = Endpoint(base_url, judge_model, key, concurrency=concurrency, attempts=attempts, timeout=timeout)
    scores = judge_file(questions, answers, out, endpoint, cache=cache).to_dict()
    _print_judged(scores, as_json)
    if scores["unjudged"]:
        raise typer.Exit(1)


def _print_judged(scores: dict, as_json: bool) -> None:
    if as_json:
        print_json(scores)
        return
    counts, unjudged = scores.pop("counts"), scores.pop("unjudged")
    lines = {f"{group} ({counts[group]} questions)": value for group, value in scores.items() if counts[group]}
    print_mapping("score in percent of the reference's", lines, as_json=False)
    for item in unjudged:
        console.print(visible(f"unjudged {item['question_id']}: {item['reason']}"), soft_wrap=True)
