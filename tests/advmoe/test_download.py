# SPDX-License-Identifier: Apache-2.0
"""Archives fetched from a server in this process: checked, unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_runs import write_cifar10

from advmoe import cli
from advmoe.data import DataError, download, load
from advmoe.data.download import ARCHIVES, Archive


@pytest.fixture()
def served() -> Iterator[dict[str, bytes | int]]:
    """What a path of the server answers: content, or a status."""
    answers: dict[str, bytes | int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers[self.path]
            if isinstance(answer, int):
                self.send_error(answer)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[:-100] if "short" in self.path else answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers["port"] = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def _packed(folder: Path, suffix: str) -> bytes:
    memory = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(memory, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(fileobj=memory, mode="w:gz") as tar:
            tar.add(folder, folder.name)
    return memory.getvalue()


def _offer(
    monkeypatch: pytest.MonkeyPatch,
    served: dict[str, bytes | int],
    content: bytes | int,
    file: str,
    sha256: str | None = None,
) -> None:
    served[f"/{file}"] = content
    right = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else ""
    url = f"http://127.0.0.1:{served['port']}/{file}"
    archive = Archive("the CIFAR-10 python version", url, "cifar-10-batches-py", sha256 or right, ("test_batch",))
    monkeypatch.setitem(ARCHIVES, "cifar10", archive)


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_fetched_checked_and_unpacked(
    tmp_path: Path, served: dict[str, bytes | int], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    write_cifar10(tmp_path / "there")
    _offer(monkeypatch, served, _packed(tmp_path / "there" / "cifar-10-batches-py", suffix), f"cifar{suffix}")
    target = download("cifar10", tmp_path / "new" / "here")
    assert target == tmp_path / "new" / "here" / "cifar-10-batches-py"
    assert len(load("cifar10", target.parent).train) == 90
    assert [each.name for each in target.parent.iterdir()] == ["cifar-10-batches-py"]
    served.clear()  # it is there: nothing is asked for
    assert download("cifar10", target.parent) == target == download("cifar10", target)
    (target / "test_batch").unlink()
    with pytest.raises(DataError, match="is there and has no test_batch; remove it to fetch it anew"):
        download("cifar10", target.parent)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("checksum", r"has the SHA-256 checksum [0-9a-f]{64}, expected 0+; try again"),
        (
            "404",
            r"cannot be fetched \(.*Not Found\); without a network, get the CIFAR-10 python version elsewhere, unpack",
        ),
        ("short", r"has the SHA-256 checksum|cannot be fetched"),
        ("refused", r"cannot be fetched \(.*refused\); without a network"),
        ("no archive", r"cannot be unpacked \(BadGzipFile"),
        ("folder", r"has no folder cifar-10-batches-py"),
        ("outside", r"cannot be unpacked \(ValueError: .*escaped. would lie outside"),
        ("disk full", r"target cannot be written: No space left"),
    ],
)
def test_nothing_is_left_of_a_fault(
    tmp_path: Path, served: dict[str, bytes | int], monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    write_cifar10(tmp_path / "there")
    folder, content = tmp_path / "there" / "cifar-10-batches-py", b"no archive at all"
    if fault == "folder":
        folder = folder.rename(tmp_path / "other")
    if fault == "outside":
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
        content = memory.getvalue()
    elif fault != "no archive":
        content = _packed(folder, ".tar.gz")
    name = "short.tar.gz" if fault == "short" else "cifar.tar.gz"
    answer = 404 if fault == "404" else content
    _offer(monkeypatch, served, answer, name, {"checksum": "0" * 64}.get(fault))
    if fault == "refused":
        nowhere = Archive("the CIFAR-10 python version", "http://127.0.0.1:1/a", "a", "", ("test_batch",))
        monkeypatch.setitem(ARCHIVES, "cifar10", nowhere)
    if fault == "disk full":
        opened = Path.open

        def full(path: Path, *mode: str) -> object:
            return opened(Path("/dev/full") if path.suffix == ".gz" else path, *mode)

        monkeypatch.setattr(Path, "open", full)
    target = tmp_path / "target"
    with pytest.raises(DataError, match=message):
        download("cifar10", target)
    assert list(target.glob("*")) == [] and not list(tmp_path.rglob("escaped"))


def test_what_cannot_be_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="download: only cifar10, cifar100, tiny_imagenet can be fetched, got 'imagenet'"
    ):
        download("imagenet", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        download("cifar10", tmp_path / "file" / "below")
    assert cli.main(["train", "--data", "cifar10", "--download", "--out", str(tmp_path / "run")]) == 2
    assert "--download: needs --data-dir" in capsys.readouterr().err


def test_the_command_fetches(
    tmp_path: Path, served: dict[str, bytes | int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path / "there")
    _offer(monkeypatch, served, _packed(tmp_path / "there" / "cifar-10-batches-py", ".tar.gz"), "cifar.tar.gz")
    words = ["--data", "cifar10", "--data-dir", str(tmp_path / "new"), "--download"]
    small = ["--kind", "s_dense", "--width", "4", "--method", "standard", "--epochs", "1", "--batch-size", "32"]
    assert cli.main(["train", *words, *small, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "new" / "cifar-10-batches-py" / "test_batch").is_file()
    capsys.readouterr()
    assert cli.main(["evaluate", "module:function", "--download", "--data-dir", str(tmp_path)]) == 2
    assert "--download: needs --data" in capsys.readouterr().err
