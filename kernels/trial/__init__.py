"""Tries kernels on the card at hand before they serve, and chooses between them.

`kinds` describes the calls of a model's layers, `trial_problems` makes weights and batches for one,
`result_checks` compares a result with plain PyTorch in float32, and `clocks` times a call. `cases`
puts these together for one process; `supervisor` runs that in a child process (`child`) with time
limits, so that a kernel that hangs or faults harms nobody. `choices` makes a table of what comes
back, and `records` keeps it on disk. Nothing here knows vLLM: other kernels are named by a module
and a function.
"""
