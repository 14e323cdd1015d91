"""PEFT's `adapter_config.json`: parsing, patterns of modules, and checks."""
