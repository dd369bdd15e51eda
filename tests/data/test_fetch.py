"""The download: against a server on this machine that breaks off, lies, resumes."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

import nucseg.data.fetch
from nucseg.cli import main
from nucseg.data.datasets import ImageFolder, NuInsSeg, Tiles
from nucseg.data.fetch import bbbc038_list, fetch_bbbc038, fetch_nuinsseg
from nucseg.errors import InputError

SIZE = 128
TISSUE = "mouse fat (white and brown)_subscapula"


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def make_zip(extra=(), top="NuInsSeg/", count=3):
    """A small NuInsSeg.zip as bytes; ``extra``: more (name or ZipInfo, content) pairs."""
    noise = np.random.default_rng(0)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(1, count + 1):
            image = noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            mask = io.BytesIO()
            tifffile.imwrite(mask, np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) // (SIZE * SIZE // 4))
            archive.writestr(f"{top}{TISSUE}/tissue images/mouse_subscapula_0{i}.png", png(image))
            archive.writestr(f"{top}{TISSUE}/label masks modify/mouse_subscapula_0{i}.tif", mask.getvalue())
        for name, content in extra:
            archive.writestr(name, content)
    return out.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body`` at /NuInsSeg.zip; ``send`` bytes of it per answer at most, though it promises all."""

    daemon_threads = True

    def __init__(self, body, resume=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.resume, self.send, self.hang = body, resume, None, False
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/NuInsSeg.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if self.path != "/NuInsSeg.zip":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.resume else 0
        total = len(server.body)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        stop = total if server.send is None else start + server.send
        self.wfile.write(server.body[start:stop])
        self.wfile.flush()
        if server.hang:
            time.sleep(30)
        self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def start(body, **options):
        server = Server(body, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sha(body):
    return "sha256:" + hashlib.sha256(body).hexdigest()


def md5(body):
    return "md5:" + hashlib.md5(body).hexdigest()


def get(server, dest, known_hash=None):
    return fetch_nuinsseg(dest, url=server.url, known_hash=known_hash or sha(server.body), progress=False)


def refused(*words):
    """One sentence with those words."""
    return pytest.raises(InputError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{word})" for word in words) + r".*[^.]\.$")


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_good_path_leaves_the_dataset_and_nothing_else(tmp_path, serve, capfd):
    server = serve(make_zip())
    dest = get(server, tmp_path / "deep" / "data", md5(server.body))
    assert dest == tmp_path / "deep" / "data"
    data = NuInsSeg(dest)
    assert len(data) == 3 and data[0].labels.max() == 3
    assert left(dest.parent) == ["data"]
    told = capfd.readouterr()
    assert "Downloading" in told.err and "MB" in told.err and "3 of 665" in told.err and told.out == ""
    if os.name == "posix":
        assert dest.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


def test_it_skips_what_is_there(tmp_path, serve, capfd):
    server = serve(make_zip())
    get(server, tmp_path / "data")
    asked = len(server.asked)
    get(server, tmp_path / "data")
    assert len(server.asked) == asked
    assert "already" in capfd.readouterr().err


def test_an_empty_folder_is_filled_and_another_refused(tmp_path, serve):
    server = serve(make_zip())
    (tmp_path / "data").mkdir()
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with refused("mine", "new or empty folder"):
        get(server, tmp_path / "mine")
    assert left(tmp_path / "mine") == ["letter.txt"]
    with refused("letter.txt"):
        get(server, tmp_path / "mine" / "letter.txt")


def test_progress_bar_counts_to_the_end(tmp_path, serve, capfd):
    server = serve(make_zip())
    fetch_nuinsseg(tmp_path / "data", url=server.url, known_hash=sha(server.body))
    assert "100%" in capfd.readouterr().err


def test_a_truncated_download_is_resumed(tmp_path, serve):
    server = serve(make_zip())
    server.send = 150_000
    with refused("broke off", "run it again", "browser", "zenodo"):
        get(server, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    server.send = None
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3
    assert server.asked[0] is None and 0 < int(server.asked[1].removeprefix("bytes=").rstrip("-")) <= 150_000
    assert left(tmp_path) == ["data"]


def test_a_server_that_cannot_resume_sends_it_all(tmp_path, serve):
    server = serve(make_zip(), resume=False)
    server.send = 150_000
    with refused("broke off"):
        get(server, tmp_path / "data")
    server.send = None
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3


def test_a_whole_part_is_not_fetched_again(tmp_path, serve):
    """Killed after the last byte but before the rename: the server has nothing to add."""
    server = serve(make_zip())
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "NuInsSeg.zip.part").write_bytes(server.body)
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3


@pytest.mark.parametrize("extra", [-5000, 0, 5000])
def test_a_part_of_another_file_is_thrown_away(tmp_path, serve, extra):
    server = serve(make_zip())
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "NuInsSeg.zip.part").write_bytes(b"x" * (len(server.body) + extra))
    with refused("could not be downloaded"):
        get(server, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3


def test_a_wrong_hash_is_refused_and_kept_nowhere(tmp_path, serve):
    server = serve(make_zip())
    with refused("checksum is wrong"):
        get(server, tmp_path / "data", sha(b"other"))
    assert left(tmp_path) == []


def test_not_found_and_no_connection(tmp_path, serve):
    server = serve(make_zip())
    with refused("404", "browser"):
        fetch_nuinsseg(tmp_path / "data", url=server.url + "x", progress=False)
    unused = serve(b"")
    unused.shutdown()
    unused.server_close()
    with refused("no connection", "browser", "https://doi.org/10.5281/zenodo.10518968", "archive"):
        get(unused, tmp_path / "data")
    assert left(tmp_path) == []


def test_a_page_instead_of_the_file_is_refused_and_forgotten(tmp_path, serve):
    server = serve(b"<html>please log in</html>")
    with refused("not a whole zip"):
        fetch_nuinsseg(tmp_path / "data", url=server.url, progress=False)
    server.body = make_zip()
    assert len(NuInsSeg(fetch_nuinsseg(tmp_path / "data", url=server.url, progress=False))) == 3


def test_the_doi_gives_address_and_checksum(tmp_path, serve, monkeypatch, capfd):
    """Only the record's look-up is replaced; the archive comes over HTTP."""
    server = serve(make_zip())

    class Record:
        def populate_registry(self, registry):
            registry.registry["NuInsSeg.zip"] = md5(server.body)

        def download_url(self, name):
            return server.url

    def look_up(doi, **options):
        assert doi == "10.5281/zenodo.10518968" and options["timeout"] > 0
        return Record()

    monkeypatch.setattr(nucseg.data.fetch, "doi_to_repository", look_up)
    assert len(NuInsSeg(fetch_nuinsseg(tmp_path / "data", progress=False))) == 3
    assert "1.6 GB" in capfd.readouterr().err
    server.body = server.body[:-1] + b"x"
    monkeypatch.setattr(Record, "populate_registry", lambda self, r: r.registry.update({"NuInsSeg.zip": md5(b"")}))
    with refused("checksum is wrong"):
        fetch_nuinsseg(tmp_path / "again", progress=False)
    monkeypatch.setattr(Record, "populate_registry", lambda self, registry: None)
    with refused("could not be downloaded"):
        fetch_nuinsseg(tmp_path / "again", progress=False)


def test_a_full_disk_is_noticed_first(tmp_path, serve, monkeypatch):
    server = serve(make_zip())
    usage = nucseg.data.fetch.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(nucseg.data.fetch.shutil, "disk_usage", lambda path: usage)
    with refused("are needed", "free some"):
        get(server, tmp_path / "data")
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is for POSIX")
def test_killed_and_run_again(tmp_path, serve):
    server = serve(make_zip())
    server.send, server.hang = 150_000, True
    script = (
        "import sys; from nucseg.data.fetch import fetch_nuinsseg; "
        "fetch_nuinsseg(sys.argv[1], url=sys.argv[2], known_hash=sys.argv[3], progress=False)"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "data"), server.url, sha(server.body)],
        cwd=root,
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / ".data.partial" / "NuInsSeg.zip.part"
    deadline = time.monotonic() + 15
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert part.stat().st_size
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "data").exists()
    server.send, server.hang = None, False
    assert len(NuInsSeg(get(server, tmp_path / "data"))) == 3
    assert server.asked[-1].startswith("bytes=") and left(tmp_path) == ["data"]


