# syntax=docker/dockerfile:1
# One image for the head and the workers of a Ray cluster: docker build --tag registry.example.com/densenet-dist:0.1.0 .
#
# No CUDA base: torch's and DALI's wheels bring CUDA 13, cuDNN and NCCL with them, in the versions
# that they were built with, and the driver is the host's (580 or newer; NVIDIA's container toolkit or device plugin
# puts it in). A CUDA base would add gigabytes of a second copy.
#
# For trying things out on CPUs: --build-arg TORCH_INDEX=ADDRESS, PyTorch's index of CPU wheels. The versions are those of
# the lock, without CUDA, Triton and DALI; torch and torchvision come without hashes of ours. Without it, this image runs
# on CPUs as well.
#
# No HEALTHCHECK: Kubernetes ignores it; KubeRay brings its own probes, and `ray up` looks after Ray itself.
#
# The digest pins the base's bytes. For a newer base: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
# requirements.lock without what only developers need.
COPY requirements-runtime.lock launch/cpu_lock.py ./
ARG TORCH_INDEX
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${TORCH_INDEX}" ]; then python cpu_lock.py requirements-runtime.lock torch.txt; fi \
    && pip install --prefix=/install --no-warn-script-location --only-binary :all: --require-hashes \
        -r requirements-runtime.lock \
    && if [ -n "${TORCH_INDEX}" ]; then \
        pip install --prefix=/install --no-warn-script-location --only-binary :all: --no-deps \
            --index-url "${TORCH_INDEX}" -r torch.txt; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY densenet_dist densenet_dist
# They come with the package: densenet_dist/yaml_settings.py.
COPY configs configs
# hatchling is among the packages just installed.
RUN --mount=type=cache,target=/root/.cache/pip \
    PYTHONPATH=/install/lib/python3.11/site-packages \
    pip install --prefix=/install --no-warn-script-location --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="densenet-dist" \
      org.opencontainers.image.description="Trains DenseNets on Ray clusters" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# g++: the fused dense block's kernels are built where they run, for the CPU at hand; and on GPUs Triton builds its
# launchers with gcc. Python's headers are in the base. rsync and ssh: `ray up` copies files in, and its head starts
# workers. Debian keeps only the newest version of a package, so there is none to pin; the base's digest pins the rest.
# The base has packages that the lock brings in other versions: copied over each other they would be a mixture.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client rsync tini \
    && useradd --create-home --uid 1000 --user-group --shell /bin/bash ray \
    && chgrp 0 /home/ray && chmod g=u /home/ray \
    && pip uninstall --yes --root-user-action=ignore setuptools wheel
# Not a virtual environment: login shells, which `ray up` uses, find /usr/local/bin.
COPY --from=build /install /usr/local
WORKDIR /app
COPY configs configs
COPY launch/start.py launch/start.py
# compute and utility: CUDA and nvidia-smi, and no more of the driver. HOME: `ray up` looks it up here. USER: PyTorch needs a
# name if another user id is set, as on OpenShift, where it is of group 0.
ENV HOME=/home/ray \
    USER=ray \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
# As a number, so that Kubernetes can tell that it is not root.
USER 1000:1000
# Reaps what a killed driver leaves behind. KubeRay starts Bash instead, which reaps as well.
ENTRYPOINT ["tini", "-g", "--"]
CMD ["densenet-dist", "--help"]
