import hashlib
import pickle
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nucseg.errors import InputError
from nucseg.files import sha256
from nucseg.model import adapters, bases
from nucseg.model.bases import fetch_mobile_sam, load_base, random_base, read_checkpoint
from nucseg.model.network import build_model, load_model
from nucseg.model.sam import Encoder, build_sam, part
from nucseg.records.runs import read_run, results_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("NUCSEG_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "mobile_sam.pt"
    torch.manual_seed(7)
    torch.save(build_sam().state_dict(), path)
    return path


class Handler(BaseHTTPRequestHandler):
    body = b""
    cut = 0  # bytes that are promised but not sent
    hits = 0

    def do_GET(self):
        type(self).hits += 1
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: len(self.body) - self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(checkpoint) -> Iterator[str]:
    Handler.body, Handler.cut, Handler.hits = checkpoint.read_bytes(), 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_once_and_verifies(server, checkpoint, cache, monkeypatch):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    monkeypatch.setattr(bases, "MOBILE_SAM_SHA256", digest)
    path = fetch_mobile_sam(f"{server}/mobile_sam.pt", digest)
    assert path.read_bytes() == checkpoint.read_bytes()
    fetch_mobile_sam(f"{server}/mobile_sam.pt", digest)
    assert Handler.hits == 1
    monkeypatch.setattr(bases, "fetch_mobile_sam", lambda: path)
    base = load_base("mobile_sam")
    assert base.sha256 == digest and base.name == "mobile_sam"
    assert base.state.keys() == build_sam().state_dict().keys()


def test_a_wrong_hash_leaves_nothing(server, cache):
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch_mobile_sam(f"{server}/mobile_sam.pt", "0" * 64)
    assert files(cache) == []


def test_a_truncated_download_leaves_nothing(server, checkpoint, cache):
    Handler.cut = 1000
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"could not be downloaded|SHA-256 differs"):
        fetch_mobile_sam(f"{server}/mobile_sam.pt", digest)
    assert files(cache) == []
    Handler.cut = 0
    assert fetch_mobile_sam(f"{server}/mobile_sam.pt", digest).exists()


def test_no_network_names_the_other_choices(cache, monkeypatch):
    url = "http://127.0.0.1:9/mobile_sam.pt"  # the discard port: refused at once
    with pytest.raises(InputError, match="'random'") as error:
        fetch_mobile_sam(url)
    assert "\n" not in str(error.value) and files(cache) == []
    monkeypatch.setattr(bases, "fetch_mobile_sam", lambda: fetch_mobile_sam(url))
    with pytest.raises(InputError, match="could not be downloaded"):
        load_base("mobile_sam")  # and no silent fallback


def test_a_missing_page_is_one_sentence(server):
    with pytest.raises(InputError, match="could not be downloaded"):
        fetch_mobile_sam(f"{server}/missing")


def test_a_path_is_a_base(checkpoint):
    base = load_base(str(checkpoint))
    assert base.name == "mobile_sam.pt"
    assert base.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_an_unknown_base_names_the_choices():
    with pytest.raises(InputError, match=r"'resnet'.*'mobile_sam'"):
        load_base("resnet")


