"""A bag-of-words and length baseline for preference labels: how much of them is predictable from the surface."""

import numpy as np
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold


def bag_of_words_scores(train: list[tuple[str, str]], test: list[tuple[str, str]], seed: int = 42) -> np.ndarray:
    """Score of chosen over rejected on `test` by a bag-of-words and length classifier fitted on `train`.

    A Bradley-Terry logistic regression on the differences of word counts and of log length. It has no intercept, since
    swapping the two answers must flip the score. The L2 strength is chosen by 5-fold cross-validation on train only.

    Args:
        train, test: (chosen, rejected) texts. Of train, at most 20,000 pairs are used, drawn with `seed`.

    Returns:
        Shape (len(test),): above 0 if the classifier prefers chosen.
    """
    train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:20000]]
    # Words of one letter and single punctuation marks count too; scikit-learn's default pattern drops both.
    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b|[^\w\s]", min_df=2 if len(train) > 20 else 1)
    words.fit([text for pair in train for text in pair])

    def features(pairs):
        chosen, rejected = zip(*pairs, strict=True)
        # Log ratio of lengths in characters; + 1 allows an empty text.
        length = np.array([[np.log((len(c) + 1) / (len(r) + 1))] for c, r in pairs])
        # CSR, because cross-validation selects rows.
        return hstack([words.transform(chosen) - words.transform(rejected), csr_matrix(length)]).tocsr()

    # The vocabulary comes from train alone, so the baseline sees nothing of test.
    x = features(train)
    # Each pair once with label 1 and mirrored with label 0.
    x, y = vstack([x, -x]), np.repeat([1, 0], len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=2000)
    if len(train) >= 10:
        # A pair and its mirror image must be in the same fold, or the label leaks.
        folds = GroupKFold(5).split(x, y, groups=np.tile(np.arange(len(train)), 2))
        model = GridSearchCV(model, {"C": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}, cv=list(folds))
    return model.fit(x, y).decision_function(features(test))
