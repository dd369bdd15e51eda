"""The preview: taken out of an archive on a server on this machine, which breaks off, refuses, sends too much."""

import http.server
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import nucseg.data.fetch
from nucseg.cli import main
from nucseg.data.datasets import NuInsSeg, nuinsseg_list
from nucseg.data.fetch import fetch_preview
from nucseg.data.preview import preview_list
from nucseg.errors import InputError

SIDE = 48
OTHER = 4_000_000  # bytes of the archive that nobody asked for


@cache
def files(count=3):
    """Name -> content of the preview's files and of ``count`` more images, in the benchmark's order."""
    listed = preview_list()
    names = list(zip(listed["tissue"], listed["stem"], strict=True))
    whole = nuinsseg_list()
    others = [name for name in zip(whole["tissue"], whole["stem"], strict=True) if name not in names]
    noise = np.random.default_rng(0)
    made = {}
    for tissue, stem in [*names, *others[:count]]:
        image, mask = io.BytesIO(), io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(image, "PNG")
        labels = np.zeros((SIDE, SIDE), np.uint16)
        labels[: len(stem), :4] = 1
        tifffile.imwrite(mask, labels)
        made[f"{tissue}/tissue images/{stem}.png"] = image.getvalue()
        made[f"{tissue}/label masks modify/{stem}.tif"] = mask.getvalue()
    return made


def pack(content, top="NuInsSeg/", other=OTHER):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for k, (name, data) in enumerate(content.items()):
            if k == len(content) // 2:  # in the middle, so that no range that is wanted lies beside another's end
                archive.writestr(zipfile.ZipInfo(f"{top}other.bin"), np.random.default_rng(1).bytes(other))
            archive.writestr(top + name, data)
    return out.getvalue()


WHOLE = pack(files())


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body`` at /NuInsSeg.zip, in parts; the attributes say in which way it misbehaves."""

    daemon_threads = True

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.sent, self.asked = body, 0, []
        self.ranges = self.suffixes = True  # whether it knows ranges, and those that count from the end
        self.refuse = []  # statuses of the next answers
        self.wait = "1"  # Retry-After of a 429
        self.cut = None  # number of the answer, counted from 1, that breaks off in the middle
        self.hang = False  # whether that answer hangs instead
        self.url = f"http://127.0.0.1:{self.server_port}/NuInsSeg.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()

    def do_GET(self):
        server, total = self.server, len(self.server.body)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "bytes=0-")
        first, last = wanted.groups()
        server.asked.append((first, last))
        if server.refuse:
            self.send_response(server.refuse.pop(0))
            self.send_header("Retry-After", server.wait)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/NuInsSeg.zip":
            self.send_error(404)
            return
        if not first and not server.suffixes:
            self.send_error(416)
            return
        start = int(first) if first else max(0, total - int(last))
        stop = min(total, int(last) + 1) if first and last else total
        if not server.ranges:
            start, stop = 0, total
        self.send_response(206 if server.ranges else 200)
        if server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if len(server.asked) == server.cut:
            stop = (start + stop) // 2
        try:
            for at in range(start, stop, 1 << 14):
                piece = server.body[at : min(stop, at + (1 << 14))]
                self.wfile.write(piece)
                server.sent += len(piece)
        except OSError:  # the other side hung up
            pass
        if len(server.asked) == server.cut and server.hang:
            self.wfile.flush()
            time.sleep(30)
        self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def start(body=WHOLE, **options):
        server = Server(body)
        vars(server).update(options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "PAUSE_S", 0.0)


def get(server, dest):
    return fetch_preview(dest, url=server.url, progress=False)


def refused(*words):
    """One sentence with those words."""
    return pytest.raises(InputError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{word})" for word in words) + r".*[^.]\.$")


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def check(dest):
    """The folder has the preview's files, with their bytes, and nothing else."""
    found = {path.relative_to(dest).as_posix(): path.read_bytes() for path in dest.rglob("*") if path.is_file()}
    assert found == files(0)
    assert len(NuInsSeg(dest)) == 45


def test_only_the_preview_is_transferred(tmp_path, serve, capfd):
    server = serve()
    dest = get(server, tmp_path / "deep" / "preview")
    check(dest)
    assert left(dest.parent) == ["preview"]
    wanted = sum(map(len, files(0).values()))
    assert server.sent < wanted + (1 << 20) + 50_000 < len(WHOLE) - OTHER / 2  # the directory is read with 1 MiB
    told = capfd.readouterr()
    assert "45 of its images, CC BY 4.0" in told.err and "90 files" in told.err and told.out == ""


