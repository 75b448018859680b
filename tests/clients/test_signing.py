"""Keys of nodes: what is read, what is refused, and that a signature holds for its text and its key alone."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.signing import fingerprint, public_line, public_of, read_private, sign, verified
from fedclip.options import ConfigError

KEY, OTHER = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
LINE = public_of(KEY)
SIGNATURE = sign(KEY, b"a text")
# From `ssh-keygen -t ecdsa -b 384` and `ssh-keygen -l` of OpenSSH 9.2.
KNOWN = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBCEuVLAb+30n/rKPMRRgeFSXoPUe"
    "i8rqcRZfk04hVcWCHHHzFdm7EZ4rw7be1uWkA7Cgu69vxFfqnlSiYHT6JUbwrPcYWm1B7Il0sLuHn1x57hHCw2Nd1fjFuCwY9ng28g=="
)
KNOWN_FINGERPRINT = "SHA256:mWCbwoAclCQS9gtdhhzvaVHzCwmeKhHgxbXt+DjUplA"


def private(key: ec.EllipticCurvePrivateKey, form: str = "OpenSSH") -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, getattr(serialization.PrivateFormat, form), serialization.NoEncryption())


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write(path: Path, text: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_a_signature_holds_for_its_text_and_its_key_alone(tmp_path: Path) -> None:
    signature = sign(read_private(write(tmp_path / "node", private(KEY))), b"a text")
    assert verified(LINE, b"a text", signature)
    assert verified(f"{LINE} clinic-7\n", b"a text", signature)
    assert not verified(LINE, b"a text ", signature)
    assert not verified(public_of(OTHER), b"a text", signature)


@given(st.integers(0, 8 * len(SIGNATURE) - 1))
def test_a_flipped_bit_makes_a_signature_wrong(bit: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[bit // 8] ^= 1 << bit % 8
    assert not verified(LINE, b"a text", bytes(changed))


@settings(max_examples=200)
@given(
    st.one_of(st.text(), st.binary(), st.none(), st.integers(), st.text().map(lambda t: f"ecdsa-sha2-nistp384 {t}"), st.just(LINE[:60])),
    st.one_of(st.binary(), st.none()),
    st.one_of(st.binary(), st.none(), st.text(), st.just(SIGNATURE)),
)
def test_garbage_is_never_verified_and_never_raises(public, text, signature) -> None:
    assert verified(public, text, signature) is False
    assert verified(LINE, text, signature) is False


def test_signatures_of_another_curve_are_refused() -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    line = small.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    assert not verified(line, b"a text", sign(small, b"a text"))


@pytest.mark.parametrize(
    "form", [LINE, f"{LINE} clinic-7", f"  {LINE}  a comment, ü \r\n", LINE.encode() + b" \xff\n", pem(KEY), pem(KEY).decode()]
)
def test_every_form_of_a_public_key_is_one_line(form: str | bytes) -> None:
    assert public_line(form) == LINE


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("", "Expected a public key on P-384"),
        ("ecdsa-sha2-nistp384", "Expected a public key on P-384"),
        (LINE[:-8], "Expected a public key on P-384"),
        (f"{LINE}\n{public_of(OTHER)}", "on one line"),
        (f'command="x" {LINE}', "on one line"),
        (LINE.replace("ecdsa-sha2-nistp384 ", "ecdsa-sha2-nistp384-cert-v01@openssh.com "), "on one line"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "on P-384"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "on P-384"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "on P-384"),
        (private(KEY), "a private key, which never leaves its node"),
        (private(KEY, "PKCS8"), "a private key, which never leaves its node"),
    ],
)
def test_other_public_keys_are_refused(wrong: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        public_line(wrong)
    secret = private(KEY).split(b"\n")[1].decode()
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (private(KEY), 0o640, "mode 0640.: chmod 600"),
        (private(KEY), 0o604, "mode 0604.: chmod 600"),
        (private(KEY, "PKCS8"), 0o600, "no private key in OpenSSH format.*ssh-keygen -p -N ''"),
        (private(ec.generate_private_key(ec.SECP256R1())), 0o600, "not on the curve P-384"),
        (LINE.encode(), 0o600, "no private key in OpenSSH format"),
        (b"", 0o600, "no private key in OpenSSH format"),
    ],
)
def test_other_private_keys_are_refused_by_name_cause_and_remedy(tmp_path: Path, text: bytes, mode: int, said: str) -> None:
    path = write(tmp_path / "node", text, mode)
    with pytest.raises(ConfigError, match=f"^{path}: .*{said}"):
        read_private(path)


def test_a_file_that_is_not_there_is_said_by_name(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path}: .*{cause}.*fedclip keys node"):
            read_private(path)


def test_a_fingerprint_is_the_one_of_ssh_keygen() -> None:
    assert public_line(f"{KNOWN} someone") == KNOWN
    assert fingerprint(KNOWN) == KNOWN_FINGERPRINT


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_key_of_ssh_keygen_is_read(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "node"], check=True)
    line = public_line((tmp_path / "node.pub").read_bytes())
    assert verified(line, b"a text", sign(read_private(tmp_path / "node"), b"a text"))
    # The remedy for a passphrase, done.
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", tmp_path / "node"], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(ConfigError, match="passphrase"):
        read_private(tmp_path / "node")
    remedy = ["ssh-keygen", "-q", "-p", "-P", "secret", "-N", "", "-f", tmp_path / "node"]
    subprocess.run(remedy, check=True, stdout=subprocess.DEVNULL)
    assert public_of(read_private(tmp_path / "node")) == line
