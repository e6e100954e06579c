"""Evaluations, spread over ranks and equal to the one-process number."""