# ---- archives that are here already --------------------------------------------------------------------


def local(tmp_path, body, **options):
    path = tmp_path / "own" / "NuInsSeg.zip"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)
    return fetch_nuinsseg(tmp_path / "data", archive=path, progress=False, **options)


@pytest.mark.parametrize("top", ["", "NuInsSeg/", "NuInsSeg/NuInsSeg/"])
def test_a_local_archive(tmp_path, top):
    body = make_zip(top=top)
    assert len(NuInsSeg(local(tmp_path, body, known_hash=md5(body)))) == 3
    assert left(tmp_path) == ["data", "own"] and (tmp_path / "own" / "NuInsSeg.zip").read_bytes() == body


def test_backslashes_in_an_archive_are_folders(tmp_path):
    body = make_zip(top="NuInsSeg/").replace(b"NuInsSeg/", b"NuInsSeg\\").replace(b"/tissue", b"\\tissue")
    assert len(NuInsSeg(local(tmp_path, body))) == 3


def link(name, target="/etc"):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = 0o120777 << 16
    return info, target


@pytest.mark.parametrize(
    "entry",
    [
        ("../evil.txt", "x"),
        ("NuInsSeg/../../evil.txt", "x"),
        ("..\\evil.txt", "x"),
        ("/evil.txt", "x"),
        ("\\\\server\\evil.txt", "x"),
        ("C:evil.txt", "x"),
        ("C:\\evil.txt", "x"),
        link("NuInsSeg/link"),
    ],
    ids=lambda entry: str(getattr(entry[0], "filename", entry[0])),
)
def test_unsafe_entries_are_refused(tmp_path, entry):
    with refused("unsafe entry", "download"):
        local(tmp_path, make_zip(extra=[entry]))
    assert left(tmp_path) == ["own"] and left(tmp_path / "own") == ["NuInsSeg.zip"]


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "MAX_UNPACKED_BYTES", 100_000)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(200_000))
    assert len(bomb.getvalue()) < 1000
    with refused("limit of 0.1 MB"):
        local(tmp_path, bomb.getvalue())
    monkeypatch.setattr(nucseg.data.fetch, "MAX_UNPACKED_BYTES", 10**9)
    monkeypatch.setattr(nucseg.data.fetch, "MAX_MEMBERS", 5)
    with refused("6 files"):
        local(tmp_path, make_zip())
    assert left(tmp_path) == ["own"]


