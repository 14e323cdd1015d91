"""Which kernels serve a model's layers on this card, decided as the worker starts.

`layer_calls` names the calls of each layer. `guarded_start` tries the kernels, or finds what was
decided before, and has the layers use what was chosen. `reporting` says what that is.
"""
