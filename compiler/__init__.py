"""dfcompile: from a packed student to a verified bundle."""
