"""NuInsSeg from Zenodo: downloaded whole, checked, unpacked safely."""

import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import pooch
import requests
from pooch.downloaders import DOIDownloader, doi_to_repository
from pooch.hashes import hash_matches
from tqdm import tqdm

from nucseg.data import NuInsSeg, nuinsseg_list
from nucseg.errors import InputError

DOI = "10.5281/zenodo.10518968"
ARCHIVE = "NuInsSeg.zip"
ARCHIVE_BYTES = 1_627_427_342

_GET_ANOTHER = f"download {ARCHIVE} again from https://doi.org/{DOI}"

MAX_UNPACKED_BYTES = 30 * 10**9  # far above what the archive can honestly hold, far below a zip bomb
MAX_MEMBERS = 200_000

_BY_HAND = (
    f"run it again to go on where it stopped, or download {ARCHIVE} in a browser from "
    f"https://doi.org/{DOI} and give the path of that file as the archive"
)


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


# ---- downloading -------------------------------------------------------------------------------------


class _ResumingDownloader:
    """A downloader for pooch that keeps what it has in ``part`` and asks for the rest the next time.

    pooch's own starts from zero after every break, which hurts at 1.6 GB. Whether the pieces fit together
    is for pooch to say, which checks the hash of the whole and throws it away if it is wrong.
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
                self.part.unlink()  # more than there is to have: another file, so start anew the next time
            if not whole:
                response.raise_for_status()
                if not (response.status_code == 206 and content_range.startswith(f"bytes {have}-")):
                    have = 0  # the server sends the file from its start
                self._receive(response, have)
        self.part.replace(output_file)

    def _receive(self, response: requests.Response, have: int) -> None:
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total:
            _check_space(self.part.parent, 2 * total - have)  # the archive, and as much again unpacked
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
    """The plain address and the checksum of ``doi:<DOI>/<file>``, both from the repository's own record."""
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


def _download(url: str, known_hash: str | None, work: Path, progress: bool) -> Path:
    pooch.get_logger().setLevel("WARNING")  # it would announce temporary names
    try:
        address, known_hash = _resolve(url, known_hash)
        downloader = _ResumingDownloader(work / f"{ARCHIVE}.part", progress)
        return Path(pooch.retrieve(address, known_hash, fname=ARCHIVE, path=work, downloader=downloader))
    except InputError:
        raise
    except (requests.RequestException, ValueError, KeyError, OSError) as error:
        # ValueError: a wrong hash, or an answer that is no record; KeyError: a record without the file
        raise InputError(f"'{url}' could not be downloaded ({_reason(error)}): {_BY_HAND}.") from error


# ---- unpacking ---------------------------------------------------------------------------------------


