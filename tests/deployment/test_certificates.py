"""Keys that Flower takes, and certificates that OpenSSL's rules accept."""

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jaxfed.deployment.certificates import write_certificates


def test_certificates_are_signed_and_keys_are_private(tmp_path):
    folder = tmp_path / "keys"
    write_certificates(folder, 2)
    authority, server = (
        x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes()) for name in ("ca", "server")
    )
    server.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    private = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    assert private.public_key() == server.public_key()
    for node in ("node0", "node1"):
        key = serialization.load_ssh_private_key((folder / node).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.public_key() == serialization.load_ssh_public_key((folder / f"{node}.pub").read_bytes())
    for name in ("server.key", "node0", "node1"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    before = (folder / "ca.crt").read_bytes()
    write_certificates(folder, 2)
    assert (folder / "ca.crt").read_bytes() == before
