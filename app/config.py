"""Every setting of the service: its environment variable, default, bounds and meaning, read in this one place."""

from functools import cache
from typing import Annotated
from urllib.parse import quote

from pydantic import AliasChoices, Field, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

#: The longest any TTL or timeout may be: 30 days, in seconds.
MAX_SECONDS = 30 * 24 * 3600

QueueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]
#: Redis keeps TTLs as whole seconds in RQ's fields.
Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]


class Settings(BaseSettings):
    """The settings, from environment variables of the same name in capitals. Immutable once read."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True)

    redis_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("RQ_REDIS_URL", "REDIS_URL"),
        pattern=r"^(redis|rediss|unix)://",
        description="Where Redis is: redis://, rediss:// (TLS) or unix://. Wins over REDIS_HOST and the rest",
    )
    redis_host: str = Field(default="localhost", description="Host of Redis, if REDIS_URL is not set")
    redis_port: int = Field(default=6379, ge=1, le=65535, description="Port of Redis, if REDIS_URL is not set")
    redis_db: int = Field(default=0, ge=0, description="Database number, if REDIS_URL is not set")
    redis_password: str | None = Field(default=None, repr=False, description="Password, if REDIS_URL is not set")
    redis_ssl: bool = Field(default=False, description="Speak TLS to REDIS_HOST, if REDIS_URL is not set")

    host: str = Field(default="127.0.0.1", description="Address that `pipenv run start` and gunicorn listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="Port that `pipenv run start` and gunicorn listen on")
    web_concurrency: int = Field(default=1, ge=1, le=64, description="Number of gunicorn processes")

    queues: Annotated[tuple[QueueName, ...], NoDecode] = Field(
        default=("default",),
        min_length=1,
        description="Queue names, comma-separated, in the order in which workers look; jobs go to the first by default",
    )
    function_modules: Annotated[tuple[ModuleName, ...], NoDecode] = Field(
        default=("app.functions",),
        min_length=1,
        description="Modules whose job functions may be run, comma-separated",
    )
    some_long_function_seconds: float = Field(
        default=10, ge=0, le=3600, description="How long the example `some_long_function` works, in seconds"
    )

    job_timeout: Seconds = Field(default=180, description="A job's run limit, in seconds, unless it names its own")
    max_job_timeout: Seconds = Field(default=24 * 3600, description="The longest run limit a request may ask for")
    result_ttl: Seconds = Field(default=24 * 3600, description="How long a result is kept, in seconds")
    failure_ttl: Seconds = Field(default=7 * 24 * 3600, description="How long a failure is kept, in seconds")
    max_ttl: Seconds = Field(default=MAX_SECONDS, description="The longest ttl, result_ttl, failure_ttl of a request")
    max_crashes: int = Field(
        default=3, ge=0, le=100, description="How often a job is run again after its work-horse or worker died"
    )
    max_queue_length: int = Field(default=1_000_000, ge=1, description="Jobs that may wait in one queue")
    max_payload_bytes: int = Field(default=16 * 2**20, ge=1, le=512 * 2**20, description="Largest request body")
    max_result_bytes: int = Field(default=16 * 2**20, ge=1, le=256 * 2**20, description="Largest result, as JSON")

    max_wait: int = Field(default=60, ge=0, le=60, description="The longest `wait` that is granted, in seconds")
    max_waiting: int = Field(default=3000, ge=0, le=100_000, description="Requests that may wait in one web process")

    worker_lease: int = Field(
        default=30, ge=3, le=3600, description="Seconds after which a silent worker's job is given to another"
    )
    worker_shutdown_seconds: int = Field(
        default=20, ge=0, le=3600, description="How long a running job may go on after SIGTERM, before it is put back"
    )

    @field_validator("queues", "function_modules", mode="before")
    @classmethod
    def split_names(cls, value: object) -> object:
        """Read `a, b` as two names, and refuse the same name twice."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if isinstance(names, list) and len(set(names)) < len(names):
            raise ValueError("each name may stand there once")
        return names

    @property
    def address(self) -> str:
        """Where the web server listens, as `host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def redis_is_configured(self) -> bool:
        """Whether the user said where Redis is, in any of the ways there are."""
        return not self.model_fields_set.isdisjoint({"redis_url", "redis_host", "redis_port"})

    @property
    def redis_address(self) -> str:
        """The URL of Redis, whichever way it was configured."""
        if self.redis_url:
            return self.redis_url
        password = f":{quote(self.redis_password, safe='')}@" if self.redis_password else ""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"{'rediss' if self.redis_ssl else 'redis'}://{password}{host}:{self.redis_port}/{self.redis_db}"


@cache
def get_settings() -> Settings:
    """Read the settings from the environment, once.

    Raises:
        SystemExit: a variable has a bad value; the message names the variable, the value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        # With an alias, pydantic's location is the alias; a field of a list has its index behind it.
        name = str(first["loc"][0]).upper()
        shown = "(hidden)" if "PASSWORD" in name or "URL" in name else repr(first["input"])
        raise SystemExit(f"Bad setting {name}={shown}: {first['msg']}.") from None
