# The command line on the CPU, with what compiles the operator at its first use.
#
#   docker build --tag odconv .
#   docker run --rm odconv models
#   docker run --rm --ipc host --user "$(id -u)" --volume "$PWD:/work" odconv train --config digits_od_resnet18_1x --out runs/1x
#   docker run --rm --publish 127.0.0.1:7860:7860 --volume "$PWD:/work" odconv demo --weights runs/1x/best.ckpt --host 0.0.0.0
FROM python:3.13-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# uv finds the builds of PyTorch without CUDA, which are gigabytes smaller
RUN pip install --no-cache-dir uv
COPY pyproject.toml hatch_build.py README.md LICENSE /odconv/
COPY src /odconv/src
RUN uv pip install --system --no-cache --torch-backend cpu "/odconv[all]"

# whoever is told by --user has neither a name nor a home here
ENV HOME=/tmp USER=odconv
USER 1000
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["odconv"]
CMD ["--help"]