def test_damaged_archives_are_refused(tmp_path):
    body = make_zip()
    with refused("not a whole zip"):
        local(tmp_path, body[:-100])
    middle = bytearray(body)
    middle[3000] ^= 255
    with refused("not a whole zip", "CRC"):
        local(tmp_path, bytes(middle))
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 40)
    with refused("not a whole zip", "decompressing"):
        local(tmp_path, squeezed.getvalue()[:31] + b"\xff" * 20 + squeezed.getvalue()[51:])
    with refused("does not have the hash"):
        local(tmp_path, body, known_hash=md5(b""))
    with refused("unknown type"):
        local(tmp_path, body, known_hash="rot13:abc")
    with refused("does not exist"):
        fetch_nuinsseg(tmp_path / "data", archive=tmp_path / "nowhere.zip")
    assert left(tmp_path) == ["own"]


def test_an_archive_of_something_else_is_refused(tmp_path):
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("letter.txt", "dear")
    with refused("not NuInsSeg as published", "tissue images"):
        local(tmp_path, other.getvalue())
    assert left(tmp_path) == ["own"]


# ---- BBBC038 -------------------------------------------------------------------------------------------

LISTED = pd.DataFrame(
    [("0a" * 6, "histology", 8, 12), ("1b" * 6, "fluorescence", 8, 8), ("2c" * 6, "brightfield", 9, 8)],
    columns=["image", "kind", "height", "width"],
)


def full(short):
    return short.ljust(64, "e")


