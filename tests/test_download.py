"""Downloads from a server of this test's own, which cuts, lies, drips, forgets and moves."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidet import cli
from minidet.data import DataError, coco, download, fetch
from minidet.data.fetch import FetchError, Source
from minidet.data.unpack import UnpackError, unpack
from minidet.data.voc import write_voc_as_coco

CONTENT = np.random.default_rng(0).bytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends the server's files, each answer changed as the next of `changes` says."""

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        change = server.changes.pop(0) if server.changes else plain
        change(self, server.files.get(self.path))

    def send(self, content: bytes, *, ranges=True, etag='"v1"', length: int | None = None, sent: int | None = None):
        """`content` as a good server does, but for what is said otherwise; only the first `sent` bytes arrive."""
        start, asked = 0, self.headers.get("Range", "")
        if ranges and asked and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *arguments):
        """Nothing: the test's own output is enough."""


def plain(handler, content):
    handler.send_error(404) if content is None else handler.send(content)


def cut(sent: int, **how) -> Callable:
    return lambda handler, content: handler.send(content, sent=sent, **how)


def answer(code: int) -> Callable:
    return lambda handler, content: handler.send_error(code)


def refuse(handler, content):
    handler.close_connection = True
    handler.connection.close()


def drip(handler, content):
    handler.send(content, sent=10)
    handler.server.stopped.wait(20)  # nothing more, and no end


def trickle(handler, content):
    handler.send(content, sent=0)
    for n in range(99):
        handler.wfile.write(content[n : n + 1])
        handler.server.stopped.wait(0.02)


def chunked(sent: int, etag='"v1"') -> Callable:
    """As servers that pack a file while they send it: nobody knows its length beforehand."""

    def change(handler, content):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("ETag", etag)
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(content[:sent]), content[:sent]))
        handler.wfile.write(b"0\r\n\r\n" if sent >= len(content) else b"ffff\r\n")

    return change


def redirect(handler, content):
    handler.send_response(302)
    handler.send_header("Location", "/file")
    handler.end_headers()


