import pytest

from clip_deploy.core import environment

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def machine_of(tmp_path, monkeypatch):
    """The machine whose id file holds `content`, or that has no such file."""

    def read(content):
        monkeypatch.setattr(environment, "MACHINE_ID", tmp_path / "machine-id")
        if content is not None:
            (tmp_path / "machine-id").write_text(content)
        return environment.machine()

    return read


def test_a_machine_is_known_by_a_keyed_hash_of_its_id(machine_of):
    """As `echo -n clip-deploy | openssl dgst -sha256 -mac HMAC -macopt hexkey:ID` gives it, shortened."""
    assert machine_of(f"{ID}\n") == "4967b3e9ecac"
    assert machine_of(f"{ID[::-1]}\n") != "4967b3e9ecac"


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "host-7\n"])
def test_a_machine_without_an_id_is_none_in_particular(machine_of, content):
    assert machine_of(content) is None
