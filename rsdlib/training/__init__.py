"""Training: the one loop with its run folders, and the order in which a model meets the pairs."""

from rsdlib.training import curriculum, runs
from rsdlib.training.curriculum import CBS, LeRaC, difficulty, growing, hardness_of, regime, stages
from rsdlib.training.loop import Callback, Plan, Stage, fit
from rsdlib.training.processes import end_with_parent, is_one_of_many, launch
from rsdlib.training.runs import WEIGHTS, Run, is_finished, load_run, load_weights, save_weights
