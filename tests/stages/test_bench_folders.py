"""Full-Duplex-Bench's folders, played to a planted server: what is read, written, counted, refused.

The user is espeak; the planted server echoes him or says words at frames that a test names, so
every column is known beforehand.
"""

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
from typer.testing import CliRunner

from duplex.cli import app
from duplex.errors import MissingInputError, RequestError, ServerError
from pipeline.bench import BenchOptions, bench
from pipeline.bench_hearing import Ears
from pipeline.engines.espeak import EspeakEngine
from pipeline.evaluation.bench_folders import RECORD, finished, read_items
from tests.stages.planted_server import Plan, planted

RATE = 16_000
SPOKEN_S = 1.0  # silence before the user speaks


@pytest.fixture(scope="module")
def user():
    """float32 at 16 kHz: a second of silence, a sentence, silence up to 6 s."""
    with EspeakEngine() as engine:
        made = engine.synthesize("Where did you go for your holidays?", {"voice": "en-us"})
    speech = soxr.resample(made.samples, 24_000, RATE)
    samples = np.zeros(6 * RATE, dtype=np.float32)
    samples[RATE : RATE + len(speech)] = speech
    return SimpleNamespace(samples=samples, end_s=SPOKEN_S + len(speech) / RATE)


@pytest.fixture(scope="module")
def ears():
    return Ears()


def put(folder, dataset, number, user, **side):
    place = folder / dataset / str(number)
    place.mkdir(parents=True)
    soundfile.write(place / "input.wav", user.samples, RATE, subtype="PCM_16")
    for name, value in side.items():
        (place / f"{name}.json").write_text(json.dumps(value))
    return place


def turn(end_s):
    return [{"text": "[TURN-TAKING]", "timestamp": [end_s, end_s + 0.4]}]


@pytest.fixture
def folder(tmp_path, user):
    root = tmp_path / "fdb"
    put(root, "candor_turn_taking", 2, user, turn_taking=turn(user.end_s))
    put(root, "candor_turn_taking", 10, user, turn_taking=turn(user.end_s))
    put(root, "candor_pause_handling", 1, user, pause=turn(2.0), transcription=[])
    cut = {"context": "a", "interrupt": "b", "timestamp": [SPOKEN_S, user.end_s]}
    put(root, "synthetic_user_interruption", 1, user, interrupt=[cut])
    put(root, "icc_backchannel", 3, user)
    (root / "icc_gt_distribution.json").write_text(json.dumps({"3": [0.1, 0.2, 0.7]}))
    return root


def run(folder, plan, out, ears, **options):
    lines = []
    with planted(plan) as url:
        result = bench(folder, url, out, BenchOptions(**options), ears, lines.append)
    return result, lines


def value(result, dataset, key, definition):
    row = next(r for r in result["rows"] if (r["dataset"], r["key"]) == (dataset, key))
    return row[definition]["value"]


def lateness(folder, place):
    """Seconds by which output.wav, an echo, follows input.wav; asserts that it is one."""
    heard, _ = soundfile.read(place / "output.wav")
    sent, _ = soundfile.read(folder / place.parent.name / place.name / "input.wav")
    sent = soxr.resample(sent, RATE, 24_000)
    assert len(heard) == len(sent)
    lags = np.fft.irfft(np.fft.rfft(heard, 2 * len(sent)) * np.fft.rfft(sent, 2 * len(sent)).conj())
    late = int(np.argmax(lags))
    assert np.abs(heard[late:] - sent[: len(sent) - late]).max() < 2e-3
    return late / 24_000


GREETING = {0: " Hi", 3: " there", 6: " my", 9: " friend"}


# -- in and out


def test_folders_in_numbers_order_with_what_their_side_files_say(folder, user):
    items, left_out = read_items(folder)
    assert left_out == []
    assert [item.name for item in items] == [
        "candor_pause_handling/1",
        "candor_turn_taking/2",
        "candor_turn_taking/10",
        "icc_backchannel/3",
        "synthetic_user_interruption/1",
    ]
    assert (items[1].user_start_s, items[1].user_end_s) == (None, user.end_s)
    assert (items[4].user_start_s, items[4].user_end_s) == (SPOKEN_S, user.end_s)
    assert items[3].reference == (0.1, 0.2, 0.7)
    assert {note for item in items for note in item.missing} == set()
    assert [i.name for i in read_items(folder / "candor_turn_taking")[0]] == [
        "candor_turn_taking/2",
        "candor_turn_taking/10",
    ]


