#!/usr/bin/env bash
# Builds the image on a machine without a container engine, such as a CI machine, and tests it.
#
#   bash launch/build_without_engine.sh FOLDER [option of `buildah build`]...
#
# As root on Debian 12, with buildah and mmdebstrap (apt install buildah mmdebstrap) and Debian's and Python's registries
# in reach. Everything goes to FOLDER, about 30 GB; delete it afterwards. Where pip needs a configuration of its own:
#   --volume /etc/pip.conf:/etc/pip.conf:ro
#
# It tests that the steps of the Dockerfile run, and the image with launch/try_image.sh.
# It does not test the pinned base image, which only a registry has, but Debian 12 with the Python 3.11
# of this machine (PYTHON names another) in /usr/local; and RUN is a chroot, so nothing isolates but PID and network
# namespaces around the trial, and no GPU is there.

set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[[ $# -ge 1 && $1 != -* ]] || usage
folder=$1
shift
need() {
  echo "error: $1" >&2
  exit 3
}
[[ $(id -u) == 0 ]] || need "only root may mount and chroot: sudo bash $0 $folder"
for command in buildah mmdebstrap unshare ip; do
  command -v "$command" >/dev/null || need "$command is missing: apt install buildah mmdebstrap util-linux iproute2"
done
python=${PYTHON:-python3.11}
[[ $("$python" -c 'import sys; print(*sys.version_info[:2])') == '3 11' ]] || need "$python is not Python 3.11: PYTHON=PATH $0 ..."
mkdir -p "$folder"
folder=$(realpath "$folder")

export TMPDIR=$folder/tmp # the build's cache mounts lie there
mkdir -p "$TMPDIR"
buildah() { command buildah --root "$folder/storage" --runroot "$folder/run" "$@"; }
base=localhost/python:3.11-slim-bookworm
image=localhost/densenet-dist:try

# What python:3.11-slim-bookworm is made of: Debian without recommended packages, and Python in /usr/local with pip.
make_base() {
  local tree=$folder/base prefix container
  prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
  rm -rf "$tree"
  mmdebstrap --variant=minbase bookworm "$tree" --include=ca-certificates,netbase,tzdata \
    --include=libbz2-1.0,libcrypt1,libexpat1,libffi8,liblzma5,libncursesw6,libnsl2,libreadline8,libsqlite3-0,libssl3 \
    --include=libuuid1,zlib1g
  tar -C "$prefix" --exclude=site-packages --exclude=__pycache__ --exclude=test -c bin/python3.11 include/python3.11 lib |
    tar -C "$tree/usr/local" -x --no-same-owner
  ln -sf python3.11 "$tree/usr/local/bin/python3"
  ln -sf python3 "$tree/usr/local/bin/python"
  chroot "$tree" ldconfig
  chroot "$tree" /usr/local/bin/python -c 'import bz2, ctypes, lzma, readline, sqlite3, ssl, uuid, zlib'
  chroot "$tree" /usr/local/bin/python -m ensurepip --default-pip >/dev/null
  container=$(buildah from scratch)
  buildah copy --quiet "$container" "$tree" /
  buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
  buildah commit --quiet --rm "$container" "$base"
  rm -rf "$tree"
}

buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
buildah build --isolation chroot --format docker --layers --build-arg PYTHON_IMAGE="$base" --tag "$image" "$@" .
buildah images

container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
mapfile -t entrypoint < <(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$container")
export -f buildah
export folder
# In namespaces of its own: no port and no process of this machine is in the way, and at the end all processes are gone.
# shellcheck disable=SC2016  # the inner Bash expands it
unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up; buildah run --isolation chroot "$@"' bash \
  --env TINI_SUBREAPER=1 --volume "$PWD/launch/try_image.sh:/try_image.sh:ro" "$container" -- "${entrypoint[@]}" bash /try_image.sh