def mask(height, width, *boxes):
    """A binary mask, 0 and 255, of (top, bottom, left, right) boxes."""
    plane = np.zeros((height, width), np.uint8)
    for top, bottom, left, right in boxes:
        plane[top:bottom, left:right] = 255
    return png(plane)


def stage1(top="", change=None):
    """What stage1_train.zip would hold, as {name: content}: the listed images, and one that is not listed."""
    noise = np.random.default_rng(1)
    files = {}
    rows = [*LISTED.itertuples(index=False, name=None), ("ff" * 6, "", 8, 8)]
    for short, _, height, width in rows:
        folder = f"{top}{full(short)}"
        pixels = noise.integers(0, 256, (height, width, 4), dtype=np.uint8)
        files[f"{folder}/images/{full(short)}.png"] = png(pixels)
        files[f"{folder}/masks/{'b' * 64}.png"] = mask(height, width, (2, 6, 2, 6))
        files[f"{folder}/masks/{'a' * 64}.png"] = mask(height, width, (0, 4, 0, 4))
    return files | (change or {})


def pack(files, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "bbbc038_list", lambda: LISTED)


def own(tmp_path, files, **options):
    path = tmp_path / "own" / "stage1_train.zip"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(files if isinstance(files, bytes) else pack(files))
    return fetch_bbbc038(tmp_path / "data", archive=path, progress=False, **options)


def first(*rest):
    """The path of something of the first listed image."""
    return "/".join([full(LISTED["image"][0]), *rest])


IMAGE = first("images", f"{full(LISTED['image'][0])}.png")


def test_the_shipped_list():
    table = bbbc038_list()
    assert list(table.columns) == ["image", "kind", "height", "width"]
    assert table["kind"].value_counts().to_dict() == {"fluorescence": 431, "histology": 107, "brightfield": 16}
    assert table["image"].is_unique and table["image"].is_monotonic_increasing
    assert table["image"].str.fullmatch("[0-9a-f]{12}").all()
    assert set(zip(table["height"], table["width"], strict=True)) == {
        *[(256, 256), (256, 320), (260, 347), (360, 360), (1024, 1024)]
    }


def test_bbbc038_is_downloaded_and_laid_out(tmp_path, serve, listed, capfd):
    files = stage1()
    server = serve(pack(files))
    dest = fetch_bbbc038(tmp_path / "deep" / "data", url=server.url)
    assert dest == tmp_path / "deep" / "data" and left(dest.parent) == ["data"]
    found = sorted(path.relative_to(dest).as_posix() for path in dest.rglob("*.png"))
    names = [f"{kind}/{full(short)}.png" for short, kind, _, _ in LISTED.itertuples(index=False)]
    assert found == sorted(f"{what}/{name}" for what in ("images", "masks") for name in names)
    assert (dest / "images" / names[0]).read_bytes() == files[IMAGE]
    with Image.open(dest / "masks" / names[0]) as image:
        labels = np.array(image)
    assert labels.dtype == np.uint16 and labels.shape == (8, 12)
    told = capfd.readouterr()
    assert f"SHA-256 of stage1_train.zip: {hashlib.sha256(server.body).hexdigest()}" in told.err
    assert "3 of 3 images" in told.err and "100%" in told.err and told.out == ""
    data = ImageFolder(dest / "images", dest / "masks")
    assert list(data.table["stem"].str[:12]) == list(LISTED.sort_values(["kind", "image"])["image"])
    assert [sample.labels.max() for sample in data] == [2, 2, 2]
    assert len(Tiles(data, ("histology", "brightfield"))) == 2


def test_overlapping_masks_and_empty_ones(tmp_path, listed):
    """Ids follow the names of the files, not their order in the archive; the first keeps a shared pixel."""
    extra = {
        first("masks", f"{'0' * 64}.png"): mask(8, 12),
        first("masks", f"{'ab' * 32}.png"): mask(8, 12, (1, 3, 1, 3)),  # wholly under the one before it
        first("masks", f"{'c' * 64}.png"): png(np.full((8, 12), 0, np.uint8) + np.eye(8, 12, 4, np.uint8)),
        first("masks", f"._{'c' * 64}.png"): b"what macOS adds",
    }
    dest = own(tmp_path, stage1(change=extra))
    labels = np.array(Image.open(dest / "masks" / "histology" / f"{full('0a' * 6)}.png"))
    expected = np.zeros((8, 12), int)
    expected[np.eye(8, 12, 4) > 0] = 3
    expected[2:6, 2:6] = 2
    expected[:4, :4] = 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "P"])
