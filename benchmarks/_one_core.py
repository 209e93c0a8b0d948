"""What the benchmarks share. Import it before numpy: it pins this process to one core."""

import contextlib
import os
import threading
import time

os.environ.update(
    {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON")},
    TOKENIZERS_PARALLELISM="false",
)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def cpu_seconds(function):
    """Run `function`; return its CPU seconds and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


@contextlib.contextmanager
def watched(read):
    """Call `read` all the while; the list that this gives holds the largest answer at its end."""
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], read())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
