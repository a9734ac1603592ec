"""What a bag of words reaches on a classification experiment's data: the number that an encoder has to beat."""

import json

import app
import config_flag

_USAGE = """
Classifies the held-out texts of an experiment by a linear model of their words (TF-IDF and logistic regression of
scikit-learn), with the very split that training has; prints one JSON object.

  python scripts/bag_of_words.py --config=configs/bert/classify.py:runs/bert_tiny
"""

if __name__ == "__main__":
    config_flag.define()


def main() -> None:
    """Reads the flags, fits, prints."""
    from ml.config import build
    from ml.errors import UserError
    from ml.train.config import ExperimentConfig

    config = build(ExperimentConfig, config_flag.load().to_dict())
    if config.data.labelled is None:
        raise UserError("--config: its config.data.labelled is unset; give an experiment of classification")
    print(json.dumps(bag_of_words(config.data)))


def bag_of_words(data) -> dict[str, float]:
    """Accuracy on the held-out texts of ``data``, a `ml.data.DataConfig`, and how many there are.

    ``majority`` is that of the commonest label, for comparison.

    Raises:
      UserError: scikit-learn is missing, or one side has no texts.
    """
    from ml.data.sources import Source, is_heldout
    from ml.errors import UserError

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
    # Words as they are, two in a row too: better here than words alone, and the strongest of the plain settings tried.
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=30.0, max_iter=1000)
    )
    model.fit(texts[False], labels[False])
    commonest = max(set(labels[False]), key=labels[False].count)
    return {
        "accuracy": float(model.score(texts[True], labels[True])),
        "majority": labels[True].count(commonest) / len(labels[True]),
        "train_texts": len(labels[False]),
        "heldout_texts": len(labels[True]),
    }


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
