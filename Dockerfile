# The stages as one image: `docker build -t accrual:0.1.0 .`; the command says which stage a container is.
FROM python:3.12-slim-bookworm

# cpu, or a CUDA version such as cu130 for a trainer with a GPU; the versions are those of constraints.txt either way.
ARG TORCH_BACKEND=cpu
ENV PYTHONUNBUFFERED=1

WORKDIR /srv/accrual

# Dependencies first: a change of the code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt uv \
    && uv pip install --system --no-cache --torch-backend="${TORCH_BACKEND}" --constraint constraints.txt \
        --requirements pyproject.toml --extra lake --extra streams --extra trainer --extra mlflow

COPY LICENSE README.md CHANGELOG.md ./
COPY accrual accrual
COPY streams streams
COPY consumers consumers
COPY trainer trainer
COPY schemas schemas
# The stages are no part of the wheel: they run from this folder.
RUN uv pip install --system --no-cache --no-deps --editable .

RUN useradd --system --home-dir /var/lib/accrual --create-home accrual \
    && install --directory --owner accrual /var/lib/accrual/models
USER accrual
ENV ACCRUAL_STATE=/var/lib/accrual/state

ENTRYPOINT ["accrual"]
CMD ["--help"]