class Evil:
    """What a hostile pickle would run on loading."""

    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_and_damaged_checkpoints_are_refused(tmp_path, checkpoint):
    path = tmp_path / "bad.pt"
    torch.save({"weights": Evil()}, path)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(path)
    assert not Evil.ran
    whole = checkpoint.read_bytes()
    damaged = [whole[:size] for size in (0, 10, 1000, len(whole) // 2, len(whole) - 10)]
    for content in (*damaged, b".", b"]q", b"a"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable checkpoint"):
            read_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    name = next(iter(state))
    for wrong in (
        {"x": torch.zeros(1)},
        [1, 2],
        {n: t for n, t in state.items() if n != name},
        state | {name: torch.zeros(3)},
    ):
        torch.save(wrong, tmp_path / "other.pt")
        with pytest.raises(InputError, match="not a MobileSAM checkpoint"):
            read_checkpoint(tmp_path / "other.pt")


def test_random_is_seeded_and_leaves_the_callers_random_numbers_alone():
    random_base.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    base = random_base(5)
    assert torch.equal(torch.rand(3), expected)
    again = random_base.__wrapped__(5)
    assert base.sha256 == again.sha256 != random_base(6).sha256
    assert all(torch.equal(base.state[name], again.state[name]) for name in base.state)


def test_a_signal_comes_through_the_random_base():
    """Different pixels must give different features, or nothing can be learnt from them."""
    encoder = Encoder()
    encoder.load_state_dict(part(random_base(0).state, "image_encoder."))
    encoder.eval()
    with torch.no_grad():
        stages = encoder.features(torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    for features in stages:
        assert 0.1 < features.std(dim=(2, 3)).mean() < 10


def test_the_shipped_base_is_what_its_run_made_and_loads_fast():
    random_base(0)  # cached: the parts that were never trained
    start = time.monotonic()
    base = load_base("offline")
    assert time.monotonic() - start < 2  # under one second on an idle machine
    assert bases.OFFLINE.stat().st_size < 13e6
    assert base.name == "offline"
    with safe_open(bases.OFFLINE, "pt") as handle:
        card = handle.metadata()
    run = read_run(results_folder(__file__) / "pretrain" / "deep")
    assert (card["commit"], card["date"]) == (run.about["commit"], run.about["date"])
    untrained = random_base(0).state
    moved = [n for n in base.state if n.startswith("image_encoder.layers") and not n.endswith("num_batches_tracked")]
    assert all(not torch.equal(base.state[name], untrained[name]) for name in moved)


def test_loading_an_adapter_makes_no_untrained_weights(monkeypatch):
    """Neither the decoders that its head does not use nor initial weights: all of the model comes from the files."""
    untrained = random_base(0).state
    tensors, config, _ = adapters.read_adapter(path := adapters.adapter_path(adapters.DEFAULT_ADAPTER))
    with monkeypatch.context() as patch:
        patch.setattr(bases, "random_base", lambda seed: pytest.fail("untrained weights were made"))
        base = load_base(config["base"])
        loaded = load_model(path, base)
    built = build_model(loaded.config, base)
    built.load_adapter_state(tensors)
    for (name, tensor), (other, expected) in zip(_tensors(loaded), _tensors(built), strict=True):
        assert name == other and torch.equal(tensor, expected), name
    assert base.state.keys() - base.stored.keys() == {n for n in untrained if not n.startswith("image_encoder.")}
    assert all(torch.equal(base.state[name], untrained[name]) for name in base.state.keys() - base.stored.keys())


def _tensors(model) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_auto_is_the_official_checkpoint_where_it_is_and_never_a_download(cache):
    assert bases.resolve_base("auto") == "offline"
    assert load_base("auto").name == "offline"
    cache.mkdir(parents=True)
    (cache / "mobile_sam.pt").write_bytes(b"")
    assert bases.resolve_base("auto") == "mobile_sam"
    assert bases.resolve_base("random") == "random"


@pytest.mark.parametrize(
    ("family", "study", "base"),
    [("nuinsseg", "folds/offline-small", "offline"), ("nuinsseg-best", "best/broad-small", "broad")],
)
def test_the_adapters_that_ship_are_what_their_cards_say(family, study, base):
    results = results_folder(__file__) / study
    names = [f"{family}-{k}" for k in (1, 2, 3)]
    assert set(names) < set(adapters.adapters()) and adapters.DEFAULT_ADAPTER in adapters.adapters()
    for k, name in enumerate(names):
        path = adapters.adapter_path(name)
        assert path.stat().st_size < 1.5e6
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        assert f"`{name}`" in card and sha256(path) in card and "Licence" in card
        run = read_run(results / f"fold_{k + 1}")
        for title, key in (("Dice", "dice"), ("AJI", "aji"), ("PQ", "pq")):  # half precision changes little
            said = float(re.search(rf"{title} (0\.\d+)", card)[1])
            assert said == pytest.approx(run.scores[key].mean(), abs=0.003)
        model = load_model(path)
        assert model.base_name == base and model.base_sha256 == run.about["base"]["sha256"]
        assert (model.config.field_px, model.config.um_per_px) == (512, 0.25)


def test_an_adapter_is_a_file_a_runs_folder_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nuinsseg-1").mkdir()  # someone's results: not to be taken for the adapter
    assert adapters.adapter_path("nuinsseg-1").parent == adapters.ADAPTERS
    (tmp_path / "nuinsseg-1" / "best.safetensors").write_bytes(b"mine")
    assert adapters.adapter_path("nuinsseg-1").read_bytes() == b"mine"
    with pytest.raises(InputError, match="neither a file nor one"):
        adapters.adapter_path("unheard-of")