def test_masks_in_other_modes(tmp_path, listed, mode):
    plain = Image.fromarray(np.eye(8, 12, dtype=np.uint8) * 255)
    out = io.BytesIO()
    plain.convert(mode).save(out, "PNG")
    files = stage1(change={first("masks", f"{'a' * 64}.png"): out.getvalue()})
    del files[first("masks", f"{'b' * 64}.png")]
    dest = own(tmp_path, files)
    labels = np.array(Image.open(dest / "masks" / "histology" / f"{full('0a' * 6)}.png"))
    np.testing.assert_array_equal(labels, np.eye(8, 12))


@pytest.mark.parametrize("top", ["", "stage1_train/", "a/stage1_train/"])
def test_a_local_bbbc038(tmp_path, listed, top):
    body = pack(stage1(top))
    assert len(ImageFolder(own(tmp_path, body, known_hash=md5(body)) / "images", tmp_path / "data" / "masks")) == 3
    assert left(tmp_path) == ["data", "own"] and left(tmp_path / "own") == ["stage1_train.zip"]


def test_backslashes_in_bbbc038_are_folders(tmp_path, listed):
    body = pack(stage1())
    for name in stage1():
        body = body.replace(name.encode(), name.replace("/", "\\").encode())
    assert b"\\masks\\" in body and b"/" not in body[-500:]
    assert len(left(own(tmp_path, body) / "images")) == 3


def test_an_archive_without_a_listed_image_is_refused(tmp_path, listed):
    files = stage1()
    del files[IMAGE]
    with refused("not BBBC038 as published", LISTED["image"][0], "and 0 do", "stage1_train.zip", "bbbc.broad"):
        own(tmp_path, files)
    twin = LISTED["image"][0].ljust(64, "f")
    with refused("not BBBC038 as published", LISTED["image"][0], "and 2 do"):
        own(tmp_path, stage1(change={f"{twin}/images/{twin}.png": png(np.zeros((8, 12), np.uint8))}))
    files = {name: content for name, content in stage1().items() if not name.startswith(first("masks"))}
    with refused("not BBBC038 as published", full(LISTED["image"][0]), "0 masks"):
        own(tmp_path, files)
    assert left(tmp_path) == ["own"]


@pytest.mark.parametrize("name", [IMAGE, first("masks", f"{'a' * 64}.png")])
def test_another_size_is_refused(tmp_path, listed, name):
    with refused("not BBBC038 as published", name, "8 x 12 px, not 12 x 8 px"):
        own(tmp_path, stage1(change={name: png(np.zeros((12, 8), np.uint8))}))
    with refused("not BBBC038 as published", name, "cannot be read"):
        own(tmp_path, stage1(change={name: b"a letter"}))
    cut = png(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))[:-40]
    with refused("not BBBC038 as published", name, "cannot be read"):
        own(tmp_path, stage1(change={name: cut}))
    assert left(tmp_path) == ["own"]


