"""Keys of nodes, P-384 as Flower's SuperNodes have them: read, written as one line, and what is signed by them.

Imports neither Flower nor PyTorch: whoever gives a wrong key is told at once.
"""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedclip.options import ConfigError

KIND = "ecdsa-sha2-nistp384"  # RFC 5656, section 3.1
OTHERS = 0o077  # the bits of a file's mode that let anybody but its owner at it


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a file that its owner alone may read: P-384, in OpenSSH format, without a passphrase.

    Raises:
        ConfigError: there is no such file, others may read it, or it holds anything else.
    """
    try:
        text, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path}: no private key can be read there ({error.strerror}); `fedclip keys node NAME OUT` makes one.") from None
    if mode & OTHERS:
        raise ConfigError(f"{path}: others than its owner may use this private key (mode {mode & 0o777:04o}): chmod 600 {path}")
    try:
        key = serialization.load_ssh_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # a passphrase is a TypeError
        raise ConfigError(
            f"{path}: this is no private key in OpenSSH format, or it has a passphrase, which nobody is there to type. "
            f"Where it is a private key, `ssh-keygen -p -N '' -f {path}` makes it one; `fedclip keys node NAME OUT` makes a new one."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: this private key is not on the curve P-384; `fedclip keys node NAME OUT` makes one that is.")
    return key


def sign(key: ec.EllipticCurvePrivateKey, text: bytes) -> bytes:
    """Return the signature of a text: ECDSA with SHA-384 (FIPS 186-5, section 6), DER, up to 104 bytes, other bytes each time."""
    return key.sign(text, ec.ECDSA(hashes.SHA384()))


def verified(public: str, text: bytes, signature: bytes) -> bool:
    """Return whether the holder of a public key signed a text.

    Guarantees: false for whatever is wrong, be it no key, another curve, no signature or no bytes; it never raises. A signature proves who
    signed and is no number for what was signed: anybody can turn it into a second one of the same text.

    Args:
        public: the key, as `public_line` takes it.
        text: what was signed.
        signature: what `sign` returned.
    """
    try:
        _public(public).verify(signature, text, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError, AttributeError):
        return False
    return True


def public_line(text: str | bytes) -> str:
    """Return a public key as the one line that stands for it: `ecdsa-sha2-nistp384 AAAA...`, without comment.

    Args:
        text: a line in OpenSSH format, with or without a comment, or a PEM block as Flower's `NodeInfo` carries it.

    Raises:
        ConfigError: it is no public key, or not one on P-384.
    """
    return _line(_public(text))


def public_of(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the line of the public key that belongs to a private one."""
    return _line(key.public_key())


def fingerprint(public: str) -> str:
    """Return what people tell keys apart by, `SHA256:...` as `ssh-keygen -l` has it.

    Raises:
        ConfigError: as `public_line`.
    """
    digest = hashlib.sha256(base64.b64decode(public_line(public).split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _public(text: str | bytes) -> ec.EllipticCurvePublicKey:
    data = (text.encode(errors="replace") if isinstance(text, str) else text).strip()
    if b"PRIVATE KEY-----" in data:
        raise ConfigError("This is a private key, which never leaves its node; give the public one, NAME.pub beside it.")
    try:
        if data.startswith(b"-----BEGIN"):
            key: object = serialization.load_pem_public_key(data)
        else:
            words = data.split()
            if data.count(b"\n") or words[:1] != [KIND.encode()]:  # options before the key and OpenSSH's certificates are no keys
                raise ValueError
            key = serialization.load_ssh_public_key(b" ".join(words[:2]))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        shown = data[:40].decode(errors="replace")
        raise ConfigError(f"Expected a public key on P-384, `{KIND} AAAA...` on one line, got {shown!r}; `fedclip keys node` makes one.")
    return key
