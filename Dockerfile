# The container wraps the same two commands; there is no second way to run the project.
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /vpstore
COPY . .
# DVC wants a git repository; a build context without .git gets a fresh one.
RUN git rev-parse --is-inside-work-tree >/dev/null 2>&1 || git init -q .
# PyTorch's CPU index keeps the image small: docker build --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN make .venv/bin/.installed
CMD ["sh", "-c", "make repro && make test"]
