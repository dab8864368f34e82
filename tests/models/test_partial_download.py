"""Downloading the tensors of one side alone, from a small server that speaks the hub's protocol."""

import re
import threading
from http.server import ThreadingHTTPServer

import httpx
import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from safetensors import safe_open

from hosl_flower.errors import ModelError
from hosl_flower.models.base_model import open_base
from hosl_flower.models.checkpoints import hub as hub_module
from hosl_flower.models.checkpoints import partial_download as ranged
from hosl_flower.models.split import client_skeleton, load_client
from hosl_flower.models.submodels import count

MODEL = "org/opt-test"


class RangedHub(Hub):
    """As huggingface.co: ranges of files. stop_after: bytes of a body after which the connection
    is cut. sent: bytes of bodies so far. ranges: False for a server that sends files whole."""

    ranges = True
    stop_after: int | None = None
    sent: list[int]

    def _send(self, status, headers, data, body):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if status == 200 and self.ranges and wanted:
            start, end = int(wanted[1]), int(wanted[2])
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            status, data = 206, data[start : end + 1]
        cut = type(self).stop_after
        if not (body and status == 206 and cut is not None and len(data) > cut):
            self.sent.append(len(data) if body else 0)
            super()._send(status, headers, data, body)
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.sent.append(cut)
        self.close_connection = True


def endpoint(monkeypatch, port):
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tiny_opt, tmp_path, monkeypatch):
    """A hub with one model, and what `open_base` needs to find it there."""
    directory, model = tiny_opt()
    handler = type("TestHub", (RangedHub,), {"repositories": {MODEL: directory}, "requested": []})
    handler.sent, handler.model = [], model
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub_module, "is_reachable", lambda: True)
    monkeypatch.setenv("HOSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranged, "_PAUSE", 0.0)
    yield handler
    server.shutdown()
    server.server_close()


def client(cut=1):
    return load_client(open_base(MODEL, partial=True), cut, torch.float32, "cpu")


def same(submodel, model):
    whole = dict(model.named_parameters())
    return all(torch.equal(p, whole[n]) for n, p in submodel.canonical_parameters().items())


def test_a_client_downloads_its_own_tensors_and_no_others(hub, tmp_path):
    file = hub.repositories[MODEL] / "model.safetensors"
    own = 4 * count(client_skeleton(open_base(str(file.parent)).config, 1).canonical_parameters())
    assert same(client(), hub.model)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    config = (file.parent / "config.json").stat().st_size
    assert sum(hub.sent) == config + header + own
    assert sum(hub.sent) < file.stat().st_size
    assert not list(tmp_path.glob("hf/**/*.safetensors"))
    before = sum(hub.sent)
    assert same(client(), hub.model)  # cached
    assert sum(hub.sent) == before
    assert same(client(cut=2), hub.model)
    block = sum(p.numel() for p in hub.model.model.decoder.layers[1].parameters())
    assert sum(hub.sent) == before + 4 * block


def test_what_was_downloaded_works_without_the_hub(hub, monkeypatch):
    client()
    monkeypatch.setattr(hub_module, "is_reachable", lambda: False)
    endpoint(monkeypatch, 9)  # nobody listens there
    assert same(client(), hub.model)
    with pytest.raises(ModelError, match=r"layers.1.* stopped after 0 of \d+ bytes"):
        client(cut=2)


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub):
    hub.stop_after = 1000
    assert same(client(), hub.model)
    largest = 4 * hub.model.model.decoder.embed_tokens.weight.numel()
    assert hub.sent.count(1000) >= largest // 1000
    whole = sum(p.numel() for p in client().parameters()) * 4
    assert sum(hub.sent) < 1.2 * whole + 5000  # nothing came twice


def test_a_download_that_failed_is_continued_by_the_next_process(hub, monkeypatch, tmp_path):
    hub.stop_after = 1000
    calls = []

    def fails(url, start, end):
        calls.append(start)
        if start > 8 and len(calls) > 10:
            raise httpx.ConnectError("cable pulled")
        yield from original(url, start, end)

    original = ranged._range
    monkeypatch.setattr(ranged, "_range", fails)
    message = r"'model.decoder.\S+' of org/opt-test/model.safetensors stopped after \d+ of \d+ byt"
    with pytest.raises(ModelError, match=message):
        client()
    assert list(tmp_path.glob("cache/**/*.part"))
    monkeypatch.setattr(ranged, "_range", original)
    assert same(client(), hub.model)
    assert not list(tmp_path.glob("cache/**/*.part"))


def test_a_server_without_ranges_sends_the_file_whole(hub, tmp_path):
    hub.ranges = False
    assert same(client(), hub.model)
    assert list(tmp_path.glob("hf/**/*.safetensors"))
    hub.ranges, hub.sent[:] = True, []
    assert same(client(), hub.model)  # the cached file, not its pieces
    assert not hub.sent or max(hub.sent) == 0


def test_another_version_on_the_hub_is_another_file(hub, tmp_path):
    client()
    with torch.no_grad():
        for parameter in hub.model.parameters():
            parameter.add_(1)
    hub.model.save_pretrained(hub.repositories[MODEL])
    assert same(client(), hub.model)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff" * 64, r"no safetensors file: its header has \d+ bytes"),
        ((8).to_bytes(8, "little") + b"{]......", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        (
            (36).to_bytes(8, "little") + b'{"a":{"data_offsets":[8,4]}}'.ljust(36),
            "a tensor ends before it begins",
        ),
    ],
)
def test_a_damaged_file_is_one_clear_line(hub, content, complaint):
    (hub.repositories[MODEL] / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        client()
    assert "\n" not in str(caught.value)


def test_names_in_a_header_are_no_paths():
    assert ranged._plain("model.layers.0.fc1.weight") == "model.layers.0.fc1.weight"
    for name in ("../../etc/passwd", "/etc/passwd", "..", ".hidden", "a" * 300, "a\0b", ""):
        assert re.fullmatch("[0-9a-f]{32}", ranged._plain(name))


def test_pieces_are_safetensors_files(hub):
    name = "model.decoder.embed_tokens.weight"
    remote = ranged.locate(MODEL, "model.safetensors")
    with safe_open(remote.tensor(name), framework="pt") as file:
        assert list(file.keys()) == [name]
        assert torch.equal(file.get_tensor(name), dict(hub.model.named_parameters())[name])


def test_unknown_names_are_one_clear_line(hub):
    assert ranged.locate(MODEL, "other.safetensors") is None
    with pytest.raises(ModelError, match="check the name"):
        ranged.locate("org/unknown", "model.safetensors")
