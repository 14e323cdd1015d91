"""What measures the plugin: `python -m benchmarks list`, `run NAME ...` and `report`.

A file of this folder is a benchmark; `harness/` runs, records and reports them, and `loads/` is
what they measure with.
"""
