# One image for web and worker: it runs `gunicorn app.main:app`, or `rq worker` as a worker (compose.yaml).
FROM python:3.11-slim AS build
ENV PIPENV_VENV_IN_PROJECT=1 PIP_NO_CACHE_DIR=1
WORKDIR /service
RUN pip install pipenv==2026.10.3
COPY Pipfile Pipfile.lock ./
RUN pipenv sync

FROM python:3.11-slim
# The variables of .env, and those that differ in a container.
ENV PATH=/service/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FLASK_APP=app.main:app \
    RQ_WORKER_CLASS=app.worker.Worker \
    RQ_QUEUE_CLASS=app.redis_resc.Queue \
    RQ_CONFIG=app.redis_resc \
    LOG_FORMAT=json
WORKDIR /service
COPY --from=build /service/.venv .venv
COPY gunicorn.conf.py ./
COPY app app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# For this address, set API_KEYS or ALLOW_ANONYMOUS.
CMD ["gunicorn", "--bind", "0.0.0.0:8000", "app.main:app"]
