"""A linear model of a text's words: what an encoder's classifier has to beat, on the very split that it has."""

from ml.data.config import DataConfig
from ml.data.sources import Source, is_heldout
from ml.errors import UserError


def bag_of_words(data: DataConfig) -> dict[str, float]:
    """Accuracy on the held-out texts of ``data``, and how many there are.

    ``majority`` is that of the commonest label, for comparison.

    Raises:
      UserError: the data has no labels, one side no texts, or scikit-learn is missing.
    """
    if data.labelled is None:
        raise UserError("config.data.labelled is unset; give an experiment of classification")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise UserError("scikit-learn is missing; run `pip install scikit-learn`") from error

    texts: dict[bool, list[str]] = {True: [], False: []}
    labels: dict[bool, list[str]] = {True: [], False: []}
    for index, source in enumerate(data.sources):
        for document in Source(source, f"config.data.sources[{index}]").documents():
            if document.label in data.labelled.labels:
                side = is_heldout(document.key, data.heldout_fraction)
                texts[side].append(document.text)
                labels[side].append(document.label)
    if not labels[True] or len(set(labels[False])) < 2:
        raise UserError(
            "config.data: too few labelled texts on one side of the split; see config.data.heldout_fraction"
        )
    # The best of counts and TF-IDF, with C of 1, 10 and 30, on configs/bert/classify.py's texts.
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=30.0, max_iter=300))
    model.fit(texts[False], labels[False])
    commonest = max(set(labels[False]), key=labels[False].count)
    return {
        "accuracy": float(model.score(texts[True], labels[True])),
        "majority": labels[True].count(commonest) / len(labels[True]),
        "train_texts": len(labels[False]),
        "heldout_texts": len(labels[True]),
    }
