"""DAKL against scikit-learn's KernelRidge, at the paper's scale, and k-means against its peers.

    python benchmarks/dakl.py           # about a minute
    python benchmarks/dakl.py --quick   # seconds, small
    python benchmarks/dakl.py --full    # minutes: also gamma = 2 and 10,000 centroids

KernelRidge gets the vectorised kernel. Times are CPU seconds of this process, pinned to one core
where the system allows it. Predictions that differ from the peer's, or a certificate that does not
hold, end the run with an error.
"""

import argparse
import os
import statistics
import sys
from functools import partial

from _one_core import cpu_seconds, watched  # isort: skip

import numpy as np
from sklearn.kernel_ridge import KernelRidge

from rsdlib.ensemble import DAKL, dakl

DIMENSIONS = 384


def made_up(n, rng, topics=2000, noise=0.8):
    """Return unit predictions and targets (n, 384), float32: topics around one direction."""
    world = np.random.default_rng(7)
    centres = unit(world.normal(size=DIMENSIONS)) + unit(world.normal(size=(topics, DIMENSIONS)))
    drawn = centres[rng.integers(topics, size=n)]
    Y = unit(drawn + 0.7 * unit(rng.normal(size=(n, DIMENSIONS))))
    X = unit(Y + noise * unit(rng.normal(size=(n, DIMENSIONS))))
    return X.astype(np.float32), Y.astype(np.float32)


def problem(r, t, seed):
    """Return source predictions, their targets and target predictions."""
    rng = np.random.default_rng(seed)
    (S, Y), (T, _) = made_up(r, rng), made_up(t, rng)
    return S, Y, T


def unit(rows):
    """Return rows of unit length."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def resident_memory():
    """Return this process's memory in GB, libraries included; zero where the system is silent."""
    if not os.path.exists("/proc/self/statm"):
        return 0.0
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def kernel_ridge(S, Y, T, gamma, alpha=10.0):
    """Return the peer's prediction: K' whole and vectorised, its rows as features."""
    S, Y, T = (rows.astype(np.float64) for rows in (S, Y, T))
    Z = unit(np.concatenate([S, T]))
    K = np.exp(-gamma * (1 - Z @ Z.T) / 2)
    peer = KernelRidge(kernel="linear", alpha=alpha).fit(K[: len(S)], unit(Y))
    return unit(peer.predict(K[len(S) :]))


def distance(a, b):
    """Return the root mean square distance of two sets of unit rows."""
    return float(np.sqrt(np.square(a - b).sum(axis=1).mean()))


def bench_paper_scale(r, t, gammas):
    """Print seconds and peak memory of fit and predict, with the centroids given."""
    rows = problem(r, t, seed=1)
    print(f"\nPaper's scale: r = {r:,}, t = {t:,}, d = {DIMENSIONS}, k-means aside")
    print(f"{'gamma':>7} {'solver':>8} {'certified':>10} {'CPU s':>7} {'peak GB':>8}")
    for gamma in gammas:
        model = DAKL(r, gamma)
        with watched(resident_memory) as peak:
            seconds, _ = cpu_seconds(partial(model.fit_predict, *rows))
        facts = f"{model.solver_:>8} {model.error_:10.1e} {seconds:7.2f} {peak[0]:8.2f}"
        print(f"{gamma:7g} {facts}")


def bench_peer(sizes, gamma=0.01):
    """Print seconds and growth beside the peer's, and the distance to its predictions."""
    print(f"\nfit + predict at gamma = {gamma}, alpha = 10; medians of interleaved rounds")
    heads = f"{'CPU s':>7} {'x peer':>7} {'growth':>7} {'distance':>9}"
    print(f"{'r':>6} {'t':>6} {'method':<12} {heads}")
    methods = {
        "KernelRidge": lambda rows: kernel_ridge(*rows, gamma),
        "affine": lambda rows: DAKL(len(rows[0]), gamma, solver="affine").fit_predict(*rows),
        "primal": lambda rows: DAKL(len(rows[0]), gamma, solver="primal").fit_predict(*rows),
    }
    before, good = {}, True
    for (r, t), rounds in sizes:
        rows = problem(r, t, seed=r)
        taken, answers = {name: [] for name in methods}, {}
        for _ in range(rounds):
            for name, method in methods.items():
                seconds, answers[name] = cpu_seconds(partial(method, rows))
                taken[name].append(seconds)
        for name, times in taken.items():
            seconds = statistics.median(times)
            ratios = [peer / own for peer, own in zip(taken["KernelRidge"], times, strict=True)]
            growth = ""
            if name in before:
                n, earlier = before[name]
                growth = f"n^{np.log(seconds / earlier) / np.log((r + t) / n):.2f}"
            before[name] = r + t, seconds
            away = distance(answers[name], answers["KernelRidge"])
            good &= away <= 1e-4
            facts = f"{seconds:7.2f} {statistics.median(ratios):7.1f} {growth:>7} {away:9.1e}"
            print(f"{r:6,} {t:6,} {name:<12} {facts}")
    return good


