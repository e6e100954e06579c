"""Evaluations, spread over ranks and equal to the one-process number.

`run(config, encode, context) -> figures` in the file that `config.name` names; figures in percent
with their floors beside them. Nothing is registered.
"""

from trainer.evals.context import EvalContext
from trainer.evals.evaluate import Result, by_weights, evaluate_all, evaluate_each, run_eval

__all__ = ["EvalContext", "Result", "by_weights", "evaluate_all", "evaluate_each", "run_eval"]
