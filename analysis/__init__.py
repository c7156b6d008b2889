"""The knowledge study: what a model keeps where, in a teacher, a student or the bundle that ships. docs/study.md.

A study is a function of `Material` (`material`) that gives a `Study`: arrays, a figure, and what both say.
"""

PACKAGES = {"analysis": ("matplotlib",)}
"""What it takes besides those of `dfssm.model`; see `dfssm.base.extras`."""
