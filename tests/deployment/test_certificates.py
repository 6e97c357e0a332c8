"""Keys that Flower takes, and certificates that OpenSSL's rules accept."""

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jaxfed.deployment.certificates import write_certificates
from jaxfed.deployment.roster import IDENTITY, SECURE, read_node_identity
from tests.programs import run_program


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


def test_a_node_makes_its_key_once_for_itself_alone(tmp_path, monkeypatch, capsys):
    def ask(folder):
        return run_program(monkeypatch, capsys, "identity", folder)

    (code, first, _), (_, again, _) = ask(tmp_path), ask(tmp_path)
    assert (code, first) == (0, again)
    assert bytes.fromhex(first.strip()) == read_node_identity(tmp_path / SECURE).public_key().public_bytes_raw()
    for path, mode in ((tmp_path / SECURE, 0o700), (tmp_path / SECURE / IDENTITY, 0o600)):
        assert path.stat().st_mode & 0o777 == mode
    (tmp_path / SECURE / IDENTITY).write_bytes(b"short")
    code, _, said = ask(tmp_path)
    assert code == 2
    assert "restore it" in said
    code, _, said = ask(tmp_path / "other")
    assert code == 2
    assert "is no folder" in said
