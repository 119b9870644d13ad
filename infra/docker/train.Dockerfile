# Everything: data, training, the `rayscale` command, MLflow's server.
#   docker build -f infra/docker/train.Dockerfile -t rayscale-train:0.1.0 .
FROM python:3.11.14-slim-bookworm

# wget: for health checks, KubeRay's own included
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray \
    && install -d -o ray -g ray /var/cache/rayscale /tmp/ray

WORKDIR /opt/rayscale
COPY constraints.txt pyproject.toml README.md infra/docker/train.txt ./
COPY platform platform
RUN pip install --no-cache-dir --constraint constraints.txt --requirement train.txt .

ENV PYTHONUNBUFFERED=1 \
    RAYSCALE_HOME=/var/cache/rayscale \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_TRAIN_V2_ENABLED=1
USER 1000
WORKDIR /home/ray
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:52365/api/local_raylet_healthz"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["ray", "start", "--head", "--block"]
