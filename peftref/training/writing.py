"""How near written texts come to their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftref.errors import TrainingError

__all__ = ["WRITTEN", "written_scores"]

WRITTEN = ("bleu", "chrf", "rouge_l", "exact_match")
_MISSING = "metrics of written texts need more packages: pip install 'peftref[generation]'"


def written_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return BLEU and chrF of all texts, ROUGE-L and the share of exact matches, from 0 to 1.

    BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacreBLEU's, ROUGE-L (Lin 2004) is the
    mean F1 of rouge-score with stemming; with several references, the best counts.

    Args:
        texts: what was written.
        references: one or more for each text; they may differ in number.

    Raises:
        TrainingError: sacrebleu or rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise TrainingError(_MISSING) from error
    # sacreBLEU wants a list of first references, one of second ones, ...; None where there is none.
    most = max(map(len, references))
    streams: Any = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    said = list(texts)
    bleu, chrf = BLEU().corpus_score(said, streams), CHRF().corpus_score(said, streams)
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(texts, references, strict=True))
    best = [rouge.score_multi(list(wanted), text)["rougeL"].fmeasure for text, wanted in pairs]
    exact = [any(_plain(text) == _plain(one) for one in wanted) for text, wanted in pairs]
    return {
        "bleu": bleu.score / 100, "chrf": chrf.score / 100, "rouge_l": sum(best) / len(best),
        "exact_match": sum(exact) / len(exact),
    }


def _plain(text: str) -> str:
    return " ".join(text.split())
