"""`duplex convert tensors`: the predecessor's files to the current contract and back."""

import io
import json

import numpy as np
import pytest
import torch

from duplex.cli import main
from duplex.config import Config, ModelSection
from duplex.errors import RequestError
from duplex.files import sha256_bytes
from duplex.records import TensorClip
from duplex.store import StageFolder
from duplex.streams import (
    AGENT_ROWS,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    build_prompt,
    coffee_text,
    system_text,
)
from pipeline.converters.tensor_sources import load_model
from pipeline.engines.tensor_file import MAX_BYTES
from pipeline.imports import import_stage
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.test_imports import Trap

PROMPT = "You enjoy having a good conversation."
TURNS = [
    ("user", "Hello, what can I get you today?"),
    ("agent", "I would like a large oat milk latte with two shots of espresso please."),
    ("user", "Is that everything?"),
    ("agent", "No, that is not what I ordered."),
]
TURN_FRAMES = 40


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    return load_model(ModelSection(base=str(tiny_checkpoint)), tmp_path_factory.mktemp("runs"))


def coffee_codes(model, prompt=PROMPT, fill=TEXT_PAD, seed=0):
    """The predecessor's file, written out by itself, and what it dropped."""
    tokens = model.coder.encode(coffee_text(prompt))
    head = np.empty((17, 12 + max(25, len(tokens))), dtype=np.int64)
    head[TEXT_ROW] = fill
    head[TEXT_ROW, 6 : 6 + len(tokens)] = tokens
    head[AGENT_ROWS] = np.array(model.codec.silence)[:, None]
    head[USER_ROWS] = np.array(model.codec.sine)[:, None]
    body = np.empty((17, 10 + len(TURNS) * (TURN_FRAMES + 5)), dtype=np.int64)
    body[TEXT_ROW] = -1
    body[AGENT_ROWS] = body[USER_ROWS] = np.array(model.codec.silence)[:, None]
    generator = np.random.default_rng(seed)
    dropped = []
    for index, (role, text) in enumerate(TURNS):
        start = 5 + index * (TURN_FRAMES + 5)
        rows = AGENT_ROWS if role == "agent" else USER_ROWS
        body[rows, start : start + TURN_FRAMES] = generator.integers(0, 60, (8, TURN_FRAMES))
        if role == "agent":
            ids, window = model.coder.encode(text), int(TURN_FRAMES * 0.3)
            body[TEXT_ROW, start : start + min(len(ids), window)] = ids[:window]
            dropped.append(max(0, len(ids) - window))
    return np.concatenate([head, body], axis=1), dropped


def save(path, codes):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(codes), path)
    return path


def load(path):
    return torch.load(path, weights_only=True).numpy()