@pytest.fixture
def server(monkeypatch):
    for name, value in (("PAUSE", 0.001), ("LONGEST_PAUSE", 0.01), ("PATIENCE", 0.3), ("SLOWEST", 1000)):
        monkeypatch.setattr(fetch, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.changes, server.asked = {"/file": CONTENT}, [], []
    server.stopped, server.url = threading.Event(), f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *arguments: None  # connections end in the middle: that is what is tested
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = Source("/file", len(CONTENT), SHA256)

HARMLESS = {
    "nothing": [],
    "cut once": [cut(100_000)],
    "cut often": [cut(18_000)] * 11,
    "cut at once": [cut(0)],
    "refused": [refuse, refuse],
    "busy": [answer(503), answer(429), answer(500)],
    "dripping": [drip, cut(70_000)],
    "trickling": [trickle],
    "no ranges": [cut(150_000, ranges=False), lambda handler, content: handler.send(content, ranges=False)],
    "no version": [cut(150_000, etag=""), lambda handler, content: handler.send(content, etag="")],
    "weak version": [cut(150_000, etag='W/"1"')],
    "another version": [cut(150_000, etag='"v0"')],
    "wrong bytes once": [lambda handler, content: handler.send(content[::-1])],
    "half of another file": [lambda handler, content: handler.send(content[::-1], sent=90_000, etag="")],
    "chunks": [chunked(len(CONTENT))],
    "chunks, cut": [chunked(50_000), chunked(len(CONTENT))],
    "chunks, cut, then ranges": [chunked(50_000)],
    "too short": [lambda handler, content: handler.send(content, length=len(content), sent=len(content) - 1)],
}


@pytest.mark.parametrize("known", ["sha256", "size", "nothing"])
@pytest.mark.parametrize("name", HARMLESS)
def test_the_file_arrives_whole(server, tmp_path, name, known):
    if known != "sha256" and name in ("wrong bytes once", "half of another file"):
        pytest.skip("only a hash can tell")
    source = {"sha256": GOOD, "size": replace(GOOD, sha256=None), "nothing": Source("/file")}[known]
    server.changes = list(HARMLESS[name])
    path = tmp_path / "sub" / "file.bin"
    found = fetch.fetch(replace(source, url=server.url + "/file"), path)
    assert path.read_bytes() == CONTENT
    assert found == {"url": server.url + "/file", "size": len(CONTENT), "sha256": SHA256}
    assert not server.changes and [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_what_was_received_is_not_asked_for_again(server, tmp_path):
    server.changes = [cut(60_000), cut(60_000)]
    fetch.fetch(replace(GOOD, url=server.url + "/file"), tmp_path / "f")
    assert [asked.get("Range") for asked in server.asked] == [None, "bytes=60000-", "bytes=120000-"]
    assert [asked.get("If-Range") for asked in server.asked] == [None, '"v1"', '"v1"']


def test_another_call_goes_on_where_one_gave_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TRIES", 2)
    server.changes = [cut(120_000), refuse, refuse, refuse]
    source = replace(GOOD, url=server.url + "/file")
    with pytest.raises(FetchError, match=r"/file: .*; given up after 2 attempts, 120,000 bytes are kept"):
        fetch.fetch(source, tmp_path / "f")
    server.changes, server.asked = [], []
    fetch.fetch(source, tmp_path / "f")
    assert [asked.get("Range") for asked in server.asked] == ["bytes=120000-"]
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("known", [GOOD, Source("/file")])
def test_what_is_complete_but_for_its_name_is_not_fetched_again(server, tmp_path, known):
    source = replace(known, url=server.url + "/file")
    (tmp_path / "f.part").write_bytes(CONTENT)
    (tmp_path / "f.part.json").write_text(json.dumps({"url": source.url, "version": '"v1"'}))
    server.changes = [plain]
    fetch.fetch(source, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert len(server.asked) == (0 if known.size else 1)  # without a size it is asked whether that was all


@pytest.mark.parametrize("note", ["", "[]", '{"url": "elsewhere", "version": "1"}'])
def test_a_part_of_unknown_origin_is_not_gone_on_with(server, tmp_path, note):
    (tmp_path / "f.part").write_bytes(b"of something else")
    (tmp_path / "f.part.json").write_text(note)
    fetch.fetch(Source(server.url + "/file"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and "Range" not in server.asked[0]


def test_it_follows_where_the_file_moved(server, tmp_path):
    server.files["/old"] = b""
    server.changes = [redirect, cut(50_000), redirect, plain]
    fetch.fetch(replace(GOOD, url=server.url + "/old"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and server.asked[-1]["Range"] == "bytes=50000-"


def elsewhere(handler, content):
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 7-9/10")
    handler.end_headers()


REFUSED = {
    "not there": ([answer(404)], {}, "/file: the server answers 404 Not Found"),
    "forbidden": ([answer(403)], {}, "the server answers 403"),
    "another size": ([], {"size": 5}, "the server offers 200,000 bytes, expected 5: another file"),
    "wrong bytes": ([], {"sha256": "0" * 64}, "what came has the sha256 .*expected 000.*, twice: the server"),
    "always busy": ([answer(503)] * 99, {}, "the server answers 503 .*; given up after 8 attempts, 0 bytes are kept"),
    "always cut": ([cut(10, ranges=False)] * 99, {}, "ended after 10 of 200,000 bytes; given up after 8"),
    "always dripping": ([drip] * 99, {}, "given up after 2 attempts"),
    "another range": ([cut(100), elsewhere], {}, "asked for the bytes from 100 on, the server sends 'bytes 7-9/10'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_said(server, tmp_path, monkeypatch, name):
    changes, known, message = REFUSED[name]
    monkeypatch.setattr(fetch, "TRIES", 2 if name == "always dripping" else 8)
    server.changes = list(changes)
    with pytest.raises(FetchError, match=message):
        fetch.fetch(replace(GOOD, url=server.url + "/file", **known), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_nobody_answers(server, tmp_path):
    with pytest.raises(FetchError, match=r"127.0.0.1:9/file: no connection .*given up after 8 attempts"):
        fetch.fetch(Source("http://127.0.0.1:9/file"), tmp_path / "f")


def test_an_encrypted_address_does_not_lead_to_an_open_one(server, tmp_path, monkeypatch):
    opened = fetch.urllib.request.urlopen
    monkeypatch.setattr(
        fetch.urllib.request, "urlopen", lambda request, timeout: opened(server.url + "/file", timeout=timeout)
    )
    with pytest.raises(FetchError, match=r"redirected to http://127.*, which is not encrypted"):
        fetch.fetch(Source("https://example.org/file"), tmp_path / "f")


def test_the_disk_is_looked_at_first(server, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(FetchError, match=r"GB are needed, .* GB are free: choose a folder on another disk"):
        fetch.fetch(replace(GOOD, url=server.url + "/file"), tmp_path / "f", room=free)
    assert not (tmp_path / "f.part").exists()


def test_a_file_that_is_there_is_checked(server, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    assert fetch.fetch(GOOD, tmp_path / "f")["sha256"] == SHA256
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(FetchError, match=r"f: is there already, but with the sha256 .*: remove it"):
        fetch.fetch(GOOD, tmp_path / "f")


# --- unpacking -------------------------------------------------------------------------------------------


def zipped(entries: dict, method=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("images/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


ARCHIVES = {
    "a path upwards": (zipped({"../evil": b"x"}), r"'../evil' would leave the folder"),
    "a path from the root": (zipped({"/etc/evil": b"x"}), "would leave the folder"),
    "a path of Windows": (zipped({"C:evil": b"x"}), "would leave the folder"),
    "a link": (zipped({link(): b"/etc/passwd"}), "'images/link' is a link"),
    "too much": (zipped({"bomb": bytes(10**6)}), "would take 1,000,000 bytes, expected at most 1,000"),
    "too little": (zipped({}), "holds 0 of the files that are wanted, expected 1"),
    "a checksum": (
        zipped({"a": b"some bytes"}, zipfile.ZIP_STORED).replace(b"some bytes", b"sOme bytes"),
        "Bad CRC-32",
    ),
    "no archive": (b"<html>404</html>", "a damaged archive .*: remove it and download it again"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_something_wrong_is_refused_whole(tmp_path, name):
    content, message = ARCHIVES[name]
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(UnpackError, match=message):
        unpack(tmp_path / "in.zip", tmp_path / "out", lambda name: name, files=1, most=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["in.zip"]


def test_only_what_is_wanted_is_unpacked(tmp_path):
    (tmp_path / "in.zip").write_bytes(zipped({"a/x/1": b"one", "a/2": b"two", "b/3": b"three", "a/": b""}))
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "of a try before").touch()
    unpack(tmp_path / "in.zip", tmp_path / "out", download._below("a/"), files=2, most=10)
    found = {str(p.relative_to(tmp_path / "out")): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"x/1": "one", "2": "two"}


# --- data sets -------------------------------------------------------------------------------------------


def xml(boxes: list[tuple]) -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    return f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>"


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG")
    return file.getvalue()


def bccd() -> bytes:
    root = f"BCCD_Dataset-{download.BCCD_COMMIT}/"
    boxes = {
        "c": [("WBC", 3, 4, 20, 25), ("RBC", 5, 5, 5, 5)],  # the second, as in the original, is a point
        "a": [("Platelets", 30, 20, 41, 30)],
        "b": [],
    }
    return zipped(
        {
            **{f"{root}BCCD/Annotations/{name}.xml": xml(rows).encode() for name, rows in boxes.items()},
            **{f"{root}BCCD/JPEGImages/{name}.jpg": jpeg() for name in boxes},
            **{f"{root}BCCD/ImageSets/Main/{s}.txt": f"{n}\n".encode() for s, n in zip(SPLITS, "cab", strict=True)},
            f"{root}LICENSE": b"MIT",
            f"{root}README.md": b"about",
        }
    )


SPLITS = ("train", "val", "test")


def run(capsys, *arguments, status=0) -> str:
    assert cli.main([str(argument) for argument in arguments]) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def test_bccd(server, tmp_path, monkeypatch, capsys):
    server.files["/bccd.zip"] = bccd()
    server.changes = [cut(1000)]
    monkeypatch.setattr(download, "BCCD", Source(server.url + "/bccd.zip"))
    monkeypatch.setattr(download, "BCCD_IMAGES", 3)
    out = tmp_path / "BCCD"
    printed = run(capsys, "download", "bccd", "--out", out, "--quiet")
    assert "3 images, splits train, val, test; 1 boxes without area left out" in printed
    train, val, test = (coco(out, split) for split in SPLITS)
    assert train.classes == ("RBC", "WBC", "Platelets") and train[0].name == "c.jpg" and len(test[0].boxes) == 0
    assert (train[0].boxes.tolist(), train[0].labels.tolist()) == ([[3, 4, 20, 25]], [1])
    assert (val[0].boxes.tolist(), val[0].labels.tolist()) == ([[30, 20, 40, 30]], [2])
    (entry,) = json.loads((out / "downloads.json").read_text())
    assert entry["sha256"] == hashlib.sha256(server.files["/bccd.zip"]).hexdigest()
    assert sorted(p.name for p in out.iterdir()) == ["LICENSE", "annotations", "downloads.json", "images"]
    server.asked.clear()
    assert "is there already" in run(capsys, "download", "bccd", "--out", out) and not server.asked


def test_coco(server, tmp_path, monkeypatch, capsys):
    truth = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 7, "name": "cat"}],
    }
    text = json.dumps(truth).encode()
    server.files["/a.zip"] = zipped({f"annotations/instances_{s}2017.json": text for s in ("val", "train")})
    server.files["/v.zip"] = zipped({"val2017/1.jpg": jpeg()}, zipfile.ZIP_STORED)
    sources = {
        name: Source(server.url + path, len(server.files[path]), hashlib.sha256(server.files[path]).hexdigest())
        for name, path in (("annotations", "/a.zip"), ("val", "/v.zip"))
    }
    monkeypatch.setattr(download, "COCO", sources)
    monkeypatch.setattr(download, "IMAGES", {"val": 1})
    printed = run(capsys, "download", "coco", "--split", "val", "--out", tmp_path, "--keep", "--quiet")
    assert "instances_val2017.json: unpacked" in printed and "val2017: 1 images unpacked" in printed
    assert coco(tmp_path, "val")[0].boxes.tolist() == [[1, 2, 4, 6]]
    assert len(json.loads((tmp_path / "downloads.json").read_text())) == 2
    kept = ["annotations", "annotations_trainval2017.zip", "downloads.json", "val2017", "val2017.zip"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    # Of what is removed, only that comes anew; and a server that changed its file is not believed.
    shutil.rmtree(tmp_path / "val2017")
    (tmp_path / "val2017.zip").unlink()
    server.files["/v.zip"], server.asked = server.files["/v.zip"][::-1], []
    err = run(capsys, "download", "coco", "--out", tmp_path, "--quiet", status=2)
    assert "minidet: " in err and "/v.zip: what came has the sha256" in err and len(server.asked) == 2
    assert not (tmp_path / "val2017").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "c.xml: no VOC annotation of the classes RBC, WBC: "),
        (xml([("Dog", 1, 2, 3, 4)]), "it names 'Dog'"),
        (xml([("RBC", "left", 2, 3, 4)]), "could not convert string to float: 'left'"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + xml([]), "declares entities"),
    ],
)
def test_a_bad_voc_annotation_is_named(tmp_path, content, message):
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "c.xml").write_text(content)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("c\n")
    with pytest.raises(DataError, match=message):
        write_voc_as_coco(tmp_path, tmp_path, ("RBC", "WBC"), ("train",), {})


def test_the_original_boxes_come_back(data_folder, tmp_path):
    """BCCD's json, written as VOC and converted again."""
    folder: Path = data_folder("bccd") / "annotations"
    originals = {split: json.loads((folder / f"instances_{split}.json").read_text()) for split in SPLITS}
    for name in ("Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for split, data in originals.items():
        names = {image["id"]: Path(image["file_name"]).stem for image in data["images"]}
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names.values()))
        classes = {category["id"]: category["name"] for category in data["categories"]}
        for image_id, name in names.items():
            rows = [(classes[a["category_id"]], a["bbox"]) for a in data["annotations"] if a["image_id"] == image_id]
            text = xml([(k, x, y, x + w, y + h) for k, (x, y, w, h) in rows])
            text = text.replace(">40</width>", ">640</width>").replace(">30</height>", ">480</height>")
            (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    assert write_voc_as_coco(tmp_path, tmp_path / "out", download.BCCD_CLASSES, SPLITS, {}) == 0
    keys = ("id", "image_id", "category_id", "bbox", "area")
    for split, data in originals.items():
        found = json.loads((tmp_path / "out" / f"instances_{split}.json").read_text())
        rows = [[[a[key] for key in keys] for a in given["annotations"]] for given in (found, data)]
        assert rows[0] == rows[1]
        assert [i["file_name"] for i in found["images"]] == [i["file_name"] for i in data["images"]]
