"""Evaluators score a train state: one file per evaluator."""