def duplex(monkeypatch, *arguments):
    """Exit code of the command, run in this process."""
    monkeypatch.setattr("sys.argv", ["duplex", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def convert(monkeypatch, tiny_checkpoint, tmp_path):
    def command(source, out, to, *more, base=tiny_checkpoint):
        given = ["--model", base, "--runs", tmp_path / "runs"]
        return duplex(
            monkeypatch, "convert", "tensors", source, out, "--to", to, *given, *more
        )  # fmt: skip

    return command


def dialogues_file(path, **changes):
    record = {
        "conversation_id": "conv_0001", "persona_id": "friendly-june", "persona_name": "June",
        "scenario": "rush hour", "system_prompt": PROMPT, "mood": "friendly",
        "turns": [{"role": role, "text": text} for role, text in TURNS],
    }  # fmt: skip
    path.write_text(json.dumps([record | changes]))
    return path


def report(out):
    return [json.loads(line) for line in (out / "conversion.jsonl").read_text().splitlines()]


def current_codes(model, original):
    """What the contract asks for, made by the builder that the server uses."""
    first = 12 + max(25, len(model.coder.encode(coffee_text(PROMPT))))
    body = original[:, first:].copy()
    body[TEXT_ROW][body[TEXT_ROW] == -1] = TEXT_PAD
    head = build_prompt(model.coder.encode(system_text(PROMPT)), model.codec)
    return np.concatenate([head.training_codes(), body], axis=1)


@pytest.mark.parametrize("fill", [TEXT_PAD, -1])
def test_a_folder_goes_to_the_current_contract_and_back_bit_for_bit(tmp_path, model, convert, fill):
    originals = {f"conv_{i:04d}": coffee_codes(model, fill=fill, seed=i)[0] for i in range(3)}
    for name, codes in originals.items():
        save(tmp_path / "pt" / f"{name}.pt", codes)
    assert convert(tmp_path / "pt", tmp_path / "new", "workbench") == 0
    for name, codes in originals.items():
        made = load(tmp_path / "new" / f"{name}.pt")
        assert made.dtype == np.int64 and np.array_equal(made, current_codes(model, codes))
    padding = "pad" if fill == TEXT_PAD else "zero"
    assert convert(tmp_path / "new", tmp_path / "old", "coffee", "--prompt-fill", padding) == 0
    for name, codes in originals.items():
        assert np.array_equal(load(tmp_path / "old" / f"{name}.pt"), codes)
    notes = {row["note"] for row in report(tmp_path / "new")}
    assert all(note.startswith("unknown: the file does not hold the text") for note in notes)
    assert all(("--prompt-fill zero" in note) == (fill == -1) for note in notes)


def test_the_record_beside_a_tensor_says_what_is_in_it(tmp_path, model, convert):
    codes, dropped = coffee_codes(model)
    assert sum(dropped) > 0, "the example must lose text"
    file = save(tmp_path / "conv_0001.pt", codes)
    told = dialogues_file(tmp_path / "training.json")
    assert convert(file, tmp_path / "new", "workbench", "--dialogues", told) == 0
    (row,) = report(tmp_path / "new")
    assert (row["dropped_tokens"], row["dropped_by_turn"]) == (sum(dropped), dropped)
    assert "note" not in row
    content = (tmp_path / "new" / "conv_0001.pt").read_bytes()
    clip = TensorClip.model_validate_json((tmp_path / "new" / "conv_0001.json").read_bytes())
    assert (clip.id, clip.dialogue_id, clip.persona_id) == ("conv_0001",) * 2 + ("friendly-june",)
    assert clip.tensor == sha256_bytes(content) and clip.dropped_tokens == sum(dropped)
    assert clip.text_tokens == sum(
        len(model.coder.encode(text)) for role, text in TURNS if role == "agent"
    )
    assert clip.codec_digest == model.codec_digest and clip.alignment == "onset"
    first = clip.prompt[-1].end
    assert [(s.label, s.start - first, s.end - first) for s in clip.turns] == [
        (role, 5 + i * 45, 45 + i * 45) for i, (role, _) in enumerate(TURNS)
    ]
    (tmp_path / "one").mkdir()
    assert convert(file, tmp_path / "one", "workbench") == 0, "an empty folder is free"
    bare = TensorClip.model_validate_json((tmp_path / "one" / "conv_0001.json").read_bytes())
    assert bare.alignment == "onset, loss unknown"
    assert (bare.dropped_tokens, bare.late_tokens) == (None, None)
    assert bare.persona_id.startswith("prompt-"), "one prompt is one persona"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"system_prompt": "Another prompt."}, "its system prompt is another"),
        ({"turns": [{"role": "agent", "text": "Hi."}, {"role": "agent", "text": "Ho."}]},
         "found another in agent turn 1"),
        ({"turns": [{"role": "agent", "text": "Hi."}, {"role": "user", "text": "Ho."}]},
         "for each of 1 agent turns, found 2"),
    ],
)  # fmt: skip
def test_a_dialogue_that_does_not_fit_leaves_the_loss_unknown(
    tmp_path, model, convert, changes, said
):
    file = save(tmp_path / "conv_0001.pt", coffee_codes(model)[0])
    told = dialogues_file(tmp_path / "training.json", **changes)
    assert convert(file, tmp_path / "new", "workbench", "--dialogues", told) == 0
    (row,) = report(tmp_path / "new")
    assert row["dropped_tokens"] is None and row["note"].startswith("unknown: ")
    assert said in row["note"]


def test_dialogues_of_other_files_are_refused(tmp_path, model, convert):
    file = save(tmp_path / "conv_0001.pt", coffee_codes(model)[0])
    told = dialogues_file(tmp_path / "training.json", conversation_id="another")
    assert convert(file, tmp_path / "new", "workbench", "--dialogues", told) == 2
    assert not (tmp_path / "new").exists()


