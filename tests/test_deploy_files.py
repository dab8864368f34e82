"""What deploy/ makes and names; tests/integration runs it."""

import configparser
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from hosl_flower.flower.processes import script

ROOT = Path(__file__).parents[1]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
FILE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_a_certificate_is_for_the_names_given_and_the_machine_itself(tmp_path):
    """A SuperLink's own processes dial 127.0.0.1, and wait for ever if it is for other names."""
    make = ROOT / "deploy" / "certificates.sh"
    hosts = ["server.example.org", "192.0.2.7", "localhost"]
    subprocess.run([make, tmp_path, *hosts], capture_output=True, check=True)
    made = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "server.example.org"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert [str(address) for address in addresses] == ["127.0.0.1", "192.0.2.7"]


@pytest.mark.parametrize("command", ["flower-superlink", "flower-supernode"])
def test_the_commands_have_the_options_they_are_given(command):
    asked = subprocess.run([script(command), "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z-]+", asked.stdout))
    commands = [service["command"] for service in FILE["services"].values()]
    given = {
        part.partition("=")[0] for first, *rest in commands if first == command for part in rest
    }
    assert given
    assert given <= known


def test_services_get_the_secrets_they_name_and_no_others():
    for service in FILE["services"].values():
        named = re.findall(r"/run/secrets/([\w.]+)", " ".join(service["command"]))
        assert sorted(named) == sorted(service["secrets"])
    files = {Path(secret["file"]).name for secret in FILE["secrets"].values()}
    assert "ca.key" not in files
    assert all(Path(secret["file"]).name == name for name, secret in FILE["secrets"].items())


def test_every_service_keeps_its_state_in_a_volume_of_its_own():
    for name, service in FILE["services"].items():
        assert service["volumes"] == [f"{name}:/var/lib/hosl-flower"]
    assert set(FILE["volumes"]) == set(FILE["services"])


def test_the_image_copies_what_its_context_has():
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = [
        part for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for part in line.split()[:-1]
    ]
    assert len(copied) == 6
    for name in copied:
        assert (ROOT / name).exists()
        assert any(line[0] == "!" and fnmatch(name, line[1:]) for line in kept)


def test_containers_have_no_privileges_and_write_to_their_volume_alone():
    for service in FILE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert "privileged" not in service
        assert "cap_add" not in service


def directives(unit):
    """Of a unit's [Service]; one that is given twice as its lines."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str
    text = unit.read_text()
    parser.read_string(text)
    filters = re.findall(r"^SystemCallFilter=(.*)$", text, re.M)
    return {**parser["Service"], "SystemCallFilter": filters}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_service_has_no_privileges_and_sees_little(unit):
    own = directives(unit)
    for name in (
        "DynamicUser", "LockPersonality", "NoNewPrivileges", "PrivateMounts", "PrivateTmp",
        "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname",
        "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces",
        "RestrictRealtime", "RestrictSUIDSGID",
    ):  # fmt: skip
        assert own[name] == "yes", name
    assert own["CapabilityBoundingSet"] == ""
    assert own["ProtectSystem"] == "strict"
    assert own["ProtectProc"] == "invisible"
    assert own["UMask"] == "0077"
    assert own["SystemCallArchitectures"] == "native"
    assert own["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert "AF_INET" in own["RestrictAddressFamilies"]
    assert "AF_PACKET" not in own["RestrictAddressFamilies"]
    # torch's kernels made at run time, and GPUs
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "DevicePolicy"} & own.keys()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_rates_a_service_as_little_exposed(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in said.stderr:
        pytest.skip("systemd before 250 rates no files")
    assert said.returncode == 0, said.stderr
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert float(level[1]) <= 2.0
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    lines = (verified.stdout + verified.stderr).splitlines()
    assert [line for line in lines if unit.name in line and "not executable" not in line] == []
