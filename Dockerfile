# docker build -t loramux .     with the package index's own torch, which is built for CUDA
# docker build -t loramux --build-arg TORCH_INDEX=URL .     URL: PyTorch's index of builds for CPUs; a tenth of the size
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /opt/loramux
# Before the sources: what takes minutes is done again only when the dependencies change.
COPY pyproject.toml deploy/install.sh ./
RUN TORCH_INDEX=${TORCH_INDEX} ./install.sh dependencies /opt/loramux
COPY README.md LICENSE ./
COPY adapters ./adapters
COPY server ./server
RUN ./install.sh package /opt/loramux

FROM python:${PYTHON}-slim
# bitsandbytes needs OpenMP from the system; kernels are compiled on the machine that runs them, by Triton for CUDA, by us for
# CPUs. Their versions are Debian's to fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 loramux \
    && useradd --uid 10001 --gid 10001 --create-home loramux \
    && install -d -o loramux -g loramux /data /models
COPY --from=build /opt/loramux /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models/huggingface \
    LORAMUX_CACHE_DIR=/models/loramux \
    LORAMUX_DATA_DIR=/data
USER 10001:10001
VOLUME ["/data", "/models"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, also while the base loads; whether it takes requests is what /ready says.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["loramux"]
CMD ["serve", "demo", "--host", "0.0.0.0"]