def stage_of(tmp_path, model, codes, **changes):
    """A finished tensors stage with one clip."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(codes), buffer)
    folder = StageFolder.of(tmp_path / "run", 5, "tensors", "0" * 64)
    fields = {
        "id": "june.one", "speech_id": "june.one", "persona_id": "june",
        "tensor": sha256_bytes(buffer.getvalue()), "num_frames": codes.shape[1],
        "prompt": (), "turns": (), "text_tokens": 9, "dropped_tokens": 0, "alignment": "onset",
        "split": "train", "codec_digest": model.codec_digest,
        "tokenizer_digest": model.tokenizer_digest,
    }  # fmt: skip
    clip = TensorClip.model_validate(fields | changes)
    (folder.path / "blobs").mkdir(parents=True)
    (folder.path / "blobs" / f"{clip.tensor}.pt").write_bytes(buffer.getvalue())
    line = json.dumps({"record": "TensorClip", **clip.model_dump(mode="json", exclude_none=True)})
    folder.complete([line], files=[], counts={"records": 1}, provenance={})
    return folder.path


def test_a_stages_clips_go_to_the_predecessors_form_and_come_back(tmp_path, model, convert):
    original = coffee_codes(model)[0]
    codes = current_codes(model, original)
    stage = stage_of(tmp_path, model, codes)
    assert convert(stage, tmp_path / "old", "coffee") == 0
    assert np.array_equal(load(tmp_path / "old" / "june.one.pt"), original)
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == [
        "conversion.jsonl", "june.one.pt",
    ]  # fmt: skip
    assert convert(tmp_path / "old", tmp_path / "new", "workbench") == 0
    assert np.array_equal(load(tmp_path / "new" / "june.one.pt"), codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_digest": "0" * 64}, "the model's own codec and tokenizer"),
        ({"prompt": [{"label": "greeting", "start": 0, "end": 3}]}, "has no greeting"),
        ({"prompt": [{"label": "voice", "start": 0, "end": 3}]}, "has no voice"),
    ],
)
def test_what_the_predecessors_form_has_no_place_for(
    tmp_path, model, convert, capsys, changes, said
):
    stage = stage_of(tmp_path, model, current_codes(model, coffee_codes(model)[0]), **changes)
    assert convert(stage, tmp_path / "old", "coffee") == 1
    assert said in capsys.readouterr().err and not (tmp_path / "old").exists()


def test_epad_is_refused_and_an_unknown_word_is_not(tmp_path, model, convert, capsys):
    codes = current_codes(model, coffee_codes(model)[0])
    codes[TEXT_ROW, -2] = 0
    assert convert(stage_of(tmp_path, model, codes), tmp_path / "old", "coffee") == 0
    assert convert(save(tmp_path / "a.pt", codes), tmp_path / "x", "coffee") == 1
    assert "has no EPAD" in capsys.readouterr().err


def test_another_tokenizer_or_codec_is_refused(tmp_path, model, convert, capsys):
    other = write_tiny_checkpoint(tmp_path / "other", text_card=300)
    file = save(tmp_path / "a.pt", coffee_codes(model)[0])
    assert convert(file, tmp_path / "new", "workbench", base=other) == 1
    assert "tokenizer" in capsys.readouterr().err
    codes = coffee_codes(model)[0]
    first = 12 + len(model.coder.encode(coffee_text(PROMPT)))
    codes[USER_ROWS, :first] = (codes[USER_ROWS, :first] + 1) % 60
    file = save(tmp_path / "b.pt", codes)
    assert convert(file, tmp_path / "new", "workbench") == 1
    assert "the prompt's sine must be that of the model's codec" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{pt}", "{new}", "--to", "moshi", "--model", "{base}"], "--to must be workbench or"),
        (["{pt}", "{new}", "--to", "workbench"], "--model must be given"),
        (["{pt}", "{pt}", "--to", "workbench", "--model", "{base}"], "must not exist or be empty"),
        (["{none}", "{new}", "--to", "workbench", "--model", "{base}"], "must exist, found noth"),
        (["{empty}", "{new}", "--to", "workbench", "--model", "{base}"], "must hold .pt files"),
        (["{pt}", "{new}", "--to", "coffee", "--model", "{base}", "--prompt-fill", "x"],
         "--prompt-fill must be pad or zero"),
        (["{pt}", "{new}", "--to", "coffee", "--model", "{empty}"], "must be a checkpoint folder"),
        (["{pt}", "{new}", "--to", "workbench", "--model", "{base}", "--dialogues", "{none}"],
         "must be JSON"),
    ],
)  # fmt: skip
def test_a_wrong_request_ends_with_2_and_writes_nothing(
    tmp_path, model, monkeypatch, capsys, tiny_checkpoint, arguments, said
):
    save(tmp_path / "pt" / "a.pt", coffee_codes(model)[0])
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("pt", "new", "none", "empty")}
    filled = [part.format(**places, base=tiny_checkpoint) for part in arguments]
    assert duplex(monkeypatch, "convert", "tensors", *filled) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "pt"]
    assert [p.name for p in (tmp_path / "pt").iterdir()] == ["a.pt"]


def test_hostile_files_are_refused_and_run_nothing(tmp_path, model, convert, capsys):
    files, good = tmp_path / "pt", coffee_codes(model)[0]
    save(files / "good.pt", good)
    torch.save(Trap(tmp_path / "sprung"), files / "trap.pt")
    (files / "rubbish.pt").write_bytes(b"\x80\x04 not a tensor")
    (files / "empty.pt").write_bytes(b"")
    torch.save(torch.from_numpy(good).float(), files / "floats.pt")
    torch.save(torch.from_numpy(good) > 0, files / "bools.pt")
    torch.save(torch.from_numpy(good).to_sparse(), files / "sparse.pt")
    huge = torch.zeros(1, dtype=torch.int64).expand(17, MAX_BYTES)
    torch.save(huge, files / "huge.pt")
    torch.save(torch.from_numpy(good[:9].copy()), files / "nine.pt")
    big = good.copy()
    big[3, 60] = 10**12
    save(files / "range.pt", big)
    assert convert(files, tmp_path / "new", "workbench") == 1
    assert "9 of 10" in (said := capsys.readouterr().err) and "--skip-refused" in said
    assert not (tmp_path / "new").exists() and not (tmp_path / "sprung").exists()
    assert list(tmp_path.glob(".new*")) == []
    assert convert(files, tmp_path / "new", "workbench", "--skip-refused", "--json") == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    for name, reason in {
        "trap": "not loaded since they may run code", "rubbish": "one dense integer tensor",
        "empty": "no file of torch.save", "huge": "more than any conversation",
        "floats": "real numbers (float32)", "bools": "(bool)", "sparse": "layout sparse_coo",
        "nine": "the shape must be", "range": "found 1000000000000 in row 3, frame 60",
    }.items():  # fmt: skip
        assert reason in refused[name], name
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "conversion.jsonl", "good.json", "good.pt",
    ]  # fmt: skip


def test_a_tensor_that_is_not_what_its_record_says_is_refused(tmp_path, model, convert, capsys):
    save(tmp_path / "pt" / "a.pt", coffee_codes(model)[0])
    assert convert(tmp_path / "pt", tmp_path / "new", "workbench") == 0
    changed = load(tmp_path / "new" / "a.pt").copy()
    changed[5, -1] += 1
    save(tmp_path / "new" / "a.pt", changed)
    assert convert(tmp_path / "new", tmp_path / "old", "coffee") == 1
    assert "as its record says" in capsys.readouterr().err


def test_a_converted_folder_is_imported_with_its_records(
    tmp_path, model, convert, tiny_checkpoint, capsys
):
    for index in range(3):
        save(tmp_path / "pt" / f"conv_000{index}.pt", coffee_codes(model, seed=index)[0])
    told = dialogues_file(tmp_path / "training.json")
    new = tmp_path / "new"
    assert convert(tmp_path / "pt", new, "workbench", "--dialogues", told) == 0
    config = Config.model_validate({"name": "c", "model": {"base": str(tiny_checkpoint)}})
    folder, imported = import_stage(config, tmp_path / "runs", "tensors", new)
    assert len(imported.records) == 3 and imported.refused == []
    assert {clip.split for clip in imported.records} == {"train", "valid"}
    for clip in imported.records:
        beside = TensorClip.model_validate_json((new / f"{clip.id}.json").read_bytes())
        assert clip == beside.model_copy(update={"tensor": clip.tensor}) and len(clip.turns) == 4
        stored = load(folder / "blobs" / f"{clip.tensor}.pt")
        assert np.array_equal(stored, load(new / f"{clip.id}.pt"))
    assert {clip.dropped_tokens for clip in imported.records} >= {None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_frames": 9}, "must be its record"),
        ({"turns": [{"label": "agent", "start": 0, "end": 10**6}]}, "must be its record"),
        ({"turns": [{"label": "agent", "start": 9, "end": 3}]}, "must be its record"),
        ({"codec_digest": "0" * 64}, "made for another model"),
    ],
)
def test_a_record_that_is_not_the_tensors_own_is_not_imported(
    tmp_path, model, convert, tiny_checkpoint, change, said
):
    save(tmp_path / "a.pt", coffee_codes(model)[0])
    assert convert(tmp_path / "a.pt", tmp_path / "new", "workbench") == 0
    record = tmp_path / "new" / "a.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    config = Config.model_validate({"name": "c", "model": {"base": str(tiny_checkpoint)}})
    with pytest.raises(RequestError, match=said):
        import_stage(config, tmp_path / "runs", "tensors", tmp_path / "new")
    record.write_text('{"alignments": []}')
    _, imported = import_stage(config, tmp_path / "runs", "tensors", tmp_path / "new")
    assert [clip.alignment for clip in imported.records] == ["import"]
