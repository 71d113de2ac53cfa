"""Certificates that an endpoint is checked by."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from featureinterp.errors import InputError

_VARIABLES = {"SSL_CERT_FILE": "cafile", "SSL_CERT_DIR": "capath"}


def context_for(encrypted: bool) -> ssl.SSLContext | bool:
    """The certificates of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, else the system's; none are read for an
    address without encryption. Raises ``InputError`` for a variable that names no certificates."""
    if not encrypted:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for variable, argument in _VARIABLES.items():
        if place := os.environ.get(variable):
            exists = Path(place).is_file() if argument == "cafile" else Path(place).is_dir()
            if not exists:
                kind = "file" if argument == "cafile" else "folder"
                raise InputError(
                    f"the environment variable {variable} names {place!r}, which is no {kind}: correct it, "
                    "or unset it to use the system's"
                )
            try:
                if argument == "cafile":
                    return ssl.create_default_context(cafile=place)
                return ssl.create_default_context(capath=place)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"the environment variable {variable} names {place!r}, which holds no certificates "
                    f"({error}): correct or unset it"
                ) from None
    return True


def certificate_problem(error: BaseException) -> str | None:
    """What is wrong with a certificate or with the encryption, when that is why a connection failed."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return None
        inner = getattr(seen, "certificate_error", None) or getattr(
            seen, "os_error", None
        )  # aiohttp's wrap the one of ssl
        for candidate in (inner, seen):
            if isinstance(candidate, ssl.SSLCertVerificationError):
                return f"its certificate is not trusted: {getattr(candidate, 'verify_message', candidate)}"
            if isinstance(candidate, ssl.SSLError):
                return f"the encryption failed: {candidate.reason or candidate}"
        seen = seen.__cause__ or seen.__context__
    return None
