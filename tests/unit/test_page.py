"""The run's page: its history followed, downsampled and served; nothing that a run or a request holds breaks it."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults

import numpy as np
import pytest

from symile_dist.masking import masked, masked_data
from symile_dist.metrics.history import HISTORY_FILE, History
from symile_dist.view.folder import RunFolder
from symile_dist.view.following import HistoryFile, RunHistory
from symile_dist.view.page import page_application
from symile_dist.view.series import POINTS, Part, Table, bucket_width
from tests import made_run


class Client:
    """Asks a WSGI application as a browser would."""

    def __init__(self, directory: Path) -> None:
        self.application = page_application(directory)
        self.status = ""
        self.headers: dict[str, str] = {}

    def get(self, path: str, query: str = "", method: str = "GET", **headers: str) -> bytes:
        environ: dict[str, Any] = {}
        setup_testing_defaults(environ)
        environ.update(PATH_INFO=path, QUERY_STRING=query, REQUEST_METHOD=method, **headers)

        def start_response(status: str, given: list[tuple[str, str]], exc_info: Any = None) -> None:
            self.status, self.headers = status, dict(given)

        return b"".join(self.application(environ, start_response))

    def json(self, path: str, query: str = "") -> Any:
        content = self.get(path, query)
        assert self.status == "200 OK", f"{path}?{query}: {self.status} {content[:200]!r}"
        return json.loads(content)

    def section(self, name: str) -> Any:
        return self.json("/api/run")["sections"][name]["data"]


def table_of(values: list[float], steps: list[int] | None = None, replayed: bool = True) -> Table:
    steps = steps or list(range(1, len(values) + 1))
    table = Table(replayed)
    records = [{"time": float(step), "loss": value} for step, value in zip(steps, values, strict=True)]
    table.add(records, np.array(steps, np.float64))
    return table


def part_of(table: Table, first: float = 0, last: float = 1e15) -> dict[str, Any]:
    part = Part(table, first, last)
    column = part.column("loss")
    assert column is not None
    return {**part.grid(), **column}


# -- Downsampling ------------------------------------------------------------------------------------------------------


def test_few_records_are_given_as_they_are() -> None:
    found = part_of(table_of([3.0, math.nan, 2.5, -math.inf]))
    assert found["width"] == 0 and found["steps"] == [1, 2, 3, 4]
    assert found["mean"] == [3.0, None, 2.5, None]
    assert found["odd"] == [[1, "NaN"], [3, "-Infinity"]]
    assert "min" not in found


def test_spikes_and_what_is_not_finite_survive_downsampling() -> None:
    values = [1.0 + 0.01 * math.sin(step) for step in range(100_000)]
    values[41_234], values[70_000], values[70_001], values[90_000] = 55.0, math.nan, math.inf, -7.0
    found = part_of(table_of(values))
    count = len(found["steps"])
    assert POINTS / 3 < count <= POINTS
    assert {len(found[name]) for name in ("mean", "min", "max", "times")} == {count}
    width = found["width"]
    assert found["max"][41_235 // width] == 55.0 and found["min"][90_001 // width] == -7.0
    assert sorted(max(found["max"]) for _ in [0]) == [55.0] and min(found["min"]) == -7.0
    assert found["odd"] == [[70_001 // width, "NaN"]], "NaN counts before infinity"
    assert all(low <= mean <= high for low, mean, high in zip(found["min"], found["mean"], found["max"], strict=True))
    exact = np.mean(values[:width])  # steps 1 to width - 1 are the first bucket's
    assert found["mean"][0] == pytest.approx(exact, rel=1e-3)


def test_a_bucket_of_nothing_but_nan_has_no_mean() -> None:
    found = part_of(table_of([math.nan if 2000 <= each < 3000 else 1.0 for each in range(10_000)]))
    bad = [at for at, mean in enumerate(found["mean"]) if mean is None]
    assert bad and {at for at, _ in found["odd"]} >= set(bad)


def test_a_zoom_gives_the_records_themselves() -> None:
    table = table_of([float(step) for step in range(1, 50_001)])
    found = part_of(table, 1000, 1200)
    assert found["width"] == 0 and found["mean"] == found["steps"] == list(range(1000, 1201))
    empty = Part(table, 60_000, 70_000)
    assert empty.grid()["steps"] == [] and empty.column("loss") is None


@pytest.mark.parametrize("rows", [601, 700, 1000, 12_345, 99_999, 100_000, 1_000_000])
def test_points_stay_few_whatever_the_number_of_records(rows: int) -> None:
    for every in (1, 7, 10, 50):
        width = bucket_width(rows * every, rows)
        assert POINTS / 6 < rows * every / max(width, every) <= POINTS + 1, f"{rows} records, one in {every} steps"


def test_buckets_stay_where_they_are_while_a_run_grows() -> None:
    table = table_of([1.0] * 5000)
    before = Part(table, 0, 1e15).grid()
    table.add([{"loss": 2.0}] * 50, np.arange(5001, 5051, dtype=np.float64))
    after = Part(table, 0, 1e15).grid()
    assert after["steps"][: len(before["steps"])] == before["steps"]


def test_steps_that_go_back_replace_what_came_after() -> None:
    table = table_of([5.0, 4.0, 3.0, 2.0, 9.0, 8.0], [10, 20, 30, 40, 20, 30])
    found = part_of(table)
    assert (found["steps"], found["mean"]) == ([10, 20, 30], [5.0, 9.0, 8.0])
    assert table.cuts == 1


def test_records_that_are_not_replayed_are_sorted_by_step() -> None:
    found = part_of(table_of([1.0, 2.0, 3.0], [500, 100, 300], replayed=False))
    assert (found["steps"], found["mean"]) == ([100, 300, 500], [2.0, 3.0, 1.0])


def test_keys_that_come_late_and_values_that_are_no_numbers() -> None:
    table = Table(replayed=True)
    records: list[dict[str, Any]] = [
        {"loss": 1.0, "note": "words", "phases": {"forward": 0.1}},
        {"loss": None, "accuracy": 0.5, "phases": {"forward": "NaN", "loss": 0.2}},
        {"loss": "Infinity", "accuracy": [1], "phases": 3, "deep": {"a": {"b": {"c": {"d": {"e": 1}}}}}},
        {"loss": 10**400, "accuracy": True, "phases": {}},
        {"loss": 1e300},
    ]
    table.add(records, np.arange(1.0, 6.0))
    part = Part(table, 0, 100)
    assert part.column("loss") == {
        "mean": [1.0, None, None, None, pytest.approx(3.40282e38, rel=1e-4)],
        "odd": [[2, "Infinity"], [3, "Infinity"]],
    }
    assert part.column("accuracy") == {"mean": [None, 0.5, None, 1, None]}
    assert part.column("phases.forward") == {"mean": [0.1, None, None, None, None], "odd": [[1, "NaN"]]}
    assert part.column("note") is None


# -- A file that grows -------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    file = HistoryFile(path)
    assert file.read() == (False, []), "there is no file yet"
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert file.read() == (False, [b'{"a": 1}'])
    assert file.read() == (False, [])
    with path.open("ab") as more:
        more.write(b': 2}\n{"c": 3}\n')
    assert file.read() == (False, [b'{"b": 2}', b'{"c": 3}'])


@pytest.mark.parametrize("how", ["replaced", "cut", "as long as before", "gone and back"])
def test_a_replaced_file_is_begun_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    file = HistoryFile(path)
    assert len(file.read()[1]) == 3
    if how == "replaced":
        (tmp_path / "new").write_bytes(b'{"a": 1}\n{"a": 5}\n{"a": 6}\n{"a": 7}\n')
        os.replace(tmp_path / "new", path)
    elif how == "cut":
        os.truncate(path, 9)
    elif how == "as long as before":  # and perhaps with the same inode
        path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 4}\n')
    else:
        path.unlink()
        assert file.read() == (True, [])
        path.write_bytes(b'{"a": 1}\n')
    void, lines = file.read()
    assert void or how == "gone and back"
    assert lines == path.read_bytes().split(b"\n")[:-1]


def test_a_rewrite_that_drops_nothing_is_not_read_again(tmp_path: Path) -> None:
    history = History(tmp_path, tensorboard=False)
    history.write("train", 1, loss=1.0)
    file = HistoryFile(tmp_path / HISTORY_FILE)
    assert len(file.read()[1]) == 1
    history.close()
    inode = (tmp_path / HISTORY_FILE).stat().st_ino
    again = History(tmp_path, tensorboard=False)
    again.write("train", 2, loss=0.5)
    again.close()
    void, lines = file.read()
    assert not void and len(lines) == 1, "the writer opens the file anew at each restart"
    assert (tmp_path / HISTORY_FILE).stat().st_ino != inode


def test_a_line_that_never_ends_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symile_dist.view.following.CHUNK_BYTES", 100)
    monkeypatch.setattr("symile_dist.view.following.MAX_LINE_BYTES", 1000)
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b'{"kind":"train","step":1,"loss":1}\n' + b"x" * 5000 + b'\n{"kind":"train","step":2,"loss":2}\n')
    history = RunHistory(tmp_path)
    history.refresh()
    assert part_of(history.tables["train"])["steps"] == [1, 2]


def test_a_resumed_run_is_shown_as_its_history_says(tmp_path: Path) -> None:
    writer = History(tmp_path, tensorboard=False)
    for step in range(1, 31):
        writer.write("train", step, loss=float(step))
    history = RunHistory(tmp_path)
    history.refresh()
    generation = history.generation
    writer.close()
    writer = History(tmp_path, resume_step=20, tensorboard=False)
    writer.write("event", 20, about="resume", message="resumed from step 20", level="info")
    writer.write("train", 21, loss=99.0)
    history.refresh()
    found = part_of(history.tables["train"])
    assert found["steps"] == list(range(1, 22)) and found["mean"][-1] == 99.0
    assert history.generation != generation
    assert [event.sort for event in history.events()] == ["resume"]
    writer.close()


def test_damaged_lines_and_strange_records_are_left_out(tmp_path: Path) -> None:
    lines = [
        b'{"kind": "train", "step": 1, "loss": 2.0}',
        b"\xff\xfe broken",
        b"[1, 2]",
        b'{"kind": 7, "step": 2}',
        b'{"step": 3, "loss": 1}',
        b'{"kind": "train", "step": "four", "loss": 1.5}',
        b'{"kind": "train", "step": 1e999, "loss": 1.0}',
        b'{"kind": "event", "step": 9, "message": ["a"], "level": "loud", "time": "NaN"}',
        b"{" * 5000,
        b"",
    ]
    (tmp_path / HISTORY_FILE).write_bytes(b"\n".join(lines) + b"\n")
    client = Client(tmp_path)
    assert client.section("progress")["step"] == 1
    assert client.section("events")["rows"][0]["level"] == "info"
    client.json("/api/curves")


def test_common_events_do_not_push_out_those_that_matter(tmp_path: Path) -> None:
    with (tmp_path / HISTORY_FILE).open("w") as file:
        file.write(made_run.line({"kind": "restart", "step": 1, "cause": "rank_lost", "message": "rank 1 is lost"}))
        for step in range(2, 5000):
            file.write(
                made_run.line({"kind": "event", "step": step, "about": "skip", "message": f"step {step}: a spike"})
            )
    events = Client(tmp_path).section("events")
    assert events["counts"] == {"restart": 1, "skip": 4998}
    assert events["rows"][0]["message"] == "rank 1 is lost" and events["rows"][-1]["step"] == 4999
    assert len(events["rows"]) <= 500


# -- What the page asks for --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run.write_run(tmp_path / "made")


def test_all_sections_of_a_run(run: Path) -> None:
    client = Client(run)
    answer = client.json("/api/run")
    sections = {name: section["data"] for name, section in answer["sections"].items()}
    assert sections["run"]["status"] == "running" and sections["run"]["restarts"] == 1
    assert sections["run"]["launch"] == {"backend": "slurm", "job": "20260101-120000"}
    progress = sections["progress"]
    assert (progress["step"], progress["total"], progress["fraction"]) == (4000, 5000, 0.8)
    assert progress["eta_seconds"] == pytest.approx(1000 * progress["step_seconds"])
    assert sections["goodput"]["goodput"] == pytest.approx(0.8951, abs=1e-3)
    assert len(sections["ranks"]["rows"]) == sections["ranks"]["expected"] == 8
    slowest = max(sections["ranks"]["rows"], key=lambda row: row["own_seconds"])
    assert slowest["rank"] == 5
    assert {event["sort"] for event in sections["events"]["rows"]} == {"skip", "rollback", "restart", "resume", "spike"}
    assert sections["evaluation"]["rows"][0]["step"] == 4000 and "shards" not in sections["evaluation"]["rows"][0]
    assert "loss" in {panel["key"] for panel in sections["panels"]["rows"]}
    assert sections["latest"]["records"]["train"]["step"] == 4000


def test_checkpoints_tell_what_is_cheap_to_know(run: Path) -> None:
    section = Client(run).section("checkpoints")
    rows = {row["step"]: row for row in section["rows"]}
    assert [row["step"] for row in section["rows"]] == sorted(rows, reverse=True)
    assert {step: row["state"] for step, row in rows.items()} == {
        4500: "incomplete",
        4000: "complete",
        3500: "complete",
        3000: "damaged",
        2000: "complete",
        1000: "complete",
    }
    assert "900 bytes" in rows[3000]["problem"]
    assert rows[3500]["kept_as"] == ["newest", "best"] and rows[1000]["kept_as"] == ["keep_every"]
    assert rows[1000]["verified"], "the run has gone back to it"
    assert rows[4000]["bytes"] == 1000 and section["mirrored_step"] == 4000


def test_a_checkpoint_that_a_later_attempt_did_not_see_is_told(run: Path) -> None:
    (run / "checkpoints" / "attempts.json").write_text(json.dumps([[1, 0], [2, 3700]]))
    rows = {row["step"]: row["state"] for row in Client(run).section("checkpoints")["rows"]}
    assert (rows[4000], rows[3500]) == ("left behind", "complete")


def test_only_what_is_new_is_sent_again(run: Path) -> None:
    client = Client(run)
    sections = client.json("/api/run")["sections"]
    have = ",".join(section["version"] for section in sections.values())
    again = client.json("/api/run", f"have={have}")["sections"]
    assert [name for name, section in again.items() if "data" in section] == []
    (run / "goodput.json").write_text(json.dumps({"seconds": {"productive": 1.0}}))
    again = client.json("/api/run", f"have={have}")["sections"]
    assert [name for name, section in again.items() if "data" in section] == ["progress", "goodput"]

    first = client.json("/api/curves")
    version = quote(first["version"])
    assert client.get("/api/curves", f"version={version}") == b"" and client.status == "304 Not Modified"
    with (run / HISTORY_FILE).open("a") as file:
        file.write(made_run.line({"kind": "train", "step": 4010, "time": 1.0, "loss": 0.125}))
    more = client.json("/api/curves", f"version={version}")
    assert list(more["kinds"]) == ["train"] and more["kinds"]["train"]["appended"]
    assert more["kinds"]["train"]["steps"][-1] == 4010 and len(more["kinds"]["train"]["steps"]) == 2
    assert more["series"]["train"]["loss"]["mean"][-1] == 0.125
    other = Client(run).json("/api/curves", f"version={quote(more['version'])}")
    assert not other["kinds"]["train"]["appended"], "another server's version is void"


def test_a_range_of_steps(run: Path) -> None:
    found = Client(run).json("/api/curves", "first=100&last=200")
    assert found["kinds"]["train"]["steps"] == list(range(100, 201, 10))
    whole = Client(run).json("/api/curves")
    assert whole["kinds"]["train"]["steps"] == list(range(10, 4001, 10)), "after a rollback each step stands once"
    assert whole["series"]["train"]["grad_norm"]["odd"] == [[310, "Infinity"]]
    assert "phases.forward" in whole["series"]["train"]


@pytest.mark.parametrize(
    "query",
    [
        "first=-1",
        "first=1e3",
        "first=abc",
        "last=0x10",
        "first=1&last=99999999999999999999999999",
        "first=5&last=4",
        "first=%00",
        "last=١٢",
        "&".join(f"a{number}=1" for number in range(50)),
        "first=" + "9" * 100_000,
    ],
)
def test_bad_queries_are_told_so(run: Path, query: str) -> None:
    client = Client(run)
    content = client.get("/api/curves", query)
    assert client.status == "400 Bad Request" and json.loads(content)["error"]


@pytest.mark.parametrize(
    "query",
    ["version=", "version=x;train=1/2/3", "version=" + "a;" * 40_000, "have=" + "," * 1000, "%ff%fe=1", "first=&last="],
)
def test_strange_versions_are_answered_in_full(run: Path, query: str) -> None:
    client = Client(run)
    assert client.json("/api/curves", query)["kinds"]["train"]["steps"]
    assert client.json("/api/run", query)["sections"]["run"]["data"]


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/config.yaml",
        "/static/../page.py",
        "/..%2fconfig.yaml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/page.js/",
        "/page.js\x00.html",
        "/\x00",
        "/api/run/../../history.jsonl",
        "/api/",
        "/page.css?x",
        "/" + "a" * 200_000,
        "relative",
        "/index.html",
        "/history.jsonl",
        "\\..\\config.yaml",
    ],
)
def test_no_path_leads_to_a_file(run: Path, path: str) -> None:
    client = Client(run)
    content = client.get(path)
    assert client.status.split()[0] in ("404", "400"), f"{path[:80]!r} is answered with {client.status}"
    assert len(content) < 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", ""])
def test_only_get_and_head(run: Path, method: str) -> None:
    client = Client(run)
    client.get("/api/run", method=method)
    assert client.status.startswith("405") and client.headers["Allow"] == "GET, HEAD"
    assert client.get("/", method="HEAD") == b"" and client.status == "200 OK"
    assert int(client.headers["Content-Length"]) > 1000


def test_headers_keep_the_browser_from_anything_else(run: Path) -> None:
    client = Client(run)
    for path in ("/", "/api/run", "/api/curves", "/page.js", "/nowhere"):
        client.get(path)
        policy = client.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert client.headers["X-Content-Type-Options"] == "nosniff"
    client.get("/api/run")
    assert client.headers["Cache-Control"] == "no-store"


def test_static_files_are_whole_and_name_nothing_outside() -> None:
    client = Client(Path("nowhere"))
    seen = set()
    for path in ("/", "/page.css", "/page.js"):
        text = client.get(path).decode()
        seen |= {
            part for quoted in text.split('"')[1::2] for part in [quoted.removeprefix("./")] if part.endswith(".js")
        }
        for scheme in ("http://", "https://"):
            outside = [line for line in text.splitlines() if scheme in line and "www.w3.org" not in line]
            assert not outside, f"{path}: {outside}"
        assert client.headers["ETag"]
        client.get(path, HTTP_IF_NONE_MATCH=client.headers["ETag"])
        assert client.status == "304 Not Modified"
    assert len(seen) > 4
    for name in seen:
        client.get(f"/{name}")
        assert client.status == "200 OK", f"the page asks for {name}"


def test_answers_are_compressed_where_that_is_asked_for(run: Path) -> None:
    client = Client(run)
    plain = client.get("/api/curves")
    packed = client.get("/api/curves", HTTP_ACCEPT_ENCODING="gzip, deflate")
    assert client.headers["Content-Encoding"] == "gzip" and len(packed) < len(plain) / 2
    assert json.loads(gzip.decompress(packed))["kinds"]


# -- Secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:se/cr+et@bucket/x", "s3://***@bucket/x"),
        ("http://user:pass@host:80/a", "http://***@host:80/a"),
        ("https://ghp_token@host/repo", "https://***@host/repo"),
        ("https://host/x?X-Amz-Signature=abc&y=1", "https://host/x?..."),
        ("s3://bucket/path", "s3://bucket/path"),
        ("http://host:9000/metrics", "http://host:9000/metrics"),
        ("mail a@b.c", "mail a@b.c"),
    ],
)
def test_secrets_in_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_secrets_in_a_config_are_masked() -> None:
    hidden = "secret-value with words"
    config = {
        "a": {"api_key": hidden, "apiKey": hidden, "hf_token": hidden, "private_key": hidden, "Authorization": hidden},
        "auth": {"user": hidden, "pass": hidden},
        "tokens": [hidden, {"x": hidden}],
        "credentials": {"deeper": {"token": hidden}},
        "url": "https://me:secret-value@host/x?api_key=secret-value",
    }
    assert "secret-value" not in json.dumps(masked_data(config))
    plain = {
        "tokenizer": "bert",
        "max_tokens": 77,
        "token_file": "/etc/token",
        "key": "a",
        "token": None,
        "tokens": {"text": {"length": 3}},
    }
    assert masked_data(plain) == plain


def test_no_secret_reaches_the_page(run: Path) -> None:
    with (run / HISTORY_FILE).open("a") as file:
        message = 'unreadable: s3://me:topsecret@bucket/a.tar?sig="x"'
        file.write(made_run.line({"kind": "event", "step": 4000, "message": message, "level": "warning"}))
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**told, "message": "https://me:topsecret@host/ failed"}))
    text = Client(run).get("/api/run").decode()
    for secret in ("verysecret", "topsecret", "abcdef", "hidden"):
        assert secret not in text, f"{secret} is shown"
    assert "s3://***@bucket/train" in text


# -- Runs that are hardly there ----------------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    client = Client(tmp_path / "later")
    assert client.section("run")["status"] == "unknown" and client.section("progress")["step"] is None
    assert client.json("/api/curves")["kinds"] == {}
    made_run.write_run(tmp_path / "later")
    assert client.section("run")["status"] == "running" and client.json("/api/curves")["kinds"]


def test_a_finished_run_from_its_history_alone(tmp_path: Path) -> None:
    made_run.write_history(tmp_path, last=600, total=600, end="finished")
    (tmp_path / "config.yaml").write_text(made_run.CONFIG.replace("steps: 5000", "steps: 600"))
    client = Client(tmp_path)
    assert client.section("run")["status"] == "finished" and not client.section("run")["live"]
    assert client.section("progress")["fraction"] == 1.0 and client.section("progress")["eta_seconds"] is None
    assert client.section("goodput")["goodput"] > 0.5, "from the history's last account"


@pytest.mark.parametrize(
    "name", ["run.json", "ranks.json", "goodput.json", "config.yaml", "evaluation/test-step-4000.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[[1]]", b"7", b'"x"', b"\xff\x00", b'{"seconds": {"a": "b"}, "restarts": 3}', b"[" * 3000],
)
def test_damaged_files_are_left_out(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    client = Client(run)
    client.json("/api/run")
    assert client.json("/api/curves")["kinds"]["train"]["steps"]


def test_values_of_another_type_than_they_should_have(run: Path) -> None:
    (run / "run.json").write_text(
        json.dumps(
            {
                "status": 7,
                "failures": [1, {"cause": {}}],
                "lineage": "x",
                "launch": [],
                "created": "y",
                "world_size": "z",
            }
        )
    )
    (run / "ranks.json").write_text(
        json.dumps([{"rank": "a"}, {"rank": 1, "phases": [1], "host": 3, "step": "NaN"}, 5, None])
    )
    with (run / HISTORY_FILE).open("a") as file:
        for key in ("slowest", "phases", "loss"):
            file.write(made_run.line({"kind": "train", "step": 4001, key: [{}]}))
    client = Client(run)
    assert [row["rank"] for row in client.section("ranks")["rows"]] == [1]
    client.json("/api/curves")


# -- Size --------------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_records_and_a_thousand_ranks(tmp_path: Path) -> None:
    made_run.write_long_history(tmp_path, 100_000)
    made_run.write_files(tmp_path, world_size=1024, slow=700)
    client = Client(tmp_path)
    begin = time.monotonic()
    longest = 0.0
    while True:
        asked = time.monotonic()
        progress = client.section("progress")
        longest = max(longest, time.monotonic() - asked)
        if progress["read"] == 1.0:
            break
        assert time.monotonic() - begin < 60
    assert progress["records"] == 100_000 and longest < 5, f"one answer took {longest:.1f} s"
    asked = time.monotonic()
    curves = client.get("/api/curves", HTTP_ACCEPT_ENCODING="gzip")
    seconds = time.monotonic() - asked
    assert seconds < 5, f"all curves took {seconds:.1f} s"
    assert len(curves) < 400_000
    loss = json.loads(gzip.decompress(curves))["series"]["train"]["loss"]
    assert len(loss["mean"]) <= POINTS and max(loss["max"]) > 70, "the spike of one record is lost"
    history = RunHistory(tmp_path)
    history.refresh()
    held = sum(column.rows.nbytes + column.values.nbytes for column in history.tables["train"].columns.values())
    assert held < 60e6
    ranks = RunFolder(tmp_path).ranks(history)
    assert len(ranks["rows"]) == 1024
