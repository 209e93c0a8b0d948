"""Exact nearest neighbours by cosine similarity, streamed in blocks."""

import numpy as np
import torch
import torch.nn.functional as F

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
    """
    if not 1 <= k <= len(base):
        raise BadValueError(f"k = {k} neighbours cannot be found among {len(base)} rows")
    queries = _unit(queries)
    if queries.shape[1] != base.shape[1]:
        raise BadValueError(f"queries have {queries.shape[1]} dimensions, the base has {base.shape[1]}")
    faiss = runtime.require("faiss", "faiss-cpu")
    similarity, index = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(base), block):
        rows = _unit(base[start : start + block])
        best, where = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        similarity, index = np.concatenate([similarity, best], 1), np.concatenate([index, where + start], 1)
        keep = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        similarity, index = (np.take_along_axis(found, keep, 1) for found in (similarity, index))
    return similarity, index


def _unit(rows):
    return F.normalize(torch.from_numpy(np.array(rows, np.float32))).numpy()


def knn_regress(queries, base, targets, k=16):
    """Return the similarity-weighted mean of the neighbours' targets: the paper's k-NN baseline (supplementary, section 8).

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
    mean = (weights * np.asarray(targets, np.float32)[index]).sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)
