"""The fair bench of one bit: teachers that cannot overfit, and what of them a student keeps; docs/results.md."""
