"""Downloads from a server on this machine: right, wrong or no file, no server, cut connection."""

import hashlib
import io
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nbhelpers.datasets import download
from nbhelpers.datasets.download import DownloadError, RemoteFile, Source, fetch

PHOTOS = {"photos/0001.png": b"first" * 1000, "photos/deep/0002.png": b"second" * 1000}


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        for name, data in members.items():
            pack.writestr(name, data)
    return buffer.getvalue()


def make_tgz(members, link=False):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as pack:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            pack.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("photos/link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            pack.addfile(info)
    return buffer.getvalue()


class Server:
    """Serves `files`; a name in `broken` announces the whole length and hangs up half-way."""

    def __init__(self):
        self.files, self.broken, self.asked = {}, set(), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1]
                outer.asked.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                data = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if name in outer.broken else data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """offer(data): the server holds it as photos.zip, and the collection "toy" knows its hash."""

    def register(data, name="photos.zip", extra=()):
        server.files[name] = data
        files = [RemoteFile(name, f"md5:{hashlib.md5(data).hexdigest()}"), *extra]
        source = Source(server.url, tuple(files), "", "photos", "made up for the test")
        monkeypatch.setitem(download.SOURCES, "toy", lambda: source)
        return source

    return register


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/data"


def assert_photos(folder):
    for name, data in PHOTOS.items():
        assert (folder.parent / name).read_bytes() == data


def leftovers(target):
    """Names in target beside a complete archive and its photos."""
    return sorted(p.name for p in target.iterdir() if p.name not in ("photos", "photos.zip"))


