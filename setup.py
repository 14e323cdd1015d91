"""Which packages there are; everything else is in pyproject.toml.

The folder `kernels/` is imported as `multilora_kernels`; setuptools finds packages by their folders
alone.
"""

from setuptools import find_packages, setup

kernels = find_packages(include=["kernels", "kernels.*"])
setup(
    packages=[
        *("multilora_kernels" + name.removeprefix("kernels") for name in kernels),
        *find_packages(include=["vllm_multilora", "vllm_multilora.*"]),
    ],
    package_dir={"multilora_kernels": "kernels"},
)
