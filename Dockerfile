# dfssm serve for CPUs, from the lock, as an ordinary user (docs/serve.md, "In a container"):
#
#   docker build -t dfssm .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/demo:/model:ro" dfssm
#
# Any other command of dfssm: docker run --rm -v "$PWD/demo:/model:ro" dfssm run /model -p "Once upon a time"

FROM python:3.11-slim-trixie AS build
# The versions of Debian's packages are those of the image.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libonnxruntime-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# First what seldom changes: the packages.
COPY requirements/build.txt requirements/chat.txt requirements/serve.txt requirements/
RUN python -m venv /opt/dfssm \
 && /opt/dfssm/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/serve.txt -r requirements/chat.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
COPY . .
RUN PATH=/opt/build/bin:$PATH pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels . \
 && /opt/dfssm/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.11-slim-trixie
COPY --from=build /opt/dfssm /opt/dfssm
RUN useradd --uid 1000 --create-home dfssm
USER 1000
ENV PATH=/opt/dfssm/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=30s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["dfssm"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
