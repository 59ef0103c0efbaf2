"""Authentication, permissions and rate limits: API keys and JSON Web Tokens.

A key file holds only hashes, one JSON object per line: ``id``, ``name``, ``hash`` (SHA-256 of the whole key),
``scopes`` and ``rate``. Keys are random, so a fast hash is safe. The file is read again when it changes; removing a
line revokes its key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jwt
import limits
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request

from recsys_ray.core.errors import ConfigError, UserError
from serve.errors import Refused

Scope = Literal["read", "events", "catalogue", "promote"]
SCOPES: tuple[Scope, ...] = ("read", "events", "catalogue", "promote")
_KEY = re.compile(r"rr_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_LOOK_S = 1.0  # seconds between two looks at the key file
_SYMMETRIC = {"HS256", "HS384", "HS512"}
_ASYMMETRIC = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}


def check_rate(rate: str | None) -> str | None:
    """``rate``, if it can be read, say ``100/second``. Raises ValueError."""
    if rate is not None:
        try:
            limits.parse(rate)
        except ValueError:
            raise ValueError(f"{rate!r} is not a rate; write, for example, 100/second or 5000/minute") from None
    return rate


class Caller(BaseModel):
    """A line of the key file, or what a token says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str = Field(description="holder of the key; appears in logs")
    hash: str = ""
    scopes: tuple[Scope, ...]
    rate: str | None = Field(None, description="rate limit, such as 100/second; default: the server's")
    created: str = ""

    _rate = field_validator("rate")(check_rate)