@pytest.mark.parametrize(("make", "name"), [(make_zip, "photos.zip"), (make_tgz, "photos.tgz")])
def test_download_and_unpack_once(offer, server, tmp_path, make, name):
    offer(make(PHOTOS), name)
    folder = fetch("toy", tmp_path, progress=False)
    assert folder == tmp_path / "photos"
    assert_photos(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", name]
    assert fetch("toy", tmp_path, progress=False) == folder
    (tmp_path / name).unlink()  # once unpacked the archive is not needed
    assert fetch("toy", tmp_path, progress=False) == folder
    assert server.asked == [name]


def test_default_target_and_progress_bar(offer, tmp_path, monkeypatch, capsys):
    offer(make_zip(PHOTOS))
    monkeypatch.setattr(download.runtime, "RUNS", tmp_path)
    assert fetch("toy") == tmp_path / "downloads" / "toy" / "photos"
    err = capsys.readouterr().err
    assert "photos.zip" in err and "100%" in err


def test_other_server(offer, server, tmp_path, monkeypatch):
    source = offer(make_zip(PHOTOS))
    elsewhere = Source("http://nowhere.invalid/", source.files, "", "photos", "")
    monkeypatch.setitem(download.SOURCES, "toy", lambda: elsewhere)
    assert_photos(fetch("toy", tmp_path, progress=False, base_url=server.url))


def test_wrong_hash_is_refused_and_removed(offer, server, tmp_path):
    source = offer(make_zip(PHOTOS))
    server.files["photos.zip"] = make_zip({"photos/0001.png": b"something else"})
    with pytest.raises(DownloadError, match="damaged or has changed and was removed") as error:
        fetch("toy", tmp_path, progress=False)
    assert source.files[0].hash in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_on_the_server(offer, server, tmp_path):
    offer(make_zip(PHOTOS))
    server.files.clear()
    with pytest.raises(DownloadError, match=r"answered 404 for http://127\.0\.0\.1:\d+/data/photos\.zip"):
        fetch("toy", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_connection_says_what_to_do(offer, tmp_path):
    source = offer(make_zip(PHOTOS))
    url = closed_port()
    with pytest.raises(DownloadError) as error:
        fetch("toy", tmp_path / "here", progress=False, base_url=url)
    message = str(error.value)
    assert "no connection to" in message and f"download {url}/photos.zip by hand" in message
    assert f"put it in {tmp_path / 'here'}" in message and source.files[0].hash in message


def test_cut_connection_leaves_nothing(offer, server, tmp_path):
    offer(make_zip({**PHOTOS, "photos/big.bin": bytes(3_000_000)}))
    server.broken.add("photos.zip")
    with pytest.raises(DownloadError, match=r"photos\.zip"):
        fetch("toy", tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.broken.clear()
    assert_photos(fetch("toy", tmp_path, progress=False))


def test_archive_put_there_by_hand_works_offline(offer, tmp_path):
    data = make_zip(PHOTOS)
    offer(data)
    (tmp_path / "photos.zip").write_bytes(data)
    assert_photos(fetch("toy", tmp_path, progress=False, base_url=closed_port()))


def test_half_copied_archive_is_removed_and_fetched_again(offer, server, tmp_path):
    data = make_zip(PHOTOS)
    offer(data)
    (tmp_path / "photos.zip").write_bytes(data[:-100])
    with pytest.raises(DownloadError, match=r"copy found in that folder had the hash md5:\w+ and was removed"):
        fetch("toy", tmp_path, progress=False, base_url=closed_port())
    assert not (tmp_path / "photos.zip").exists()
    (tmp_path / "photos.zip").write_bytes(data[:-100])
    assert_photos(fetch("toy", tmp_path, progress=False))
    assert server.asked == ["photos.zip"]


def test_lost_photo_or_killed_unpacking_is_repaired(offer, server, tmp_path):
    offer(make_zip(PHOTOS))
    folder = fetch("toy", tmp_path, progress=False)
    (folder / "0001.png").unlink()
    assert_photos(fetch("toy", tmp_path, progress=False))
    (folder / download.COMPLETE).unlink()
    (folder / "0001.png").write_bytes(b"half")
    (tmp_path / ".photos.zip.unpacking").mkdir()
    assert_photos(fetch("toy", tmp_path, progress=False))
    assert leftovers(tmp_path) == [] and server.asked == ["photos.zip"]


def test_further_files_are_fetched_and_checked(offer, server, tmp_path):
    labels = b"labels"
    extra = RemoteFile("labels.mat", f"md5:{hashlib.md5(labels).hexdigest()}")
    server.files["labels.mat"] = labels
    offer(make_zip(PHOTOS), extra=[extra])
    fetch("toy", tmp_path, progress=False)
    assert (tmp_path / "labels.mat").read_bytes() == labels
    (tmp_path / "labels.mat").unlink()
    fetch("toy", tmp_path, progress=False)
    assert (tmp_path / "labels.mat").exists()


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "photos/../../evil.png", "..\\evil.png", "C:evil.png"])
def test_unsafe_names_are_refused(offer, tmp_path, name):
    offer(make_zip({**PHOTOS, name: b"evil"}))
    with pytest.raises(DownloadError, match="unsafe name"):
        fetch("toy", tmp_path / "target", progress=False)
    assert list(tmp_path.rglob("*evil*")) == []
    assert leftovers(tmp_path / "target") == [] and not (tmp_path / "target" / "photos").exists()


def test_links_are_refused(offer, tmp_path):
    offer(make_tgz(PHOTOS, link=True), "photos.tgz")
    with pytest.raises(DownloadError, match="link or device"):
        fetch("toy", tmp_path, progress=False)
    assert not (tmp_path / "photos").exists()


def test_not_an_archive_and_archive_without_photos(offer, tmp_path):
    offer(b"<html>please log in</html>")
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        fetch("toy", tmp_path / "a", progress=False)
    offer(make_zip({"other/1.png": b"x"}))
    with pytest.raises(DownloadError, match="has no folder 'photos'"):
        fetch("toy", tmp_path / "b", progress=False)


def test_unwritable_target(offer, tmp_path):
    offer(make_zip(PHOTOS))
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="could not write the collection 'toy'"):
        fetch("toy", tmp_path / "file" / "target", progress=False)


def test_known_collections():
    with pytest.raises(ValueError, match=r"'imagenet'; known are div2k_train, div2k_valid, flowers102"):
        fetch("imagenet")
    from torchvision.datasets import Flowers102

    flowers = download.SOURCES["flowers102"]()
    assert flowers.base_url + flowers.files[0].name == Flowers102._download_url_prefix + "102flowers.tgz"
    assert [f.hash[4:] for f in flowers.files] == [Flowers102._file_dict[k][1] for k in ("image", "label", "setid")]
    for part in ("train", "valid"):
        source = download.SOURCES[f"div2k_{part}"]()
        assert source.files[0].name == f"DIV2K_{part}_HR.zip" and source.photos == f"DIV2K_{part}_HR"