def _check_member(archive: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member that would be written outside the folder, or is no plain file or folder."""
    name = info.filename
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    outside = name.startswith("/") or ".." in name.split("/") or ":" in name  # C:x, and x:stream on Windows
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
        raise InputError(f"'{archive}' holds the unsafe entry '{info.filename}': {_GET_ANOTHER}.")


def _unpack(archive: Path, folder: Path, progress: bool) -> None:
    """Write all members under ``folder``; zipfile checks each CRC and reads no more than it declares."""
    with zipfile.ZipFile(archive) as source:
        members = source.infolist()
        total = sum(info.file_size for info in members)
        if total > MAX_UNPACKED_BYTES or len(members) > MAX_MEMBERS:
            raise InputError(
                f"'{archive}' would unpack to {_size(total)} in {len(members)} files, more than the limit of "
                f"{_size(MAX_UNPACKED_BYTES)} in {MAX_MEMBERS}: {_GET_ANOTHER}."
            )
        for info in members:
            info.filename = info.filename.replace("\\", "/")  # as some Windows programs write them
            _check_member(archive, info)
        _check_space(folder, total)
        _say(f"Unpacking {_size(total)}")
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            for info in members:
                source.extract(info, folder)
                bar.update(info.file_size)


def _unpack_and_move(archive: Path, dest: Path, work: Path, progress: bool) -> None:
    """Unpack beside ``dest`` and rename at the end: ``dest`` is whole or absent."""
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=work) as parent:
        unpacked = Path(parent) / "NuInsSeg"
        unpacked.mkdir()
        try:
            _unpack(archive, unpacked, progress)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise InputError(f"'{archive}' is not a whole zip file ({error}): {_GET_ANOTHER}.") from error
        try:
            count = len(NuInsSeg(unpacked))
        except InputError as error:
            reason = str(error).replace(str(unpacked), "NuInsSeg").rstrip(".")
            raise InputError(f"'{archive}' is not NuInsSeg as published ({reason}): {_GET_ANOTHER}.") from error
        if dest.exists():
            dest.rmdir()  # it is empty, `_already_there` saw to that
        unpacked.rename(dest)
    _say(f"NuInsSeg is in '{dest}': {count} of {len(nuinsseg_list())} images")


# ---- both --------------------------------------------------------------------------------------------


def _already_there(dest: Path) -> bool:
    """Whether ``dest`` holds NuInsSeg; not if absent or empty; an error if it holds something else."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        count = len(NuInsSeg(dest))
    except InputError as error:
        raise InputError(f"'{dest}' is there and is not NuInsSeg: choose a new or empty folder.") from error
    whole = len(nuinsseg_list())
    _say(f"NuInsSeg is already in '{dest}': {count} images")
    if count < whole:
        _say(f"That is a partial copy ({whole} are the whole): remove the folder to fetch all of it")
    return True


def fetch_nuinsseg(
    dest: str | Path,
    *,
    archive: str | Path | None = None,
    url: str = f"doi:{DOI}/{ARCHIVE}",
    known_hash: str | None = None,
    progress: bool = True,
) -> Path:
    """Download NuInsSeg (1.6 GB, CC BY 4.0) and unpack it into the new folder ``dest``; returns ``dest``.

    Nothing happens if ``dest`` holds NuInsSeg already. Otherwise ``dest`` appears at the end, whole. The
    download is kept in ``.<dest>.partial`` beside it until then, and a broken one goes on where it stopped.

    archive: path of a NuInsSeg.zip that is here already; nothing is downloaded, and it is left in place.
    url: ``doi:<DOI>/<file>`` (address and checksum come from the repository's record) or an http address.
    known_hash: ``md5:...`` or ``sha256:...`` of the archive; needed with an http address if a damaged file
        is to be noticed before it is unpacked. Each member's CRC is checked in any case.
    progress: whether to draw progress bars. What is done, and how large it is, is told on stderr.

    Source: Mahbod et al. 2024, doi 10.1038/s41597-024-03117-2; data at doi 10.5281/zenodo.10518968.

    Raises `InputError` when there is no network, the file is missing, truncated or has another checksum, the
    archive holds unsafe paths, links or more than 30 GB, the disk is too full, or ``dest`` holds other data.
    """
    dest = Path(dest).absolute()
    if _already_there(dest):
        return dest
    work = dest.parent / f".{dest.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        if archive is None:
            _download_and_unpack(url, known_hash, dest, work, progress)
        else:
            _check_archive(Path(archive), known_hash)
            _unpack_and_move(Path(archive), dest, work, progress)
        shutil.rmtree(work)
    except OSError as error:
        raise InputError(f"NuInsSeg could not be written to '{dest}' ({error}): choose another.") from error
    finally:
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    return dest


def _download_and_unpack(url: str, known_hash: str | None, dest: Path, work: Path, progress: bool) -> None:
    from_record = url.startswith("doi:")
    if from_record:
        _say(f"NuInsSeg is a download of {_size(ARCHIVE_BYTES)} (https://doi.org/{DOI}, CC BY 4.0)")
    archive = _download(url, known_hash, work, progress)
    try:
        _unpack_and_move(archive, dest, work, progress)
    except InputError:
        if not (known_hash or from_record):
            archive.unlink()  # nothing vouches for it: do not meet it again the next time
        raise


def _check_archive(archive: Path, known_hash: str | None) -> None:
    if not archive.is_file():
        raise InputError(f"The archive '{archive}' does not exist: give the path of {ARCHIVE}.")
    try:
        matches = hash_matches(str(archive), known_hash) if known_hash else True
    except ValueError as error:
        raise InputError(
            f"The hash '{known_hash}' is of no known kind: give it as md5:<digits> or sha256:<digits>."
        ) from error
    if not matches:
        raise InputError(f"The archive '{archive}' does not have the hash {known_hash}: {_GET_ANOTHER}.")
