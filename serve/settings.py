"""Settings of the application, independent of the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from recsys_ray.core.errors import ConfigError, UserError
from serve.live import variants_of
from serve.security import Guard, Jwt, check_rate

_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


class Settings(BaseModel):
    """All have defaults; a misspelt one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: str | None = Field(None, description="key file (recsys-ray make-key)")
    jwt: Jwt | None = Field(None, description="tokens of an identity provider")
    open: bool = Field(
        False, description="answer anyone, also other machines; only if something else protects the port"
    )
    rate: str | None = Field("1000/second", description="rate limit of keys without their own, and of tokens")
    rate_store: str = Field(
        "memory://", description="where requests are counted; redis://host:port/0 counts for all replicas"
    )
    store: str | None = Field(
        None, description="store of events and item changes: sqlite:///folder/live.db or redis://host:port/0"
    )
    variants: list[dict[str, Any]] = Field([], description="settings to compare: name, share, diversity, popularity")
    max_body: int = Field(16 << 20, gt=0, description="maximum bytes of a request body; larger ones get 413")
    timeout: float = Field(10.0, gt=0, description="seconds before a request gets 503")
    metrics_port: int | None = Field(
        None, description="port for Prometheus on one machine; on a cluster use Ray's own setting"
    )
    log: bool = Field(True, description="log one JSON line per request, without user and item ids")
    traces: float = Field(
        0.0, ge=0, le=1, description="share of the requests that are traced by Ray Serve (OpenTelemetry)"
    )
    trace_exporter: str | None = Field(
        None,
        description="function that returns OpenTelemetry's span processors, as module:function; default: files in "
        "Ray's log folder",
    )

    _rate = field_validator("rate")(check_rate)

    @field_validator("variants")
    @classmethod
    def _shares(cls, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            variants_of(told)
        except UserError as error:
            raise ValueError(str(error)) from None
        return told

    def at(self, host: str) -> Settings:
        """The settings for a server that listens at ``host``. Raises ConfigError if other machines need no key."""
        if self.keys or self.jwt or self.open:
            return self
        if host not in _THIS_MACHINE:
            raise ConfigError(
                f"other machines can reach {host}, so keys are required: create one with `recsys-ray make-key FILE` "
                "and pass --keys FILE, or set `jwt` in --settings; if something else protects the port, set "
                "`open: true`"
            )
        return self.model_copy(update={"open": True})

    def check(self) -> None:
        """Raises ConfigError if the server would answer anyone without ``open``, and for unreadable files."""
        if not (self.keys or self.jwt or self.open):
            raise ConfigError(
                "the server would answer anyone: set settings.keys (a file of `recsys-ray make-key`) or "
                "settings.jwt; if something else protects the port, set settings.open: true"
            )
        self.guard()

    def guard(self) -> Guard:
        """Raises ConfigError for files that cannot be read."""
        return Guard(self.keys, self.jwt, self.rate, self.rate_store)


def load_settings(given: Any) -> Settings:
    """Out of a mapping, or of a YAML file's path; None: the defaults. Raises ConfigError, which names the field."""
    place = "settings"
    if isinstance(given, str | Path):
        place = str(given)
        try:
            given = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{place} cannot be read: {error}") from error
    try:
        return Settings.model_validate(given or {})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = f"; known: {', '.join(Settings.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{place}: {name}: {first['msg']}{known}") from None
