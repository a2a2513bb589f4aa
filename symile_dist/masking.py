"""What of a config or a message may be shown: one judgement for page, comparison and loggers."""

from __future__ import annotations

import re
from typing import Any

from symile_dist.storage import without_secrets

MASK = "***"
_USER_INFO = re.compile(r"(?<=://)(?:[^\s\"'/@:\\]*:[^\s\"'@\\]*|[^\s\"'/@\\]+)@")
_SECRET_WORDS = frozenset(
    {
        "secret",
        "secrets",
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "token",
        "tokens",
        "credential",
        "credentials",
        "auth",
        "authorization",
        "bearer",
        "apikey",
        "apikeys",
        "accesskey",
        "secretkey",
        "privatekey",
    }
)
_SECRET_PAIRS = re.compile(r"(?:api|access|secret|private)_keys?(?:_|$)")
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret(key: str) -> bool:
    """Whether a key of a config is called like a secret: `api_key`, `apiKey`, `hf_token`, `auth`, ...

    `token_file`, which names where one stands, and `tokenizer` are not.
    """
    name = re.sub(r"[^a-z0-9]+", "_", _CAPITAL.sub("_", key).lower())
    if name.endswith(("_file", "_path", "_name", "_env")):
        return False
    return not _SECRET_WORDS.isdisjoint(name.split("_")) or _SECRET_PAIRS.search(name) is not None


def masked(text: str) -> str:
    """Text that may be shown: users, passwords and signatures of URLs are cut out, and the environment's keys."""
    text = without_secrets(text)
    return _USER_INFO.sub(f"{MASK}@", text) if "://" in text else text


def masked_data(value: Any, key: str = "") -> Any:
    """Plain data that may be shown: as `masked`, and without whatever stands under a key that is called like a secret.

    Numbers and switches stay (`tokens: 77`), and what is empty.
    """
    if isinstance(value, dict):
        if is_secret(key) and not all(isinstance(part, dict) for part in value.values()):
            return dict.fromkeys(value, MASK)
        return {name: masked_data(part, str(name)) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_data(part, key) for part in value]
    if isinstance(value, str):
        return MASK if value and is_secret(key) else masked(value)
    return value