def test_what_its_scripts_read_is_written(folder, user, ears, tmp_path):
    """An echo 2.4 s late is an answer of the user's length; its text is planted at its frames."""
    first = int((SPOKEN_S + 2.4) / 0.08)
    plan = Plan(echo=30, says={first: " Where", first + 3: " did", first + 6: " you go"})
    result, _ = run(folder, plan, tmp_path / "out", ears, text_prompt="You are Ann.")
    assert {seen["text_prompt"] for seen in plan.seen} == {"You are Ann."}
    for name, rate in (("candor_turn_taking/2", 24_000), ("icc_backchannel/3", 16_000)):
        info = soundfile.info(tmp_path / "out" / name / "output.wav")
        assert (info.samplerate, info.channels, info.subtype) == (rate, 1, "PCM_16")
        assert info.frames == 6 * rate  # as long as the input
    place = tmp_path / "out" / "candor_turn_taking" / "2"
    said = json.loads((place / "output.json").read_text())
    assert said["text"] == "Where did you go"
    assert set(said) == {"text", "chunks"}
    assert [chunk["text"] for chunk in said["chunks"]] == ["Where", "did", "you", "go"]
    starts = [chunk["timestamp"][0] for chunk in said["chunks"]]
    assert starts == pytest.approx([first * 0.08, (first + 3) * 0.08, *[(first + 6) * 0.08] * 2])
    ends = [chunk["timestamp"][1] for chunk in said["chunks"]]
    assert ends[:2] == pytest.approx(starts[1:3])  # a word ends where the next begins
    assert ends[3] == pytest.approx(user.end_s + 2.4, abs=0.4)  # or where the speech does
    side = (folder / "candor_turn_taking" / "2" / "turn_taking.json").read_text()
    assert (place / "turn_taking.json").read_text() == side
    assert lateness(folder, place) == pytest.approx(2.4, abs=1e-3)
    assert value(result, "candor_turn_taking", "tor", "published") == 1
    offset = value(result, "candor_turn_taking", "latency_s", "corrected")
    assert offset == pytest.approx(SPOKEN_S + 2.4 - user.end_s, abs=0.2)


def test_a_greeting_is_a_take_over_as_published_and_none_corrected(folder, user, ears, tmp_path):
    result, _ = run(folder, Plan(says=GREETING), tmp_path / "out", ears)
    assert value(result, "candor_turn_taking", "tor", "published") == 1
    assert value(result, "candor_turn_taking", "latency_s", "published") == 0
    assert value(result, "candor_turn_taking", "tor", "corrected") == 0
    assert value(result, "candor_turn_taking", "latency_s", "corrected") is None
    assert value(result, "candor_pause_handling", "tor", "published") == 1
    assert value(result, "candor_pause_handling", "tor", "corrected") == 0
    assert value(result, "synthetic_user_interruption", "tor", "published") == 0
    assert value(result, "icc_backchannel", "jsd", "published") == 1
    assert value(result, "icc_backchannel", "jsd", "corrected") is None
    row = result["rows"][0]
    assert (row["published"]["n"], row["protocol"]) == (1, result["fingerprint"])


def test_with_a_lead_in_the_greeting_is_over_before_the_user_begins(folder, ears, tmp_path):
    plan = Plan(says=GREETING, echo=10)
    result, _ = run(folder, plan, tmp_path / "out", ears, lead_in_s=1.9)
    assert result["protocol"]["lead_in_s"] == 1.92  # whole frames
    assert {sample["opening"] for sample in result["samples"]} == {"Hi there my friend"}
    assert value(result, "candor_turn_taking", "tor", "published") == 0
    place = tmp_path / "out" / "candor_turn_taking" / "2"
    assert json.loads((place / "output.json").read_text()) == {"text": "", "chunks": []}
    assert lateness(folder, place) == pytest.approx(0.8, abs=1e-3)  # as without a lead-in


def test_an_interruptions_transcript_begins_after_it(folder, user, ears, tmp_path):
    late = int(user.end_s / 0.08) + 2
    plan = Plan(says={5: " before", late: " and", late + 15: " after"})
    run(folder, plan, tmp_path / "out", ears)
    place = tmp_path / "out" / "synthetic_user_interruption" / "1"
    assert json.loads((place / "output.json").read_text())["text"] == "and after"
    everything = json.loads((place / RECORD).read_text())["words"]
    assert [word for word, _, _ in everything] == ["before", "and", "after"]


# -- going on


