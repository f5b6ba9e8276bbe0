"""Scores of written answers: chrF and BLEU (sacrebleu), ROUGE (rouge-score), and which scores a run gets."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.train import metrics
from veneer.train.errors import RecipeError

if TYPE_CHECKING:
    from veneer.train.recipe import EvalSpec

__all__ = ["CHOICES", "answer_scores", "check_metric", "summary_scores", "translation_scores"]

#: what `eval.metric` can be where answers are texts
CHOICES = ("auto", "json", "exact", "translation", "summarization")
_PACKAGES = {"translation": ("sacrebleu", "sacrebleu"), "summarization": ("rouge_score", "rouge-score")}


def _installed(metric: str) -> bool:
    return importlib.util.find_spec(_PACKAGES[metric][0]) is not None


def check_metric(spec: EvalSpec, expected: Sequence[str]) -> None:
    """Raise a RecipeError where the metric's package is missing or the expected answers do not fit it."""
    if spec.metric in _PACKAGES and not _installed(spec.metric):
        package = _PACKAGES[spec.metric][1]
        hint = f"Run `pip install {package}` (or `pip install veneer[text]`), or set `eval.metric: exact`."
        raise RecipeError(f"{spec.metric} scores need the {package} package", key="eval.metric", hint=hint)
    if spec.metric == "json" and not metrics.answers_are_json(expected):
        hint = "Set `eval.metric: exact`, or write each expected answer as a JSON object or list."
        raise RecipeError("an expected answer in the test rows is not JSON", key="eval.metric", hint=hint)


def answer_scores(
    metric: str, expected: Sequence[str], answers: Sequence[str], written: bool = False
) -> tuple[dict[str, float], list[bool]]:
    """Scores of answers and whether each is right.

    ``metric`` is one of CHOICES; `auto` is JSON where every expected answer is, and exact match otherwise, with
    chrF, BLEU and ROUGE beside it where answers are ``written`` freely and their packages are installed.
    """
    if metric == "json" or (metric == "auto" and metrics.answers_are_json(expected)):
        return metrics.json_scores(expected, answers)
    scores, right = metrics.exact_scores(expected, answers)
    if metric == "translation" or (metric == "auto" and written and _installed("translation")):
        scores = translation_scores(expected, answers) | scores
    if metric == "summarization" or (metric == "auto" and written and _installed("summarization")):
        scores = summary_scores(expected, answers) | scores
    return scores, right


def translation_scores(expected: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Corpus chrF (Popovic 2015) and BLEU (Papineni et al. 2002) as sacrebleu computes them, as shares of 0 to 1."""
    from sacrebleu.metrics import BLEU, CHRF

    found, want = list(answers), [list(expected)]
    return {
        "chrf": CHRF().corpus_score(found, want).score / 100,
        "bleu": BLEU().corpus_score(found, want).score / 100,
    }


def summary_scores(expected: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), words stemmed, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score(want, got) for want, got in zip(expected, answers, strict=True)]
    return {kind.lower(): sum(row[kind].fmeasure for row in rows) / max(len(rows), 1) for kind in kinds}
