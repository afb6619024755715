# One image for the worker, the fetcher, the notifier and the producer. CUDA 13 comes with torch's
# wheels; the host brings an NVIDIA driver of version 580 or newer and the NVIDIA Container Toolkit.
FROM python:3.12-slim

# Triton compiles each kernel's launcher with a C compiler when it first runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Log lines leave the process as they are written, also when it is killed.
ENV PYTHONUNBUFFERED=1
# pip warns against root; in an image there is nobody else's Python to damage.
ENV PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1

WORKDIR /src

# Gigabytes of dependencies, in a layer that only these two files change.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY . .
RUN pip install --no-deps .

# Triton keeps compiled kernels in the home folder, so the user has one.
RUN useradd --create-home lorry
USER lorry
WORKDIR /home/lorry
# A volume takes its owner from the folder that it is first mounted on.
RUN mkdir --parents .cache/huggingface

CMD ["worker", "--help"]
