"""Exact nearest neighbours by cosine similarity, streamed in blocks."""

import numpy as np
from sklearn.preprocessing import normalize

from rsdlib import runtime
from rsdlib.errors import BadValueError


def nearest(queries, base, k, block=4096):
    """Return the `k` rows of `base` that are most similar to each query.

    Parameters
    ----------
    queries : array-like (q, d)
    base : array-like (n, d)
        Memory-mapped bases are read block by block.
    k : int
    block : int
        Rows of the base compared at a time: small blocks stay in the processor's cache.

    Returns
    -------
    similarity : ndarray (q, k), float32
        Descending.
    index : ndarray (q, k), int64

    Raises
    ------
    BadValueError
        `k` rows are not there, or the dimensions differ.
    """
    if not 1 <= k <= len(base):
        raise BadValueError(f"k = {k} neighbours cannot be found among {len(base)} rows")
    queries = normalize(np.asarray(queries, np.float32))
    if queries.shape[1] != base.shape[1]:
        raise BadValueError(f"dimensions differ: queries {queries.shape}, base {base.shape}")
    faiss = runtime.require("faiss", "faiss-cpu")
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(base), block):
        rows = normalize(np.asarray(base[start : start + block], np.float32))
        scores, places = faiss.knn(queries, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, places + start)
    best.finalize()
    return best.D, best.I


def knn_regress(queries, base, targets, k=16):
    """Return the similarity-weighted mean of the neighbours' targets (supplementary, section 8).

    This is the paper's k-NN baseline.

    Parameters
    ----------
    queries : array-like (q, p)
        Features of the images in question.
    base : array-like (n, p)
        Features of the training images.
    targets : array-like (n, d)
        Prompt embeddings of the training images.
    k : int

    Returns
    -------
    ndarray (q, d), float32, unit rows
    """
    similarity, index = nearest(queries, base, min(k, len(base)))
    weights = np.maximum(similarity, 1e-6)[:, :, None]  # (q, k, 1)
    return normalize((weights * np.asarray(targets, np.float32)[index]).sum(axis=1))


def nearest_prompts(embeddings, bank, prompts):
    """Return the known prompt nearest to each predicted embedding: the paper's 1-NN captions.

    Parameters
    ----------
    embeddings : array-like (n, d)
    bank : array-like (m, d)
        Embeddings of the known prompts, memory-mapped if they are many.
    prompts : sequence of str (m)

    Returns
    -------
    list of str

    Raises
    ------
    BadValueError
        There is not one embedding for each prompt.
    """
    if len(bank) != len(prompts):
        raise BadValueError(f"{len(bank)} embeddings do not belong to {len(prompts)} prompts")
    _, index = nearest(embeddings, bank, 1)
    return [prompts[row] for row in index[:, 0]]