def test_a_damaged_bbbc038_is_refused(tmp_path, listed):
    body = pack(stage1())
    with refused("not a whole zip", "bbbc.broadinstitute.org"):
        own(tmp_path, body[:-100])
    unlisted = stage1()[f"{full('ff' * 6)}/images/{full('ff' * 6)}.png"]
    middle = bytearray(body)
    middle[body.index(unlisted) + len(unlisted) // 2] ^= 255
    with refused("not a whole zip", "CRC", full("ff" * 6)):
        own(tmp_path, bytes(middle))
    with refused("does not have the hash"):
        own(tmp_path, body, known_hash=md5(b""))
    with refused("does not exist", "stage1_train.zip"):
        fetch_bbbc038(tmp_path / "data", archive=tmp_path / "nowhere.zip")
    assert left(tmp_path) == ["own"]


@pytest.mark.parametrize("name", ["../evil.png", first("masks", "..", "..", "evil.png"), "/evil.png", "C:\\evil.png"])
def test_unsafe_entries_of_bbbc038_are_refused(tmp_path, listed, name):
    with refused("unsafe entry", "download stage1_train.zip"):
        own(tmp_path, stage1(change={name: "x"}))
    assert left(tmp_path) == ["own"] and left(tmp_path / "own") == ["stage1_train.zip"]


def test_a_bbbc038_bomb_is_refused(tmp_path, listed, monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "MAX_BBBC038_BYTES", 100_000)
    with refused("limit of 0.1 MB"):
        own(tmp_path, pack(stage1(change={"zeros": bytes(200_000)}), zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow refuses twice as many, 8 x 12 px are more
    with refused("cannot be read"):
        own(tmp_path, stage1())
    assert left(tmp_path) == ["own"]


def test_a_broken_download_of_bbbc038_is_resumed_then_left_alone(tmp_path, serve, listed, capfd):
    server = serve(pack(stage1(change={"more": bytes(150_000)})))
    server.send = 100_000
    with refused("broke off", "run it again", "stage1_train.zip", "browser", "bbbc.broadinstitute.org"):
        fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert left(tmp_path) == [".data.partial"] and left(tmp_path / ".data.partial") == ["stage1_train.zip.part"]
    server.send = None
    fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert server.asked[0] is None and 0 < int(server.asked[1].removeprefix("bytes=").rstrip("-")) <= 100_000
    assert left(tmp_path) == ["data"]
    fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert len(server.asked) == 2
    assert "BBBC038 is already in" in capfd.readouterr().err
    for what in ("images", "masks"):
        path = tmp_path / "data" / what / "histology" / f"{full('0a' * 6)}.png"
        path.rename(path.with_stem("0a" * 6))  # as a copy with short names has it
    fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert "partial" not in capfd.readouterr().err
    for what in ("images", "masks"):
        (tmp_path / "data" / what / "histology" / f"{'0a' * 6}.png").unlink()
    fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert "partial copy (3 are the whole)" in capfd.readouterr().err


def test_a_damaged_download_of_bbbc038_is_not_kept(tmp_path, serve, listed):
    files = stage1()
    server = serve(pack({name: content for name, content in files.items() if name != IMAGE}))
    with refused("and 0 do"):
        fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert left(tmp_path) == []
    server.body = pack(files)
    fetch_bbbc038(tmp_path / "data", url=server.url, progress=False)
    assert left(tmp_path) == ["data"]


def test_a_folder_of_something_else_is_not_touched(tmp_path, listed):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "letter.txt").write_text("dear")
    with refused("data", "is not BBBC038", "new or empty folder"):
        own(tmp_path, stage1())
    for what in ("images", "masks"):
        (tmp_path / "data" / what).mkdir()
        (tmp_path / "data" / what / "1.png").write_bytes(mask(4, 4, (1, 3, 1, 3)))
    with refused("data", "is not BBBC038", "new or empty folder"):
        own(tmp_path, stage1())
    assert left(tmp_path / "data") == ["images", "letter.txt", "masks"]


def test_fetch_bbbc038_on_the_command_line(tmp_path, listed, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.zip").write_bytes(pack(stage1()))
    assert main(["fetch", "bbbc038", "--archive", "mine.zip"]) == 0
    assert left(tmp_path / "data") == ["bbbc038"]
    assert f"nucseg pretrain --bbbc038 {tmp_path / 'data' / 'bbbc038'}" in capsys.readouterr().out
    (tmp_path / "all.zip").write_bytes(make_zip())
    assert main(["fetch", "nuinsseg", "--archive", "all.zip"]) == 0
    assert left(tmp_path / "data") == ["bbbc038", "nuinsseg"]
    assert main(["fetch", "bbbc038", "--archive", "mine.zip", "--out", "other"]) == 0
    assert left(tmp_path / "other") == ["images", "masks"]
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "original masks" in words and "kaggle-dsbowl-2018-dataset-fixes" in words
