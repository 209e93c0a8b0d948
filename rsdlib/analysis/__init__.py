"""What predictions are worth: scores and how sure they are, comparisons, tables and figures."""

from rsdlib.analysis import explorers, metrics, tables
from rsdlib.analysis.explorers import (
    explore_dakl,
    explore_map,
    explore_pairs,
    explore_readers,
    explore_swap,
)
from rsdlib.analysis.metrics import bootstrap_ci, clipscore, paired_test, ref_clipscore, retrieval
from rsdlib.analysis.plots import (
    plain,
    plot_curves,
    plot_images,
    plot_lines,
    plot_maps,
    plot_points,
    plot_recall,
    plot_report,
    plot_scores,
    save_figure,
)
from rsdlib.analysis.scores import Scores, as_table, ensemble_tables, rivals, swap_table
from rsdlib.data import cosine
