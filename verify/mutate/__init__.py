"""Strength: how many small faults, put into the compiled IR of a proved kernel, the properties notice.

Operators (`sync`, `memory`, `control`, `value`) make mutants of the device IR or of the host's launch;
`kill` checks one mutant property by property; `equivalence` asks the interpreter about survivors: a
survivor counts against the properties unless no schedule and no input tried tells it from the kernel.
"""
