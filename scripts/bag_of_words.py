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
    from ml.data.bag_of_words import bag_of_words
    from ml.train.config import ExperimentConfig

    config = build(ExperimentConfig, config_flag.load().to_dict())
    print(json.dumps(bag_of_words(config.data)))


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