class Jwt(BaseModel):
    """Tokens of an identity provider. The claim ``scope`` holds scopes with spaces between them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithms: tuple[str, ...] = Field(min_length=1, description="accepted algorithms, such as [RS256]")
    audience: str = Field(min_length=1)
    issuer: str = Field(min_length=1)
    key_file: str = Field(description="the public key as PEM, or the secret of an HS algorithm")

    @field_validator("algorithms")
    @classmethod
    def _one_kind(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not (set(names) <= _SYMMETRIC or set(names) <= _ASYMMETRIC):  # a public key must never be taken for a secret
            known = ", ".join(sorted(_SYMMETRIC | _ASYMMETRIC))
            raise ValueError(f"choose algorithms of one kind, HS or public-key, from {known}")
        return names


def make_key(path: Path, name: str, scopes: Sequence[str], rate: str | None = None) -> str:
    """Append a new key's hash to the key file, which is created if missing. Returns the key, which is stored nowhere.

    Raises:
        UserError: an unknown scope, an invalid rate, or a file that is not a key file.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"there is no scope {scope!r}; known: {', '.join(SCOPES)}")
    if path.exists():
        read_keys(path)
    made = secrets.token_hex(6)
    key = f"rr_{made}_{secrets.token_urlsafe(32)}"
    line = {"id": made, "name": name, "hash": _hash(key), "scopes": list(dict.fromkeys(scopes)), "rate": rate}
    line["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    _caller(line, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(file)
    return key


def read_keys(path: Path) -> dict[str, Caller]:
    """Callers by the id of their key. Raises ConfigError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the key file {path} cannot be read ({error}); create one with recsys-ray make-key"
        ) from error
    found: dict[str, Caller] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                caller = _caller(json.loads(line), place)
            except json.JSONDecodeError:
                raise ConfigError(
                    f"{place}: not valid JSON; create lines of a key file with recsys-ray make-key"
                ) from None
            found[caller.id] = caller
    return found


def _caller(line: Any, place: str) -> Caller:
    try:
        return Caller.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """Admits requests. Without keys and tokens it admits all, so such a server must listen on this machine only.

    Args:
        rate: for keys without a rate of their own.
        rate_store: where requests are counted: ``memory://`` (per replica) or ``redis://host:port/0``.

    Raises:
        ConfigError: a file that cannot be read.
    """

    def __init__(self, keys: str | None, tokens: Jwt | None, rate: str | None, rate_store: str) -> None:
        self._path, self._keys, self._looked, self._stamp = Path(keys) if keys else None, {}, 0.0, (0, 0)
        if self._path:
            self._keys = read_keys(self._path)
        self._tokens, self._secret = tokens, ""
        if tokens:
            try:
                self._secret = Path(tokens.key_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"jwt.key_file {tokens.key_file} cannot be read: {error}") from error
        self._rate, self._rates = rate, FixedWindowRateLimiter(_storage(rate_store))
        self._parsed: dict[str, limits.RateLimitItem] = {}

    @property
    def closed(self) -> bool:
        return bool(self._path or self._tokens)

    async def admit(self, request: Request, scope: str) -> None:
        """Raises Refused: 401, 403 or 429."""
        if not self.closed:
            return
        caller = self._caller_of(request)
        request.scope["caller"] = caller.name
        if scope not in caller.scopes:
            raise Refused(403, f"this key lacks the scope {scope!r}")
        await self._count(caller)

    def _caller_of(self, request: Request) -> Caller:
        given = request.headers.get("x-api-key", "")
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if not given and kind.lower() == "bearer":
            given = token.strip()
        if not given:
            raise _unknown("send a key: Authorization: Bearer KEY, or X-API-Key: KEY")
        if match := _KEY.fullmatch(given):
            self._look()
            found = self._keys.get(match[1])
            if found is not None and hmac.compare_digest(found.hash, _hash(given)):
                return found
        elif self._tokens and given.count(".") == 2:
            return self._claimed(given, self._tokens)
        raise _unknown("unknown key")

    def _claimed(self, token: str, settings: Jwt) -> Caller:
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=list(settings.algorithms),
                audience=settings.audience,
                issuer=settings.issuer,
                options={"require": ["exp", "aud", "iss", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise _unknown(f"the token is refused: {type(error).__name__}") from None
        said = claims.get("scope", "")
        scopes = said.split() if isinstance(said, str) else []
        hidden = hashlib.sha256(str(claims["sub"]).encode()).hexdigest()[:12]  # a subject may be a person
        return Caller(id=hidden, name=f"token {hidden}", scopes=tuple(s for s in SCOPES if s in scopes))

    def _look(self) -> None:
        """Read the key file again if it has changed; if it cannot be read, the old keys stay."""
        now = time.monotonic()
        if self._path is None or now < self._looked + _LOOK_S:
            return
        self._looked = now
        try:
            facts = self._path.stat()
            if (facts.st_mtime_ns, facts.st_size) != self._stamp:
                self._stamp = facts.st_mtime_ns, facts.st_size
                self._keys = read_keys(self._path)
        except (OSError, ConfigError):
            pass

    async def _count(self, caller: Caller) -> None:
        rate = caller.rate or self._rate
        if rate is None:
            return
        item = self._parsed.get(rate) or self._parsed.setdefault(rate, limits.parse(rate))
        try:
            if await self._rates.hit(item, caller.id):
                return
            reset = (await self._rates.get_window_stats(item, caller.id)).reset_time
        except limits.errors.StorageError:
            raise Refused(503, "the rate store does not answer", headers={"Retry-After": "1"}) from None
        wait = max(1, int(reset - time.time()) + 1)
        raise Refused(429, f"rate limit of {item} exceeded; wait", headers={"Retry-After": str(wait)})


def _unknown(detail: str) -> Refused:
    return Refused(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _storage(uri: str) -> Storage:
    from limits.storage import storage_from_string

    options: dict[str, Any] = {"implementation": "redispy"} if uri.startswith("redis") else {}
    try:
        made = storage_from_string(f"async+{uri}", wrap_exceptions=True, **options)
    except (limits.errors.ConfigurationError, ImportError) as error:
        raise ConfigError(f"rate_store {uri!r} cannot be used: {error}") from error
    assert isinstance(made, Storage)
    return made
