"""`medv evaluate` and `medv judge`: score predictions, judgements and texts; send answers to a judge."""

from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import console, print_json, print_mapping, report_errors
from medv.commands.options import AsJson, check_used
from medv.reading import visible

evaluate_app = typer.Typer(no_args_is_help=True, help="Score predictions.")


@evaluate_app.command("vqa")
@report_errors
def evaluate_vqa_command(
    references: Annotated[Path, typer.Option(help="The official annotation file, as shipped.")],
    predictions: Annotated[Path, typer.Option(help="JSON lines with `text` or `answer`.")],
    variant: Annotated[str, typer.Option(help="batch (the published results) or gated (requires a yes or no).")] = "batch",
    as_json: AsJson = False,
) -> None:
    """Closed accuracy and open recall, exactly as the official evaluation computes them, and stricter measures."""
    from medv.evaluation.pairing import pair, read_predictions, read_references
    from medv.evaluation.vqa import evaluate_vqa

    wanted, given = pair(read_references(references), read_predictions(predictions))
    print_mapping(f"VQA, {variant} variant (percent)", evaluate_vqa(wanted, given, variant=variant).to_dict(), as_json)


@evaluate_app.command("judge")
@report_errors
def evaluate_judge_command(
    judgements: Annotated[Path, typer.Option(help="JSON lines with question_id, type, domain and the judge's `result`.")],
    as_json: AsJson = False,
) -> None:
    """Relative scores of a file of judgements, overall, by question type and by domain; unreadable lines are listed."""
    from medv.evaluation.judge import read_judgements

    _print_judged(read_judgements(judgements).to_dict(), as_json)


@evaluate_app.command("text")
@report_errors
def evaluate_text_command(
    answers: Annotated[Path, typer.Option(help="JSON lines with `text`, and `seconds`, `forwards`, `tokens` if known.")],
    asked_words: Annotated[int | None, typer.Option(min=1, help="Requested length in words; default: the rows' own.")] = None,
    marked: Annotated[bool, typer.Option("--marked", help="Also print each answer with repeated spans in [].")] = False,
    as_json: AsJson = False,
) -> None:
    """Words, seconds and forwards per query, length error and repetition of a file of answers."""
    from medv.evaluation.text import mark_repeats, measure_texts, read_answers

    check_used(not as_json, "beside --json", marked=marked or None)
    rows = read_answers(answers)
    print_mapping(f"{answers.name}: means per answer", measure_texts(rows, asked_words=asked_words), as_json)
    for row in rows if marked else ():
        console.print(f"\n{mark_repeats(row.answer())}")


@report_errors
def judge(
    questions: Annotated[Path, typer.Option(help="The question file of qa50, as shipped.")],
    answers: Annotated[Path, typer.Option(help="JSON lines with question_id and text, as `medv generate` writes.")],
    out: Annotated[Path, typer.Option(help="Judgements as JSON lines, one for each question.")],
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint.")] = "https://api.openai.com/v1",
    judge_model: Annotated[str, typer.Option(help="Model that judges.")] = "gpt-4.1-mini",
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts for each question before it is left unjudged.")] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds for one request in all.")] = 120.0,
    temperature: Annotated[str, typer.Option(help="Temperature of the judge; none leaves it out.")] = "0",
    cache: Annotated[Path | None, typer.Option(help="Folder of cached replies; default: judge_cache beside --out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send answers to a judge; resumable. The key is read from MEDV_JUDGE_KEY or OPENAI_API_KEY and written nowhere."""
    from medv.evaluation.judge_client import Endpoint, key_from_environment
    from medv.evaluation.judging import judge_file

    try:
        degree = None if temperature == "none" else float(temperature)
    except ValueError:
        raise ValueError(f"--temperature {temperature!r} is neither a number nor none") from None
    endpoint = Endpoint(base_url, judge_model, key_from_environment(), degree, concurrency, attempts, timeout)
    scores = judge_file(questions, answers, out, endpoint, cache=cache)
    asked = "left out" if degree is None else f"{degree:g}"
    _print_judged(scores.to_dict(), as_json, f"; judge {judge_model}, temperature {asked}")
    if scores.stopped:
        raise ValueError(
            f"{scores.stopped}; {len(scores.judged)} of {len(scores.judged) + len(scores.unjudged)} questions are judged and "
            f"kept in {out}: mend that, and the command goes on"
        )
    if scores.unjudged:
        raise typer.Exit(1)


def _print_judged(scores: dict, as_json: bool, by: str = "") -> None:
    if as_json:
        print_json(scores)
        return
    counts = scores["counts"]
    groups = {f"{group} ({counts[group]} questions)": scores[group] for group in counts if counts[group]}
    print_mapping(f"score in percent of the reference's{by}", groups, as_json=False)
    named: dict[str, list[str]] = {}
    for item in scores["unjudged"]:
        named.setdefault(item["reason"], []).append(item["question_id"])
    for reason, names in named.items():
        console.print(visible(f"unjudged {', '.join(names)}: {reason}"), soft_wrap=True)
