"""Keys and certificates for trying TLS and authentication out on one machine. Real ones come from whoever runs it."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 30
PRIVATE = 0o600


def write_private_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    """Writes a private key that nobody else may read."""
    encoding, none = serialization.Encoding.PEM, serialization.NoEncryption()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "wb") as file:
        file.write(key.private_bytes(encoding, form, none))


def make_certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """A certificate for this machine; of the issuer itself, that of an authority."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    now = datetime.datetime.now(datetime.UTC)
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .sign(signer, hashes.SHA256())
    )


def write_certificates(folder: Path, nodes: int) -> None:
    """Writes ca.crt, server.crt, server.key, and for each node nodeN and nodeN.pub, unless they are there.

    Args:
        folder: Where.
        nodes: Number of nodes.
    """
    if (folder / "ca.crt").exists():
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = "authority of a federation on trial"
    write_private_key(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    certificate = make_certificate("server", server, issuer, authority)
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    for node in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        write_private_key(folder / f"node{node}", key, serialization.PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"node{node}.pub").write_bytes(public)
    own = make_certificate(issuer, authority, issuer, authority)  # last: with it all are there
    (folder / "ca.crt").write_bytes(own.public_bytes(serialization.Encoding.PEM))
