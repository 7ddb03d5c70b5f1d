"""Credentials in addresses: refused in settings, and masked in all output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

# Every repetition is limited, so that the time is linear in the length of the text.
_LOGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,30}:/{1,2})(?:"  # as a path, an address has one slash
    r"[^/?#@:\s]{0,200}:(?!\d*(?:[/?#\s'\"]|$))\S{0,2000}"  # user:password, of any characters; but not host:port
    r"|(?P<user>(?<=//)(?<!abfs://)(?<!abfss://)[^/?#@:\s]{1,2000})"  # Azure's abfs://container@account has no user
    r")@",
    re.IGNORECASE,
)
_PARAMETER: Final = re.compile(
    r"(?<=[?&;#])(?P<name>sig|"
    r"[^\s=&;?#]{0,50}(?:%|key|secret|token|passw|pwd|signature|credential(?!_kind))[^\s=&;?#]{0,50}"
    r")=[^\s&;#'\"]*",
    re.IGNORECASE,
)


def held_credentials(key: str, text: str) -> Iterator[str]:
    """Yield a problem if the value of the setting `key` holds credentials in an address, without repeating them."""
    if "://" not in text:
        return
    held = ["a user" if found["user"] else "a password" for found in _LOGIN.finditer(text)]
    held += [found["name"] for found in _PARAMETER.finditer(text)]
    if held:
        variables = {
            "log.mlflow.tracking_uri": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            "cluster.address": "RAY_AUTH_TOKEN",
        }.get(key, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        yield (
            f"{key}: holds credentials ({', '.join(held)[:80]}), which run folders and logs would show; "
            f"give them by the environment ({variables})"
        )


def without_credentials(text: str) -> str:
    """Replace the credentials of all addresses in a text by ``***``."""
    return _PARAMETER.sub(r"\g<name>=***", _LOGIN.sub(r"\g<scheme>***@", text))
