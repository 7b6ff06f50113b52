"""What a probe must beat: the length of the text, its words, and both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

# Words, single digits and letters, and signs: "4 7 + 8 =" has five terms. scikit-learn's own pattern would see none of them.
TERM = r"(?u)\w+|[^\w\s]"


def length_features(texts: Sequence[str]) -> np.ndarray:
    """[N, 3] float32: log(1 + characters), log(1 + terms), log(1 + numbers)."""
    import re

    term, number = re.compile(TERM), re.compile(r"\d+")
    counts = [(len(t), len(term.findall(t)), len(number.findall(t))) for t in texts]
    return np.log1p(np.array(counts, np.float32).reshape(-1, 3))


def tfidf_features(texts: Sequence[str], *, max_terms: int = 20_000, min_rows: int = 2) -> sparse.csr_matrix:
    """[N, <= max_terms] float32 TF-IDF of words and word pairs, rows of norm 1; the vocabulary comes from `texts` alone (no
    labels). Empty where no term stands in `min_rows` rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=TERM, ngram_range=(1, 2), sublinear_tf=True, min_df=min_rows, max_features=max_terms, dtype=np.float32)
    try:
        return vectorizer.fit_transform(texts).tocsr()
    except ValueError:  # "empty vocabulary": nothing repeats
        return sparse.csr_matrix((len(texts), 1), dtype=np.float32)


def length_tfidf_features(texts: Sequence[str], **options) -> sparse.csr_matrix:
    """[N, 3 + terms]: standardised lengths beside TF-IDF. Lengths have variance 1 and TF-IDF rows norm 1, so a ridge penalty
    weighs lightly on length."""
    lengths = length_features(texts)
    lengths = (lengths - lengths.mean(axis=0)) / np.maximum(lengths.std(axis=0), 1e-6)
    return sparse.hstack([sparse.csr_matrix(lengths), tfidf_features(texts, **options)], format="csr", dtype=np.float32)
