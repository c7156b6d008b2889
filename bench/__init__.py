"""Measuring: what a machine has, what a step moves, how fast it runs; docs/bench.md explains the figures."""