def test_what_is_there_is_not_fetched_again(tmp_path, serve, capfd):
    server = serve()
    dest = get(server, tmp_path / "preview")
    asked = len(server.asked)
    get(server, dest)
    assert len(server.asked) == asked and "already" in capfd.readouterr().err
    next(dest.rglob("*.png")).unlink()
    next(dest.rglob("*.tif")).unlink()
    before = sorted(dest.rglob("*"))
    with refused("preview"):
        get(server, dest)
    assert sorted(dest.rglob("*")) == before and len(server.asked) == asked


def test_an_empty_folder_is_filled_and_another_refused(tmp_path, serve):
    server = serve()
    (tmp_path / "preview").mkdir()
    check(get(server, tmp_path / "preview"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for path in ("mine", "mine/letter.txt"):
        with refused(path, "new or empty folder"):
            get(server, tmp_path / path)
    assert left(tmp_path / "mine") == ["letter.txt"] and left(tmp_path) == ["mine", "preview"]


def test_a_server_without_ranges_is_left_at_once(tmp_path, serve):
    """It would send everything: nearly nothing of it is received, and the sentence says what to do."""
    server = serve(bytes(200_000_000), ranges=False)
    with refused("does not send parts", r"1\.6 GB", "nucseg fetch nuinsseg"):
        get(server, tmp_path / "preview")
    time.sleep(0.3)
    assert server.sent < 20_000_000 and len(server.asked) <= 2  # what the sockets' buffers take
    assert left(tmp_path) == []


def test_a_server_without_ranges_from_the_end(tmp_path, serve):
    server = serve(suffixes=False)
    check(get(server, tmp_path / "preview"))
    assert server.sent < len(WHOLE) - OTHER / 2


def test_a_server_that_asks_to_wait_is_obeyed(tmp_path, serve, capfd, monkeypatch):
    slept = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", slept.append)
    server = serve(refuse=[429, 429, 503], wait="7")
    check(get(server, tmp_path / "preview"))
    assert slept == [7, 7, 7] and "asks to wait 7 s" in capfd.readouterr().err
    server.refuse, server.wait = [429] * 50, "86400"
    slept.clear()
    with refused("429", "run it again", "nucseg fetch nuinsseg"):
        get(server, tmp_path / "again")
    assert slept and max(slept) <= 120 and sum(slept) < 900
    assert left(tmp_path) == ["preview"]


def test_a_connection_that_breaks_off_is_made_again(tmp_path, serve, capfd):
    server = serve(cut=20)
    check(get(server, tmp_path / "preview"))
    assert "trying again" in capfd.readouterr().err
    assert len([1 for first, _ in server.asked if first]) <= 92  # what had arrived was kept


def test_one_that_breaks_off_always_is_gone_on_with_next_time(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "TRIES", 1)
    server = serve(cut=31)
    with refused("run it again to go on", "nucseg fetch nuinsseg"):
        get(server, tmp_path / "preview")
    assert left(tmp_path) == [".preview.partial"]
    asked = len(server.asked)
    check(get(server, tmp_path / "preview"))
    assert len(server.asked) - asked == 1 + 90 - 29  # the directory, and what had not arrived
    assert left(tmp_path) == ["preview"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_half_a_file_from_last_time_is_fetched_again(tmp_path, serve, damage):
    name, data = next(iter(files(0).items()))
    path = tmp_path / ".preview.partial" / "preview" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(damage(data))
    path.with_name(f"{path.name}.part").write_bytes(b"half")
    check(get(serve(), tmp_path / "preview"))
    assert left(tmp_path) == ["preview"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is for POSIX")
def test_killed_and_run_again(tmp_path, serve):
    server = serve(cut=25, hang=True)
    script = (
        "import sys; from nucseg.data.fetch import fetch_preview; "
        "fetch_preview(sys.argv[1], url=sys.argv[2], progress=False)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "preview"), server.url],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(server.asked) < 25 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert left(tmp_path) == [".preview.partial"]
    asked, server.hang = len(server.asked), False
    check(get(server, tmp_path / "preview"))
    assert len(server.asked) - asked <= 1 + 90 - 23 and left(tmp_path) == ["preview"]


def test_not_found_and_no_connection(tmp_path, serve):
    server = serve()
    with refused("404", "run it again"):
        fetch_preview(tmp_path / "preview", url=server.url + "x", progress=False)
    unused = serve()
    unused.shutdown()
    unused.server_close()
    with refused("no connection", "run it again"):
        get(unused, tmp_path / "preview")
    assert left(tmp_path) == []


def test_the_doi_gives_the_address(tmp_path, serve, monkeypatch):
    """Only the record's look-up is replaced."""
    server = serve()

    class Record:
        def populate_registry(self, registry):
            registry.registry["NuInsSeg.zip"] = "md5:" + "0" * 32

        def download_url(self, name):
            return server.url

    monkeypatch.setattr(nucseg.data.fetch, "doi_to_repository", lambda doi, **options: Record())
    check(fetch_preview(tmp_path / "preview", progress=False))
    monkeypatch.setattr(Record, "populate_registry", lambda self, registry: None)
    with refused("could not be looked up", "run it again"):
        fetch_preview(tmp_path / "again", progress=False)


def test_a_page_instead_of_the_archive(tmp_path, serve):
    with refused("not a zip file", "run it again"):
        get(serve(b"<html>please log in</html>" * 10), tmp_path / "preview")
    assert left(tmp_path) == []


def test_damaged_on_the_way(tmp_path, serve):
    body = bytearray(WHOLE)
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
        name = preview_list().iloc[7]
        info = archive.getinfo(f"NuInsSeg/{name['tissue']}/tissue images/{name['stem']}.png")
    body[info.header_offset + 200] ^= 255
    server = serve(bytes(body))
    with refused("preview could not be taken out"):
        get(server, tmp_path / "preview")
    assert not (tmp_path / "preview").exists()
    server.body = WHOLE
    check(get(server, tmp_path / "preview"))


def test_an_archive_without_a_listed_file(tmp_path, serve):
    content = dict(files())
    name = next(iter(content))
    del content[name]
    with refused("not NuInsSeg as published", f"it has no '{re.escape(name)}'"):
        get(serve(pack(content, other=0)), tmp_path / "preview")
    assert left(tmp_path) == []


def test_files_that_are_far_too_large_are_refused(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(nucseg.data.fetch, "MAX_PREVIEW_FILE_BYTES", 1000)
    with refused("too large"):
        get(serve(), tmp_path / "preview")
    assert left(tmp_path) == []


@pytest.mark.parametrize("top", ["", "NuInsSeg/", "a/b/"])
def test_other_parents_spellings_and_junk(tmp_path, serve, top):
    """Corrected folder names, backslashes, and macOS' copies; unsafe names are not even looked at."""
    content = files(0)
    renamed = {}
    for name, data in content.items():
        name = name.replace("human tonsile/", "human tonsil/").replace("human salivory gland/", "human salivary gland/")
        renamed[f"__MACOSX/{name}"] = b"resource"
        renamed[name if len(renamed) % 4 else name.replace("/", "\\")] = data
    renamed["../../evil/tissue images/evil.png"] = b"x"
    check(get(serve(pack(renamed, top, other=0)), tmp_path / "preview"))
    assert left(tmp_path) == ["preview"]


def test_a_full_disk_is_noticed_first(tmp_path, serve, monkeypatch):
    server = serve()
    usage = nucseg.data.fetch.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(nucseg.data.fetch.shutil, "disk_usage", lambda path: usage)
    with refused("are needed", "free some"):
        get(server, tmp_path / "preview")
    assert left(tmp_path) == []


def test_from_an_archive_that_is_here(tmp_path):
    own = tmp_path / "own.zip"
    own.write_bytes(WHOLE)
    check(fetch_preview(tmp_path / "preview", archive=own, progress=False))
    assert own.read_bytes() == WHOLE and left(tmp_path) == ["own.zip", "preview"]
    own.write_bytes(WHOLE[:-100])
    with refused("not a whole zip"):
        fetch_preview(tmp_path / "again", archive=own, progress=False)
    with refused("does not exist"):
        fetch_preview(tmp_path / "again", archive=tmp_path / "nowhere.zip", progress=False)
    assert left(tmp_path) == ["own.zip", "preview"]


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.zip").write_bytes(WHOLE)
    assert main(["fetch", "nuinsseg", "--preview", "--archive", "mine.zip"]) == 0
    check(Path("data") / "nuinsseg-preview")
    assert f"export NUCSEG_DATA={tmp_path / 'data' / 'nuinsseg-preview'}" in capsys.readouterr().out
    for what in ("bbbc038", "mobile_sam"):
        assert main(["fetch", what, "--preview"]) == 2
        assert "--preview applies to nuinsseg only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    assert "at least one per tissue" in " ".join(capsys.readouterr().out.split())
    assert left(Path("data")) == ["nuinsseg-preview"]
