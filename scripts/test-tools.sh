#!/usr/bin/env bash
# Install what some tests compare with or run on: Hugging Face transformers, TensorBoard, an S3 server, an Azure server, a browser, SLURM
# and an SSH server; once per machine, outside the checkout. Tests that need a tool that is not there say so loudly and are skipped.
# Prints the folder of the tools.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly CACHE="${CLOZE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloze}"
readonly REQUIREMENTS="scripts/test-tools-requirements.txt"
# Packages of the npm registry: drives a browser; speaks Azure's protocol.
readonly NODE_PACKAGES=(playwright-core@1.65.1 azurite@3.35.0)
# Debian's packages: the browser with one font, a linter of metrics, and what makes and disturbs networks; SLURM, whose accounting wants a
# database; an SSH server. Behind each stands a program by which it is known to be there, where there is one.
readonly SYSTEM_PACKAGES=(chromium=chromium fonts-dejavu-core= prometheus=promtool iproute2=ip gdb=gdb
    munge=munged slurmctld=slurmctld slurmd=slurmd slurm-client=sbatch slurmdbd=slurmdbd
    mariadb-server-core=mariadbd mariadb-client-core=my_print_defaults openssh-server=sshd openssh-client=ssh)
stamp=$(printf '%s' "${NODE_PACKAGES[*]}" | cat "$REQUIREMENTS" - | cksum | cut -d' ' -f1)
tools="$CACHE/test-tools-$stamp"

warn() { printf 'warning: %s; the tests that need it will be SKIPPED\n' "$1" >&2; }

# The system's packages are only installed where root and apt are there, and none of the services is started.
install_system_packages() {
    local missing=() names=() failed=() entry
    for entry in "${SYSTEM_PACKAGES[@]}"; do
        names+=("${entry%=*}")
        [ "${entry#*=}" = '' ] || PATH="$PATH:/usr/sbin:/sbin" command -v "${entry#*=}" > /dev/null || missing+=("${entry#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        warn "no root or no apt-get, so no ${missing[*]}"
        return
    fi
    printf 'installing %s\n' "${names[*]}" >&2
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' RETURN
    fi
    {
        apt-get update -qq || true
        # Where one of them cannot be had, the others can.
        install_now "${names[@]}" || for entry in "${names[@]}"; do install_now "$entry" || failed+=("$entry"); done
    } > /dev/null 2>&1
    [ ${#failed[@]} -eq 0 ] || warn "apt-get could not install ${failed[*]}"
}

# Waits for another program that is installing something.
install_now() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "$@"
}

install_node_packages() {
    if ! command -v npm > /dev/null; then
        warn 'npm is missing, so no browser driver and no Azure server'
        return
    fi
    mkdir -p "$tools/node"
    PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm install --prefix "$tools/node" --silent --no-audit --no-fund "${NODE_PACKAGES[@]}" > /dev/null 2>&1 \
        || warn 'npm could not install the browser driver and the Azure server'
}

if [ ! -e "$tools/complete" ]; then
    mkdir -p "$CACHE"
    exec 9> "$CACHE/test-tools-lock"; flock 9
    if [ ! -e "$tools/complete" ]; then
        rm -rf "$tools"
        printf 'installing test tools into %s (once per machine, 5 GB)\n' "$tools" >&2
        # uv resolves these requirements in seconds; pip can take many minutes.
        if python3 -m venv "$tools/uv" && "$tools/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.9.* \
            && "$tools/uv/bin/uv" venv --quiet --python "$(command -v python3)" "$tools/venv" \
            && "$tools/uv/bin/uv" pip install --quiet --python "$tools/venv/bin/python" --requirement "$REQUIREMENTS"; then
            install_node_packages
            touch "$tools/complete"
        else
            warn 'the Python tools could not be installed'
        fi
    fi
fi
install_system_packages
[ -e "$tools/complete" ] && printf '%s\n' "$tools/venv"
exit 0
