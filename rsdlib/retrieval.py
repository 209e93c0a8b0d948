"""Exact nearest neighbours by cosine similarity, streamed in blocks."""

import numpy as np
import torch

from rsdlib.errors import BadValueError


def nearest(queries, base, k, block=16_384):
    """Return the `k` rows of `base` that are most similar to each query.

    Parameters
    ----------
    queries : array-like (q, d)
    base : array-like (n, d)
        Memory-mapped bases are read block by block.
    k : int
    block : int
        Rows of the base compared at a time: bounds the memory at q * block similarities.

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
    similarity = torch.empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(base), block):
        scores = queries @ _unit(base[start : start + block]).T  # (q, block)
        best, where = scores.topk(min(k, scores.shape[1]), dim=1)
        similarity, index = torch.cat([similarity, best], 1), torch.cat([index, where + start], 1)
        similarity, keep = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, keep)
    return similarity.numpy(), index.numpy()


def _unit(rows):
    return torch.nn.functional.normalize(torch.from_numpy(np.array(rows, np.float32)))


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
