"""Which packages there are, and the C code in them; everything else is in pyproject.toml.

The folder `kernels/` is imported as `multilora_kernels`; setuptools finds packages by their folders
alone. To build for another kind of machine, name it and its compiler:
`_PYTHON_HOST_PLATFORM=linux-aarch64 CC=aarch64-linux-gnu-gcc`.

Where `GITHUB_REPOSITORY` names the repository, as in the workflow that publishes, the metadata has
its addresses, and the links of the README lead there: PyPI shows the README without its folder.
"""

import os
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

NATIVE = "kernels/native"
SOURCE_FOLDERS = (f"{NATIVE}/sources", "kernels/experts/sources")
builds = runpy.run_path(f"{NATIVE}/builds.py")
VERSION = runpy.run_path("vllm_multilora/__init__.py")["__version__"]
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")
HOME = f"https://github.com/{REPOSITORY}"
FILES = f"{HOME}/blob/v{VERSION}"
URLS = {
    "Homepage": HOME,
    "Documentation": f"{FILES}/docs",
    "Changelog": f"{FILES}/CHANGELOG.md",
    "Issues": f"{HOME}/issues",
}
README = Path("README.md").read_text()


class BuildNative(Command):
    """Compiles the C code for each instruction set; an editable tree does so when it is used."""

    description = "compile the C code"
    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = self.plat_name = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("plat_name", "plat_name"))

    def run(self) -> None:
        if self.editable_mode:
            return
        command = builds["compiler"]()
        self.mkpath(self._folder)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(
                threads.map(
                    lambda each: builds["compile_library"](*each[:2], command, Path(each[2])),
                    self._targets(),
                )
            )

    @property
    def _folder(self) -> str:
        return f"{self.build_lib}/multilora_kernels/native"

    def _targets(self) -> list[tuple]:
        """Library, instruction set and path of each build."""
        machine = self.plat_name.partition("-")[2]
        return [
            (library, instructions, f"{self._folder}/{library.file_name(instructions)}")
            for library in builds["LIBRARIES"]
            for instructions in builds["instruction_sets"](machine)
        ]

    def get_source_files(self) -> list[str]:
        return [
            str(path)
            for folder in SOURCE_FOLDERS
            for suffix in "ch"
            for path in Path(folder).glob(f"*.{suffix}")
        ]

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [path for _, _, path in self._targets()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """All steps of setuptools, and the C code."""

    sub_commands = (*build.sub_commands, ("build_native", None))


class Wheel(bdist_wheel):
    """For one kind of machine, and every Python: the C code does not use Python's interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Native(Distribution):
    """Makes setuptools treat the wheel as one for a kind of machine."""

    def has_ext_modules(self) -> bool:
        return True


kernels = find_packages(include=["kernels", "kernels.*"])
setup(
    long_description=re.sub(r"\]\((?!https?:)", f"]({FILES}/", README) if REPOSITORY else README,
    long_description_content_type="text/markdown",
    project_urls=URLS if REPOSITORY else {},
    packages=[
        *("multilora_kernels" + name.removeprefix("kernels") for name in kernels),
        *find_packages(include=["vllm_multilora", "vllm_multilora.*"]),
    ],
    package_dir={"multilora_kernels": "kernels"},
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_native": BuildNative},
    distclass=Native,
)
