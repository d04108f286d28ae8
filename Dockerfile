# maxlm for clusters that run containers: GKE, SkyPilot.
#
#   docker build -t REGION-docker.pkg.dev/PROJECT/REPO/maxlm .                        for TPUs
#   docker build -t REGION-docker.pkg.dev/PROJECT/REPO/maxlm --build-arg EXTRA=cuda . for NVIDIA's GPUs
#   docker push REGION-docker.pkg.dev/PROJECT/REPO/maxlm
#
# The wheels bring libtpu or CUDA; of a node with GPUs only the driver is needed.
FROM python:3.12-slim

ARG EXTRA=tpu
WORKDIR /opt/maxlm
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY maxlm maxlm
RUN pip install --no-cache-dir --constraint constraints/py312.txt ".[$EXTRA,buckets]"

WORKDIR /workspace
CMD ["maxlm", "--help"]