def bench_certificate(r, t, gammas):
    """Print what `auto` chooses, what it certifies, and how far it is from the peer."""
    rows = problem(r, t, seed=3)
    print(f"\nThe solver that auto chooses, r = {r:,}, t = {t:,}")
    print(f"{'gamma':>7} {'solver':>8} {'certified':>10} {'distance':>9}")
    good = True
    for gamma in gammas:
        model = DAKL(r, gamma)
        away = distance(model.fit_predict(*rows), kernel_ridge(*rows, gamma))
        good &= away <= 1e-4 and (model.solver_ != "affine" or away <= model.error_ + 1e-7)
        print(f"{gamma:7g} {model.solver_:>8} {model.error_:10.1e} {away:9.1e}")
    return good


def bench_kmeans(n, clusters, rounds=3):
    """Print seconds and inertia beside the original's BisectingKMeans and faiss itself."""
    import faiss
    from sklearn.cluster import BisectingKMeans

    X, _ = made_up(n, np.random.default_rng(4), topics=2 * clusters, noise=0.4)

    def peer(seed):
        options = {"niter": 25, "seed": seed, "min_points_per_centroid": 1}
        clustering = faiss.Kmeans(DIMENSIONS, clusters, **options)
        clustering.train(X)
        return clustering.centroids

    def original(seed):
        return BisectingKMeans(clusters, random_state=seed).fit(X).cluster_centers_

    def ours(seed):
        return dakl._kmeans(X, clusters, 25, seed)

    methods = {"BisectingKMeans": original, "ours": ours, "faiss": peer}
    print(f"\nk-means, {n:,} rows, {clusters:,} clusters; medians over {rounds} seeds")
    print(f"{'method':<16} {'CPU s':>7} {'inertia':>10} {'/ ours':>7}")
    taken, inertia = {name: [] for name in methods}, {name: [] for name in methods}
    for seed in range(rounds):
        for name, method in methods.items():
            seconds, centroids = cpu_seconds(partial(method, seed))
            taken[name].append(seconds)
            inertia[name].append(inertia_of(X, centroids))
    for name, times in taken.items():
        middle = statistics.median(inertia[name])
        ratio = middle / statistics.median(inertia["ours"])
        print(f"{name:<16} {statistics.median(times):7.2f} {middle:10.1f} {ratio:7.3f}")


def inertia_of(X, centroids):
    """Return the sum of squared distances of unit rows to their nearest centroid."""
    blocks = np.array_split(X, -(-len(X) // 2000))
    squares = 1 + (centroids**2).sum(axis=1)
    return sum(float((squares - 2 * block @ centroids.T).min(axis=1).sum()) for block in blocks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--full", action="store_true", help="what needs minutes too")
    arguments = parser.parse_args()
    if arguments.quick:
        bench_paper_scale(500, 1500, [0.01, 2.0])
        same = bench_peer([((200, 600), 3), ((400, 1200), 3)])
        holds = bench_certificate(150, 450, [1e-3, 1e-2, 0.1, 2.0])
        bench_kmeans(2000, 100)
    else:
        bench_paper_scale(10_000, 30_000, [1e-3, 1e-2, *([2.0] if arguments.full else [])])
        same = bench_peer([((500, 1500), 3), ((1000, 3000), 3), ((2500, 7500), 1)])
        holds = bench_certificate(300, 900, [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])
        bench_kmeans(*((50_000, 10_000, 1) if arguments.full else (16_000, 1000)))
    if not same:
        sys.exit("predictions differ from KernelRidge's by more than 1e-4")
    if not holds:
        sys.exit("a certificate does not hold")