def test_what_is_done_is_kept_and_what_is_half_done_is_done_again(folder, ears, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ServerError, match=r"candor_pause_handling/1: .*fell over"):
        run(folder, Plan(break_at=5, breakage="error"), out, ears)
    assert not list(out.rglob(RECORD))
    plan = Plan()
    whole, _ = run(folder, plan, out, ears)
    assert len(plan.seen) == 5
    again = Plan()
    same, lines = run(folder, again, out, ears)
    assert (same["rows"], same["samples"]) == (whole["rows"], whole["samples"])
    assert again.seen == []
    assert all(line.endswith("done before") for line in lines)
    (out / "icc_backchannel" / "3" / RECORD).unlink()  # killed before its last file
    (out / "candor_turn_taking" / "2" / "output.json").write_text("{")
    (out / "candor_turn_taking" / "10" / "output.wav").unlink()
    third = Plan()
    assert run(folder, third, out, ears)[0]["rows"] == whole["rows"]
    assert len(third.seen) == 3
    soundfile.write(folder / "candor_pause_handling" / "1" / "input.wav", np.zeros(RATE), RATE)
    fourth = Plan()
    run(folder, fourth, out, ears)
    assert len(fourth.seen) == 1  # other audio is another conversation
    assert not list(out.rglob("*.tmp"))


def test_one_folder_holds_one_protocol_and_one_model(folder, ears, tmp_path):
    out = tmp_path / "out"
    run(folder, Plan(), out, ears)
    plan = Plan()
    with pytest.raises(RequestError, match=r"text_prompt '' there, 'You are Bo\.' now"):
        run(folder, plan, out, ears, text_prompt="You are Bo.")
    with pytest.raises(RequestError, match="pace 'lock-step' there, 'real time' now"):
        run(folder, plan, out, ears, real_time=True)
    assert plan.seen == []
    (out / "icc_backchannel" / "3" / RECORD).unlink()
    with pytest.raises(RequestError, match="one model's answers, found 2"):
        run(folder, Plan(model_digest="b" * 64), out, ears)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match="found other files"):
        run(folder, Plan(), tmp_path / "full", ears)


def test_a_busy_server_is_waited_for_and_an_unproven_prompt_is_said(folder, ears, tmp_path):
    plan = Plan(busy_for=2, digest="f" * 64)
    result, _ = run(folder / "icc_backchannel", plan, tmp_path / "out", ears)
    assert not result["samples"][0]["prompt_proven"]
    assert "prompt not proven" in (tmp_path / "out" / "bench.md").read_text()


# -- from anybody


def test_what_is_missing_costs_only_its_column(tmp_path, user, ears):
    root = tmp_path / "fdb"
    put(root, "candor_turn_taking", 1, user)
    put(root, "icc_backchannel", 1, user)
    put(root, "synthetic_user_interruption", 1, user)
    result, _ = run(root, Plan(says=GREETING), tmp_path / "out", ears)
    assert value(result, "candor_turn_taking", "tor", "published") == 1
    assert value(result, "candor_turn_taking", "latency_s", "published") is None
    assert value(result, "icc_backchannel", "jsd", "published") is None
    assert value(result, "icc_backchannel", "tor", "corrected") == 0
    assert [entry[0] for entry in result["left_out"]] == ["synthetic_user_interruption/1"]
    written = (tmp_path / "out" / "bench.md").read_text()
    for said in ("turn\\_taking.json is missing", "distribution.json is missing", "interrupt.json"):
        assert said in written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting"),
        ("[]", "out of range"),
        ('[{"timestamp": ["x", 1]}]', "must be a number"),
        ('[{"timestamp": [NaN, 1]}]', "must be a number"),
        ('[{"timestamp": [3, 1]}]', "from 0 on"),
        ('[{"timestamp": [-1, 1]}]', "from 0 on"),
        ('[{"timestamp": [1]}]', "unpack"),
        ("[" * 100_000, "nested"),
    ],
)
def test_side_files_that_are_not_what_they_should_be(tmp_path, user, content, said):
    place = put(tmp_path, "synthetic_user_interruption", 1, user)
    (place / "interrupt.json").write_text(content)
    items, left_out = read_items(tmp_path)
    assert items == []
    assert left_out[0][1].startswith("interrupt.json cannot be used")
    assert said in left_out[0][1]


