"""Pure functions of tensors and a Comm: the objective is the mean over ranks of what they return.

A loss is the mean over this rank's samples, or the same number on all ranks. Gradients are those
of the sum of the ranks' losses; the engine averages them over ranks, and a part divides its own.
"""
