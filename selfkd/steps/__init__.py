"""The verbs, one file each, in the order in which a round usually uses them. They see a pool and a context: no path, no machine."""

from selfkd.steps.build import Build
from selfkd.steps.gold import Gold
from selfkd.steps.load import Load
from selfkd.steps.measure import Measure
from selfkd.steps.recall import Recall
from selfkd.steps.sample import Sample
from selfkd.steps.score import Score
from selfkd.steps.select import Select
from selfkd.steps.step import Step
from selfkd.steps.train import Train

VERBS: dict[str, type[Step]] = {
    "recall": Recall,
    "gold": Gold,
    "sample": Sample,
    "score": Score,
    "select": Select,
    "build": Build,
    "train": Train,
    "measure": Measure,
}

__all__ = ["VERBS", "Build", "Gold", "Load", "Measure", "Recall", "Sample", "Score", "Select", "Step", "Train"]
