"""A LoRA checkpoint on disk, and what of it the running base model accepts.

`tensor_names` and `adapter_config` read what PEFT wrote, `adapter_folder` opens the files, `layout`
describes what the base model accepts on each worker, `validation` reports everything that does not
fit, and `intake` reads an adapter once and packs it into memory. Nothing here depends on vLLM, and
only `pickled`, for servers that allow pickles, needs PyTorch.
"""
