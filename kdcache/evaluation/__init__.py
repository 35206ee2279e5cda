"""Evaluation: metrics and costs of trained networks, finished runs, and the HTML report."""
