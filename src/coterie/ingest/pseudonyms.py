"""Keyed pseudonyms of worker ids: HMAC-SHA-256 (RFC 2104), so that without the key nobody can try ids out.

Ingest and the serving router must agree on every pseudonym, so both call this module; it imports the
standard library only. A worker id is an opaque key: its case and spaces count. Its Unicode form does not
(NFC): "é" typed as one character or as two is one person.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from coterie.errors import BadConfiguration

KEY_VARIABLE, KEY_FILE_VARIABLE = "COTERIE_PSEUDONYM_KEY", "COTERIE_PSEUDONYM_KEY_FILE"
MINIMUM_KEY_BYTES = 16
PREFIX, HEX_DIGITS = "w_", 32
KEY_METADATA = "key_fingerprint"  # of comparisons.parquet; empty: the worker ids are as they came

_REMEDY = (
    f"Make one with `export {KEY_VARIABLE}=$(openssl rand -hex 32)` and keep it with your secrets: "
    "another key makes other pseudonyms. To keep the worker ids as they are, say `--pseudonyms none`."
)


def load_key(environ: Mapping[str, str] = os.environ) -> bytes:
    """Read the key from COTERIE_PSEUDONYM_KEY, or from the file that COTERIE_PSEUDONYM_KEY_FILE names.

    The key is the UTF-8 bytes of the text without surrounding white space (hexadecimal digits are not
    decoded).

    Raises:
        BadConfiguration: neither is set, both are, the file cannot be read, or the key is under 16 bytes.
    """
    text, file = environ.get(KEY_VARIABLE), environ.get(KEY_FILE_VARIABLE)
    if text and file:
        raise BadConfiguration(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set. Unset one of them.")
    if not text and not file:
        raise BadConfiguration(
            f"no key for the pseudonyms: {KEY_VARIABLE} and {KEY_FILE_VARIABLE} are not set. {_REMEDY}"
        )
    where = KEY_VARIABLE
    if file:
        where = f"{KEY_FILE_VARIABLE} ({file})"
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfiguration(f"{where}: the key cannot be read: {error}. {_REMEDY}") from error
    key = (text or "").strip().encode("utf-8", "surrogateescape")
    if len(key) < MINIMUM_KEY_BYTES:
        raise BadConfiguration(
            f"{where}: a key of {len(key)} bytes; at least {MINIMUM_KEY_BYTES} are needed. {_REMEDY}"
        )
    return key


def pseudonym(key: bytes | None, worker_id: str) -> str:
    """The pseudonym of `worker_id`: "w_" and 128 bits of its HMAC in hex; without a key the id unchanged."""
    if key is None:
        return worker_id
    message = unicodedata.normalize("NFC", worker_id).encode("utf-8", "surrogatepass")
    return PREFIX + hmac.digest(key, message, "sha256").hex()[:HEX_DIGITS]


def fingerprint(key: bytes) -> str:
    """16 hex digits that tell keys apart and reveal neither the key nor any pseudonym made with it."""
    return hashlib.blake2b(key, digest_size=8, person=b"coterie-key").hexdigest()
