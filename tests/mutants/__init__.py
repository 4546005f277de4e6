"""Do the tests see it when a formula is wrong? `python -m tests.mutants`, or `make mutants`.

Each mutant is one file of algorithms/ with one mistake in it: a sign, a bound, a prefix off by one, a missing detach, a
sum over one rank in place of all, a mask forgotten. Most are made systematically (`operators`), the rest are written
down (tables/, read by `chosen`). The tests of that file then run against it, in a copy of the tree; a mutant that they
let pass is a hole in them, unless its table says why no test could tell it from the original.
"""
