"""The verbs, one file each, in the order in which a round usually uses them. They see a pool and a context: no path, no machine."""

from selfkd.steps.apply import ApplyStep
from selfkd.steps.average import AverageStep
from selfkd.steps.bring import BringStep
from selfkd.steps.build import BuildStep
from selfkd.steps.gold import GoldStep
from selfkd.steps.judge import JudgeStep
from selfkd.steps.load import LoadStep
from selfkd.steps.measure import MeasureStep
from selfkd.steps.replay import ReplayStep
from selfkd.steps.sample import SampleStep
from selfkd.steps.score import ScoreStep
from selfkd.steps.select import SelectStep
from selfkd.steps.step import STAGES, Step
from selfkd.steps.train import TrainStep

VERBS: dict[str, type[Step]] = {
    "replay": ReplayStep,
    "gold": GoldStep,
    "sample": SampleStep,
    "bring": BringStep,
    "score": ScoreStep,
    "judge": JudgeStep,
    "apply": ApplyStep,
    "select": SelectStep,
    "build": BuildStep,
    "train": TrainStep,
    "average": AverageStep,
    "measure": MeasureStep,
}

__all__ = ["STAGES", "VERBS", "LoadStep", "Step"]
