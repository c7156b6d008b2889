"""Measuring a model: perplexity on text, and tasks of lm-evaluation-harness; docs/eval.md has the definitions."""
