"""Measuring: what a machine has, what a step moves, how fast it runs; docs/bench.md says how to read the
figures.
"""
