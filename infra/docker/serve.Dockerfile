# Serving, without torch: a node of a Ray cluster that runs `serve_configs/*.yaml`.
#   docker build -f infra/docker/serve.Dockerfile -t rayscale-serve:0.1.0 .
# With `--build-arg GPU=1`: CUDA and cuDNN for ONNX Runtime, too (the driver is the node's).
FROM python:3.11.14-slim-bookworm

# wget: for health checks, KubeRay's own included
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray \
    && install -d -o ray -g ray /var/cache/rayscale /tmp/ray

WORKDIR /opt/rayscale
COPY constraints.txt infra/docker/serve.txt infra/docker/serve-gpu.txt ./
ARG GPU=""
RUN pip install --no-cache-dir --constraint constraints.txt --requirement serve${GPU:+-gpu}.txt
COPY platform/rayscale rayscale

ENV PYTHONPATH=/opt/rayscale \
    PYTHONUNBUFFERED=1 \
    RAYSCALE_HOME=/var/cache/rayscale \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1
USER 1000
WORKDIR /home/ray
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:52365/api/local_raylet_healthz"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["ray", "start", "--head", "--block"]
