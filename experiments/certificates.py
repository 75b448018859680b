"""The certificates of a deployment: an authority of its own, and the server's, as `flower-superlink` takes them (RFC 5280)."""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclip.options import ConfigError
from fedclip.storage import Storage, replace

AUTHORITY_DAYS = 3650
SKEW = timedelta(days=1)  # clocks of devices are late
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
HOST = re.compile(rf"(\*\.)?{LABEL}(\.{LABEL})*")


@dataclass(frozen=True)
class Authority:
    """Who signs certificates: its own one, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_server(folder: Path, hosts: Sequence[str], days: int) -> datetime:
    """Write a server's certificate and what it takes: `ca.crt`, `ca.key`, `server.pem`, `server.key`. Keys that are there are kept.

    Args:
        folder: where they are, or will be.
        hosts: the names and addresses by which nodes reach the server, at least one.
        days: how long the certificate holds.

    Returns:
        When the certificate ends.

    Raises:
        ConfigError: a host is neither name nor address, or what is in the folder does not go together.
    """
    names = [general_name(host) for host in dict.fromkeys(hosts)]
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).replace(microsecond=0)
    ends = now + timedelta(days=days)
    authority = _authority(folder, now, now + timedelta(days=max(days, AUTHORITY_DAYS)))
    if ends > authority.certificate.not_valid_after_utc:
        raise ConfigError(
            f"{folder / 'ca.crt'}: the authority ends on {authority.certificate.not_valid_after_utc:%Y-%m-%d}, before a certificate of "
            f"{days} days would; take fewer --days, or a new folder, whose ca.crt all nodes must then get."
        )
    certificate = _server(authority, _key(folder / "server.key"), names, now, ends)
    _write_certificate(folder / "server.pem", certificate)
    return ends


def general_name(host: str) -> x509.GeneralName:
    """Return a host as certificates have it: an IP address, or a DNS name.

    Raises:
        ConfigError: it is neither, as `https://example.org` or `example.org:9092`.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # A name that ends in a number is an address that someone mistyped (WHATWG URL, "ends in a number").
    if HOST.fullmatch(host) is None or len(host) > 253 or host.rpartition(".")[2].isdigit():
        raise ConfigError(f"--host: expected a name or an address without port, such as fl.example.org or 10.0.0.1, got '{host}'.")
    return x509.DNSName(host)


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read, where there is none.

    Raises:
        ConfigError: there is one already.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: it is there already, and a key is never overwritten; take another name or folder.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _authority(folder: Path, begins: datetime, ends: datetime) -> Authority:
    """Return the authority in a folder, which is made where there is none."""
    path = folder / "ca.crt"
    there = path.exists()
    if there != (folder / "ca.key").exists():
        raise ConfigError(f"{folder}: of ca.crt and ca.key one is missing; put it there, or take a new folder for a new authority.")
    key = _key(folder / "ca.key")
    if not there:
        certificate = _self_signed(key, begins, ends)
        _write_certificate(path, certificate)
        return Authority(certificate, key)
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        certificate.verify_directly_issued_by(certificate)
        ours = certificate.public_key() == key.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.ExtensionNotFound):
        ours = False
    if not ours:
        raise ConfigError(f"{path}: this is not the certificate of an authority whose key is ca.key; take a new folder for a new one.")
    return Authority(certificate, key)


def _self_signed(key: ec.EllipticCurvePrivateKey, begins: datetime, ends: datetime) -> x509.Certificate:
    usage = _usage(key_cert_sign=True, crl_sign=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The key is part of the name, so that an authority is never taken for the one that another folder has.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedclip authority {identifier.digest.hex()[:16]}")])
    return (
        _builder(name, name, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    authority: Authority, key: ec.EllipticCurvePrivateKey, hosts: Sequence[x509.GeneralName], begins: datetime, ends: datetime
) -> x509.Certificate:
    signer = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedclip server")])
    return (
        _builder(name, authority.certificate.subject, key.public_key(), begins, ends)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
        .sign(authority.key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - SKEW)
        .not_valid_after(ends)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature, False, False, False, False, key_cert_sign, crl_sign, False, False)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a PEM file, which is made where there is none."""
    if not path.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_secret(path, made.private_bytes(*form))
        return made
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: this is no private key of an elliptic curve, in PEM without a passphrase; take a new folder.")
    return key


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    replace(Storage(), path, [certificate.public_bytes(serialization.Encoding.PEM)])
