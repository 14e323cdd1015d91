"""Measuring the kernels: batches like a server's, contenders that compute them, counts of work.

`batches` makes the batches, `contenders` names who computes them, `counting` observes a
computation in Triton's interpreter and adds up what it reads, writes and starts. The commands
`tools.kernels.work` and `tools.kernels.bench` are built on these.
"""
