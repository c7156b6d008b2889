"""The one verifier: does a bundle compute what the student it was made from computes? docs/format.md says why so.

The bundle's graph runs with the values inside it shown (`graph`); the student goes over the same tokens, each of its
modules fed with what the bundle computed before it (`student`); `bundle` compares the two. `dfcompile` raises on what
it finds, `dfssm compare` prints it.
"""
