"""Ids of requests and answers."""

from __future__ import annotations

import hashlib
import itertools
import secrets

_SECRET, _NUMBERS = secrets.token_bytes(32), itertools.count()


def new_id() -> str:
    """32 hexadecimal digits that nobody can guess.

    The system's random numbers would do, but reading them lets go of the interpreter's lock, and whoever does that has
    to wait while another thread computes answers.
    """
    return hashlib.blake2b(next(_NUMBERS).to_bytes(8), key=_SECRET, digest_size=16).hexdigest()
