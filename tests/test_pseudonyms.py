"""Pseudonyms are what the router and ingest must agree on, so their values are pinned here."""

import hashlib
import hmac
import subprocess
import sys
import unicodedata

import pytest

from coterie.errors import BadConfiguration
from coterie.ingest.pseudonyms import fingerprint, load_key, pseudonym

KEY = b"0123456789abcdef0123456789abcdef"


def test_golden_values():
    assert pseudonym(KEY, "w-17") == "w_264ffcc99c0489533ab3a707b12f6f09"
    assert fingerprint(KEY) == "924de18f89cf6df5"


def test_is_hmac_sha256_of_the_id():
    assert pseudonym(KEY, "anna") == "w_" + hmac.new(KEY, b"anna", hashlib.sha256).hexdigest()[:32]


def test_without_a_key_the_id_stays_as_it_is():
    assert pseudonym(None, " Anna ") == " Anna "


def test_depends_on_key_case_and_spaces():
    names = {pseudonym(KEY, "anna"), pseudonym(KEY, "Anna"), pseudonym(KEY, "anna "), pseudonym(KEY[::-1], "anna")}
    assert len(names) == 4


def test_unicode_form_does_not_matter():
    composed, decomposed = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert pseudonym(KEY, composed) == pseudonym(KEY, decomposed)


def test_fingerprint_tells_keys_apart_and_is_no_pseudonym():
    assert fingerprint(KEY) != fingerprint(KEY + b"0")
    assert fingerprint(KEY) not in pseudonym(KEY, "")


def test_key_from_variable_and_from_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("0123456789abcdef0123456789abcdef\n")
    assert load_key({"COTERIE_PSEUDONYM_KEY": KEY.decode()}) == KEY
    assert load_key({"COTERIE_PSEUDONYM_KEY_FILE": str(file)}) == KEY


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "openssl rand -hex 32"),
        ({"COTERIE_PSEUDONYM_KEY": ""}, "--pseudonyms none"),
        ({"COTERIE_PSEUDONYM_KEY": "short"}, "5 bytes"),
        ({"COTERIE_PSEUDONYM_KEY_FILE": "/does/not/exist"}, "/does/not/exist"),
        ({"COTERIE_PSEUDONYM_KEY": "a" * 32, "COTERIE_PSEUDONYM_KEY_FILE": "/x"}, "both"),
    ],
)
def test_a_missing_or_weak_key_is_refused_with_the_remedy(environ, words):
    with pytest.raises(BadConfiguration, match=words):
        load_key(environ)


def test_the_router_can_import_it_without_pyarrow():
    code = "import sys, coterie.ingest.pseudonyms; sys.exit('pyarrow' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
