"""The Triton backend with blocks that do not depend on the batch.

A row's bits are then the same alone and in any batch, as long as the plan's layout and the device
stay the same. It costs speed: a decode step uses the blocks of a long prefill.
"""

from functools import partial

from multilora_kernels import triton

lora_linear = partial(triton.lora_linear, batch_invariant=True)
prepare_linear = partial(triton.prepare_linear, batch_invariant=True)
prepare_shrink = partial(triton.prepare_shrink, batch_invariant=True)
prepare_expand = partial(triton.prepare_expand, batch_invariant=True)
lora_shrink = partial(triton.lora_shrink, batch_invariant=True)
lora_expand = partial(triton.lora_expand, batch_invariant=True)
