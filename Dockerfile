# CPU by default:   docker build -t cllm .
# For a GPU:        docker build -t cllm --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg EXTRAS=all,gpu .
#                   docker run --rm --gpus all -v "$PWD:/data" cllm train /data/text --out /data/runs/first
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=all
# numba's OpenMP layer needs libgomp; the CUDA base brings no Python of its own.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev \
    && (command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' || apt-get install -y --no-install-recommends python3 python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/cllm
COPY . .
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt torch \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"
ENV PATH=/opt/venv/bin:$PATH CLLM_CACHE_DIR=/var/cache/cllm
WORKDIR /data
ENTRYPOINT ["cllm"]
CMD ["doctor"]
