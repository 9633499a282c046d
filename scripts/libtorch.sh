#!/usr/bin/env bash
# Fetch libtorch once per machine and point this checkout at it.
#
#   scripts/libtorch.sh                 download PyTorch's CPU+CUDA library into the cache folder (530 MB, resumable, hashes pinned)
#   CLOZE_TORCH=/path/to/site-packages/torch scripts/libtorch.sh
#                                       use the PyTorch 2.11 environment that is already there
#
# The cache folder is ${CLOZE_CACHE:-$XDG_CACHE_HOME/cloze or ~/.cache/cloze}. The script writes `.cargo/config.toml`, which is not
# committed, so that every cargo command in this checkout finds the same library and nothing is rebuilt by accident.
# Exit codes: 0 ready, 1 something is missing (the message says what).
set -euo pipefail

readonly TORCH_VERSION=2.11.0
readonly REQUIREMENTS="scripts/libtorch-requirements.txt"
readonly CACHE="${CLOZE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloze}"

fail() { printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2; exit 1; }

cd "$(dirname "$0")/.."

# Keep pip's pinned wheels under a hash check; a download cut off half-way starts again at the missing file.
download_wheels() {
    command -v python3 >/dev/null || fail "python3 not found" "install python3 with the venv module (Debian: apt-get install python3-venv)"
    local venv="$CACHE/pip-venv"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
        python3 -m venv "$venv" || fail "python3 -m venv failed" "Debian and Ubuntu keep it in the package python3-venv"
    fi
    mkdir -p "$CACHE/wheels"
    printf 'fetching libtorch %s into %s (once per machine)\n' "$TORCH_VERSION" "$CACHE" >&2
    # The wheels are unpacked, never imported: any python3 fetches the cp311 build, so that one hash is pinned.
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
        --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$CACHE/wheels" --requirement "$REQUIREMENTS" \
        || fail "the download of libtorch $TORCH_VERSION failed" "run the same command again: what is complete is kept; or set CLOZE_TORCH to the torch folder of a PyTorch $TORCH_VERSION environment"
}

# Unpack into a temporary folder and rename, so that an interrupted unpacking is never taken for a complete one.
unpack_wheels() {
    local target="$1" partial
    partial="$target.partial.$$"
    rm -rf "$partial" && mkdir -p "$partial"
    for wheel in "$CACHE"/wheels/torch-"$TORCH_VERSION"-*.whl "$CACHE"/wheels/nvidia_cuda_{cupti,runtime}-13.0.*.whl; do
        "$CACHE/pip-venv/bin/python" - "$wheel" "$partial" <<'PY' || fail "could not unpack $wheel" "is the disk full? 3 GB are needed in $CACHE"
import sys, zipfile
wheel, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as z:
    # Only the headers and libraries: the Python files of the wheel are never used.
    z.extractall(target, [n for n in z.namelist() if n.startswith(("torch/include/", "torch/lib/", "nvidia/"))])
PY
    done
    mv "$partial" "$target"
}

# A folder in the shape that torch-sys expects. libtorch.so is a linker script: the binary links libtorch_cpu and libc10 only, so it
# starts without CUDA and opens libtorch_cuda.so when a recipe asks for a GPU.
lay_out() {
    local torch="$1" view="$2" partial library
    partial="$view.partial.$$"
    rm -rf "$partial" && mkdir -p "$partial/lib" "$partial/cuda"
    ln -s "$torch/include" "$partial/include"
    for library in libtorch_cpu.so libc10.so; do
        [ -e "$torch/lib/$library" ] || fail "$torch/lib/$library not found" "CLOZE_TORCH must name the torch folder of a PyTorch $TORCH_VERSION environment for Linux"
        ln -s "$torch/lib/$library" "$partial/lib/$library"
    done
    # What libtorch_cpu needs at start: present or not, depending on the build of PyTorch.
    for library in "$torch"/lib/libgomp* "$(dirname "$torch")"/nvidia/*/lib/libcu{pti,dart}.so*; do
        if [ -e "$library" ]; then ln -sf "$library" "$partial/lib/$(basename "$library")"; fi
    done
    # The CUDA half stands apart: torch-sys would link it if it stood in lib/. The worker opens it by this path.
    if [ -e "$torch/lib/libtorch_cuda.so" ]; then ln -s "$torch/lib/libtorch_cuda.so" "$partial/cuda/libtorch_cuda.so"; fi
    [ -e "$partial/lib/libgomp.so.1" ] || { library=$(ls "$partial"/lib/libgomp*.so* 2>/dev/null | head -1); [ -n "$library" ] && ln -s "$(basename "$library")" "$partial/lib/libgomp.so.1"; } || true
    printf 'INPUT(libtorch_cpu.so)\n' > "$partial/lib/libtorch.so"
    printf '%s\n' "$TORCH_VERSION" > "$partial/build-version"
    rm -rf "$view" && mv "$partial" "$view"
}

write_cargo_config() {
    local view="$1"
    mkdir -p .cargo
    local text
    text=$(printf '# Written by scripts/libtorch.sh; not committed.\n[env]\nLIBTORCH = { value = "%s", force = true }\nLIBTORCH_CXX11_ABI = { value = "1", force = true }\n' "$view")
    # Unchanged text keeps its time stamp, and cargo its build.
    if [ "$(cat .cargo/config.toml 2>/dev/null)" != "$text" ]; then printf '%s\n' "$text" > .cargo/config.toml; fi
}

main() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "libtorch is set up for Linux on x86_64 only, this is $(uname -sm)" "other platforms need a build of libtorch $TORCH_VERSION and a .cargo/config.toml that sets LIBTORCH to it"
    local view torch
    if [ -n "${CLOZE_TORCH:-}" ]; then
        torch=$(realpath "$CLOZE_TORCH")
        local found
        found=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$torch/version.py" 2>/dev/null || true)
        [ "$found" = "$TORCH_VERSION" ] || fail "CLOZE_TORCH=$CLOZE_TORCH holds PyTorch ${found:-(no version.py)}, expected $TORCH_VERSION" "name the torch folder inside site-packages"
        view="$CACHE/libtorch-env-$(printf '%s' "$torch" | cksum | cut -d' ' -f1)"
        [ -e "$view/build-version" ] || lay_out "$torch" "$view"
    else
        view="$CACHE/libtorch-$TORCH_VERSION"
        torch="$CACHE/unpacked-$TORCH_VERSION/torch"
        if [ ! -e "$view/build-version" ]; then
            mkdir -p "$CACHE"
            exec 9> "$CACHE/lock"; flock 9      # two checkouts set up at once: the second waits, and finds it done
            if [ ! -e "$view/build-version" ]; then
                rm -rf "$CACHE"/*.partial.*
                if [ ! -e "$torch/lib/libtorch_cpu.so" ]; then
                    download_wheels
                    rm -rf "$CACHE/unpacked-$TORCH_VERSION"
                    unpack_wheels "$CACHE/unpacked-$TORCH_VERSION"
                    rm -rf "$CACHE/wheels"
                fi
                lay_out "$torch" "$view"
            fi
        fi
    fi
    write_cargo_config "$view"
    printf 'libtorch %s: %s\n' "$TORCH_VERSION" "$view" >&2
}
main "$@"
