# Dreamer in a container. On a CPU, or with a build argument for NVIDIA GPUs:
#
#   docker build -t dreamer .
#   docker build -t dreamer --build-arg CUDA=1 .
#   docker run -v "$PWD/logdir:/logdir" dreamer
#   docker run --gpus all -v "$PWD/logdir:/logdir" dreamer \
#     --logdir /logdir/cheetah --task dmc_cheetah_run
#
# The same command again resumes. The tests: docker build --target test -t
# dreamer-test . && docker run dreamer-test

FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends \
    libegl1 libgl1-mesa-dri libopengl0 libosmesa6 python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV VENV=/opt/venv
ENV PATH=$VENV/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
# So that EGL finds the driver of a GPU.
ENV NVIDIA_DRIVER_CAPABILITIES=all
WORKDIR /dreamer
COPY requirements.txt ./
RUN python -m venv "$VENV" \
  && pip install -r requirements.txt \
  && pip install --no-deps dm-control==1.0.50
ARG CUDA=
RUN if [ -n "$CUDA" ]; then \
    pip install "tensorflow[and-cuda]==$(pip show tensorflow | awk '/^Version/ { print $2 }')"; \
  fi
COPY . .

FROM base AS test
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends \
    libegl1 libgl1-mesa-dri libopengl0 libosmesa6 python3-venv chromium git \
  && rm -rf /var/lib/apt/lists/*
RUN pip install -e '.[test]'
CMD ["python", "-m", "pytest", "-n", "2", "--no-loadscope-reorder", "--dist", "loadfile"]

FROM base AS train
VOLUME /logdir
ENTRYPOINT ["python", "dreamer.py"]
CMD ["--logdir", "/logdir/walker", "--task", "dmc_walker_walk"]
