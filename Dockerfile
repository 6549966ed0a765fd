# medv on a CPU: the commands of the README, in a container.
#   docker build -t medv . && mkdir -p runs && docker run --rm -it -v "$PWD/runs:/medv/runs" medv
# JupyterLab, which must listen on all addresses of the container; it prints its token:
#   docker run --rm -it -p 127.0.0.1:8888:8888 medv .venv/bin/jupyter lab notebooks --ip 0.0.0.0
FROM python:3.11-slim-bookworm

# Debian keeps one version of a package at a time, so that a pinned one could not be installed later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends make git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 medv \
    && mkdir /medv \
    && chown medv /medv

USER 1000
WORKDIR /medv
# The environment depends on these files alone and is kept while they stay the same.
COPY --chown=medv pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY --chown=medv medv ./medv
RUN TORCH_INDEX=https://download.pytorch.org/whl/cpu make setup
COPY --chown=medv . .

EXPOSE 8888
CMD ["make", "reproduce"]
