"""How good a model is: lm-eval's tasks over the engine, answers scored by running them, intervals beside figures."""

from shoal.evaluate.report import Score
from shoal.evaluate.run import evaluate

__all__ = ["Score", "evaluate"]
