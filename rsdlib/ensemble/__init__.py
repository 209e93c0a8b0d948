"""Several models as one: their mean, DAKL, and the neighbours that both are held against."""

from rsdlib.ensemble.dakl import DAKL, cluster, degrees_of_freedom, kernel, least_alpha
from rsdlib.ensemble.mean import align, check_held_out, fit_weights, mean, search_dakl
from rsdlib.ensemble.neighbours import knn_regress, nearest, nearest_prompts
