"""What `vllm-multilora ...` runs: one module per command.

A command's module has `add_arguments(parser)`, and `run(arguments)`, which returns an exit status
as the command's description in `vllm_multilora.cli` says, or raises a `MultiLoRAError` if it has no
answer: `cli` says so and exits with 2. It is imported only when the command is called, and imports
torch and vLLM only when it runs, so that help and errors in the arguments appear at once.
"""