def test_links_odd_names_and_other_files_are_left_out(tmp_path, user, ears):
    secret = tmp_path / "secret"
    put(secret, "candor_turn_taking", 1, user, turn_taking=turn(2.0))
    root = tmp_path / "fdb"
    good = put(root, "candor_turn_taking", 1, user, turn_taking=turn(2.0))
    (good / "pause.json").symlink_to(secret / "candor_turn_taking" / "1" / "turn_taking.json")
    linked = put(root, "candor_turn_taking", 2, user)
    (linked / "input.wav").unlink()
    (linked / "input.wav").symlink_to(secret / "candor_turn_taking" / "1" / "input.wav")
    (root / "candor_turn_taking" / "3").symlink_to(secret / "candor_turn_taking" / "1")
    put(root, "candor_turn_taking", ".hidden name", user)
    (root / "candor_turn_taking" / "4").mkdir()
    (root / "icc_backchannel").symlink_to(secret / "candor_turn_taking")
    put(root, "user_backchannel", 1, user)
    broken = put(root, "candor_turn_taking", 5, user, turn_taking=turn(2.0))
    (broken / "input.wav").write_bytes(b"RIFF\0\0\0\0WAVEnothing")
    long = put(root, "candor_turn_taking", 6, user, turn_taking=turn(2.0))
    soundfile.write(long / "input.wav", np.zeros(181 * 8000), 8000)
    pipe = put(root, "candor_turn_taking", 7, user, turn_taking=turn(2.0))
    (pipe / "input.wav").unlink()
    os.mkfifo(pipe / "input.wav")
    result, _ = run(root, Plan(), tmp_path / "out", ears)
    why = dict(result["left_out"])
    assert set(why) == {
        "candor_turn_taking/2", "candor_turn_taking/3", "candor_turn_taking/.hidden name",
        "candor_turn_taking/4", "candor_turn_taking/5", "candor_turn_taking/6",
        "candor_turn_taking/7", "icc_backchannel", "user_backchannel",
    }  # fmt: skip
    assert "under 180 s" in why["candor_turn_taking/6"]
    (only,) = result["samples"]
    assert only["name"] == "candor_turn_taking/1"
    assert only["missing"] == ["pause.json cannot be used: it must be no link"]
    assert not (tmp_path / "out" / "candor_turn_taking" / "1" / "pause.json").exists()


def test_a_link_in_the_output_is_not_written_through(folder, ears, tmp_path):
    out, elsewhere_ = tmp_path / "out", tmp_path / "elsewhere"
    run(folder / "icc_backchannel", Plan(), out, ears)
    (out / "icc_backchannel").rename(elsewhere_)
    (out / "icc_backchannel").symlink_to(elsewhere_)
    before = sorted(elsewhere_.rglob("*"))
    with pytest.raises(RequestError, match="found a link"):
        run(folder / "icc_backchannel", Plan(), out, ears)
    assert sorted(elsewhere_.rglob("*")) == before


def test_a_folder_without_datasets_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="must hold one of"):
        read_items(tmp_path)
    with pytest.raises(MissingInputError, match="found none there"):
        read_items(tmp_path / "nowhere")


# -- what is shown


def test_the_command_prints_the_protocol_beside_each_number(folder, ears, tmp_path):
    out = tmp_path / "out"
    prompt = "You are Ann, an angry customer | <b>."
    with planted(Plan(says=GREETING)) as url:
        arguments = ["bench", str(folder), url, "--out", str(out), "--text-prompt", prompt]
        printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "240"})
        assert printed.exit_code == 0, printed.output
        as_json = CliRunner().invoke(app, [*arguments, "--json"])
    result = json.loads(as_json.stdout)
    assert result == json.loads((out / "bench.json").read_text())
    written = (out / "bench.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("| ") and "seed 0" in line]
    assert len(rows) == len(result["rows"]) == 8
    for row in rows:
        for stated in ("lead-in 0 s", "voice none", "lock-step", "text stream", "text 0.7/25"):
            assert stated in row
    assert "<b>" not in written.replace("\\<b\\>", "")
    assert printed.stdout.count(result["fingerprint"][:8]) == 8
    assert "Moshi, benchmark's own 0.941" in written
    assert "other protocols" in written


def test_a_token_is_written_nowhere(folder, ears, tmp_path):
    plan = Plan()
    run(folder / "icc_backchannel", plan, tmp_path / "out", ears, token="s3cret")
    assert plan.seen[0]["authorization"] == "Bearer s3cret"
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert files
    assert all(b"s3cret" not in path.read_bytes() for path in files)


def test_finished_needs_the_record_to_be_one(folder, ears, tmp_path):
    out = tmp_path / "out"
    result, _ = run(folder / "icc_backchannel", Plan(), out, ears)
    (item,) = read_items(folder / "icc_backchannel")[0]
    assert finished(out, item, result["fingerprint"]) is not None
    assert finished(out, item, "0" * 64) is None
    record = out / "icc_backchannel" / "3" / RECORD
    for content in (b"", b"[]", b"\xff", b"{}", io.BytesIO(b"[" * 10_000).getvalue()):
        record.write_bytes(content)
        assert finished(out, item, result["fingerprint"]) is None
