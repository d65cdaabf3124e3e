"""All settings of the service: environment variable, default, limits and meaning. No other module reads them."""

import hashlib
import os
from functools import cache, lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    AliasChoices,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis import BlockingConnectionPool
from redis.connection import parse_url
from redis.exceptions import RedisError

#: A body, an answer or the call of a function is large if it has more bytes. The service limits how many large ones
#: there are at once.
LARGE = 64 * 1024
#: The longest TTL or timeout, in seconds: 30 days.
MAX_SECONDS = 30 * 24 * 3600
#: Most retries of a job.
MAX_RETRIES = 100


@lru_cache
def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


QueueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+:[0-9]{1,5}$")]
#: Standard Webhooks: 24 to 64 bytes as base64.
WebhookSecret = Annotated[str, StringConstraints(pattern=r"^whsec_[A-Za-z0-9+/]{32,88}={0,2}$")]
#: Whole seconds: RQ's fields have no fractions.
Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]


class ApiKey(BaseModel):
    """A key that clients may use, and what it allows. The setting has the key itself, or its SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The owner of the jobs that are made with the key.
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    key: Annotated[SecretStr, Field(min_length=16)] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    #: The job functions that the key may enqueue; None: all.
    functions: frozenset[str] | None = None
    #: Whether the key sees and controls the jobs of all owners.
    admin: bool = False

    @model_validator(mode="after")
    def check(self) -> Self:
        """Check that there is either the key itself or its hash."""
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("each key must have either `key` or `sha256`")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        if self.key is None:
            return bytes.fromhex(self.sha256 or "")
        return hashlib.sha256(self.key.get_secret_value().encode()).digest()


class Settings(BaseSettings):
    """The settings, from environment variables of the same name in capitals. They cannot be changed."""

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
    redis_username: str | None = Field(default=None, description="ACL user, if REDIS_URL is not set")
    redis_password: str | None = Field(default=None, repr=False, description="Password, if REDIS_URL is not set")
    redis_password_file: FilePath | None = Field(default=None, description="A file that holds REDIS_PASSWORD")
    redis_ssl: bool = Field(default=False, description="Speak TLS to REDIS_HOST, or to the Sentinels and their Redis")

    redis_sentinels: Annotated[tuple[Address, ...], NoDecode] = Field(
        default=(),
        description="Redis Sentinels, as `host:port` with commas, instead of REDIS_URL",
    )
    redis_sentinel_service: str = Field(default="mymaster", description="Name under which Sentinel knows Redis")
    redis_sentinel_password: str | None = Field(default=None, repr=False, description="Password of the Sentinels")

    host: str = Field(default="127.0.0.1", description="Address that `pipenv run start` and gunicorn listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="Port that `pipenv run start` and gunicorn listen on")
    web_concurrency: int = Field(default=1, ge=1, le=64, description="Number of gunicorn processes")

    drain_seconds: int = Field(
        default=0, ge=0, le=300, description="How long `/readyz` says no before gunicorn stops, in seconds"
    )

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        default=(), repr=False, description="JSON list of the keys that clients may use; unset: clients need no key"
    )
    api_keys_file: FilePath | None = Field(default=None, description="A file that holds API_KEYS")
    allow_anonymous: bool = Field(
        default=False, description="Listen on other addresses than loopback even without API_KEYS"
    )
    rate_limit: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$",
        description="Requests that one key (without keys: one address) may send, as `100/minute`; unset: any number",
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="How the log is written: `text` for people, or `json`, an object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The lowest level that is logged: debug, info, warning or error"
    )
    access_log: bool = Field(default=False, description="Log each request; if false, only bugs and failures of Redis")
    sentry_dsn: str | None = Field(
        default=None, repr=False, description="Where to report errors: Sentry's DSN. It needs the package sentry-sdk"
    )
    prometheus_multiproc_dir: Path | None = Field(
        default=None, description="Folder in which web processes share their metrics; unset: gunicorn makes one"
    )

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
    max_retries: int = Field(default=10, ge=0, le=MAX_RETRIES, description="The most retries a request may ask for")
    max_delay: Seconds = Field(default=MAX_SECONDS, description="The longest delay a request may ask for, in seconds")
    max_batch: int = Field(default=1000, ge=1, le=10_000, description="Payloads that one /enqueue_many may hold")
    max_crashes: int = Field(
        default=3, ge=0, le=100, description="How often a job is run again after its work-horse or worker died"
    )
    max_queue_length: int = Field(
        default=1_000_000, ge=1, description="Jobs that may wait in one queue, delayed jobs included"
    )
    max_payload_bytes: int = Field(default=16 * 2**20, ge=1, le=512 * 2**20, description="Largest request body")
    max_payload_values: int = Field(
        default=250_000, ge=1, le=100_000_000, description="JSON values that a request body may hold"
    )
    max_result_bytes: int = Field(default=16 * 2**20, ge=1, le=256 * 2**20, description="Largest result, as JSON")

    webhook_secrets: Annotated[tuple[WebhookSecret, ...], NoDecode] = Field(
        default=(),
        repr=False,
        description="Secrets that sign webhooks, `whsec_…` with commas; unset: no webhooks",
    )
    webhook_secrets_file: FilePath | None = Field(default=None, description="A file that holds WEBHOOK_SECRETS")
    webhook_allow_private: bool = Field(
        default=False, description="Allow webhooks to addresses that are not public, such as loopback"
    )

    max_wait: int = Field(default=60, ge=0, le=60, description="The longest `wait` that is granted, in seconds")
    max_waiting: int = Field(default=3000, ge=0, le=100_000, description="Requests that may wait in one web process")

    worker_fresh_process: bool = Field(
        default=False, description="Run each job in a new process, for code that leaves something behind"
    )
    worker_max_jobs: int | None = Field(
        default=None, ge=1, description="Jobs after which a new work-horse replaces the old one; unset: any number"
    )
    worker_max_memory: ByteSize | None = Field(
        default=None,
        ge=16 * 2**20,
        description="Memory that a work-horse and its child processes may use, as `2GiB`; with more it is killed",
    )
    worker_lease: int = Field(
        default=30, ge=3, le=3600, description="Seconds after which a silent worker's job is given to another"
    )
    worker_shutdown_seconds: int = Field(
        default=20, ge=0, le=3600, description="How long a running job may go on after SIGTERM, before it is put back"
    )

    @field_validator("redis_url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        """Let redis-py read the URL now. Later, it would raise at the first command, and not name a missing file."""
        if url is not None:
            try:
                BlockingConnectionPool.from_url(url).make_connection()
            except (ValueError, TypeError, RedisError) as error:
                raise ValueError(f"it is not the URL of a Redis ({error})") from None
            for name, value in parse_url(url).items():
                if name in {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"} and not os.access(value, os.R_OK):
                    raise ValueError(f"its {name} is not a file that can be read")
        return url

    @field_validator("queues", "function_modules", "redis_sentinels", "webhook_secrets", mode="before")
    @classmethod
    def split_names(cls, value: object) -> object:
        """Read `a, b` as two names, and refuse the same name twice."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if isinstance(names, list) and "" in names:
            raise ValueError("a name is empty")
        if isinstance(names, list) and len(set(names)) < len(names):
            raise ValueError("a name is there twice")
        return names

    @model_validator(mode="before")
    @classmethod
    def read_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read the secrets that are kept in files, and the API keys."""
        for name in ("api_keys", "redis_password", "webhook_secrets"):
            if file := values.get(f"{name}_file"):
                if values.get(name):
                    raise ValueError(f"{name.upper()} and {name.upper()}_FILE are both set; set only one")
                try:
                    values[name] = Path(file).read_text().strip()
                except (OSError, UnicodeDecodeError) as error:
                    reason = getattr(error, "strerror", None) or "it is not UTF-8"
                    raise ValueError(f"{name.upper()}_FILE cannot be read: {reason}") from None
        if isinstance(keys := values.get("api_keys"), str):
            try:
                values["api_keys"] = TypeAdapter(tuple[ApiKey, ...]).validate_json(keys)
            except ValidationError as error:  # its own text would show the keys
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise ValueError(f"API_KEYS is not valid{place and f' at {place}'}: {first['msg']}") from None
            if not values["api_keys"]:  # without keys, the service would serve everybody
                raise ValueError("API_KEYS is an empty list")
        return values

    @model_validator(mode="after")
    def check_together(self) -> Self:
        """Refuse settings that do not fit together, such as a service that is open to everybody by accident."""
        names = [key.name for key in self.api_keys]
        if len(set(names)) < len(names):
            raise ValueError("two API_KEYS have the same name")
        if len({key.digest for key in self.api_keys}) < len(names):
            raise ValueError("two API_KEYS are the same key")
        for name, most in (("job_timeout", "max_job_timeout"), ("result_ttl", "max_ttl"), ("failure_ttl", "max_ttl")):
            if getattr(self, name) > getattr(self, most):
                given, limit = getattr(self, name), getattr(self, most)
                raise ValueError(f"{name.upper()}={given} is more than {most.upper()}={limit}")
        if "webhooks" in self.queues:
            raise ValueError("QUEUES has the name `webhooks`, which the service uses for the queue of webhooks")
        if self.redis_url and self.redis_sentinels:
            raise ValueError("REDIS_URL and REDIS_SENTINELS are both set; set only one")
        if not (self.api_keys or self.allow_anonymous or is_loopback(self.host)):
            raise ValueError(f"HOST={self.host} is not a loopback address: set API_KEYS, or ALLOW_ANONYMOUS=true")
        return self

    @property
    def all_queues(self) -> tuple[str, ...]:
        """The queues of the workers. If there are webhooks, their queue comes last."""
        return (*self.queues, "webhooks") if self.webhook_secrets else self.queues

    @property
    def max_connections(self) -> int:
        """Most connections of clients to one web process: for requests that wait (MAX_WAITING), and 1000 others."""
        return self.max_waiting + 1000

    @property
    def address(self) -> str:
        """Where the web server listens, as `host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def redis_is_configured(self) -> bool:
        """Whether any setting says where Redis is."""
        return any(name.startswith("redis_") for name in self.model_fields_set)

    @property
    def redis_address(self) -> str:
        """The URL of Redis, from REDIS_URL or from REDIS_HOST and the rest."""
        if self.redis_url:
            return self.redis_url
        user, password = (quote(part or "", safe="") for part in (self.redis_username, self.redis_password))
        login = f"{user}:{password}@" if user or password else ""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"{'rediss' if self.redis_ssl else 'redis'}://{login}{host}:{self.redis_port}/{self.redis_db}"


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
        message = first["msg"].removeprefix("Value error, ")
        # pydantic names the first of two aliases, even if the other one was set. In a list, an index follows the name.
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        if name == "RQ_REDIS_URL" and name not in os.environ:
            name = "REDIS_URL"
        if not name:  # settings that do not fit together; the message names them
            raise SystemExit(f"Bad settings: {message}.") from None
        is_secret = any(word in name for word in ("PASSWORD", "URL", "KEYS", "DSN", "SECRETS"))
        shown = "(hidden)" if is_secret else repr(first["input"])
        field = name.lower() if name.lower() in Settings.model_fields else "redis_url"
        meaning = Settings.model_fields[field].description
        raise SystemExit(f"Bad setting {name}={shown}: {message} ({meaning}).") from None
