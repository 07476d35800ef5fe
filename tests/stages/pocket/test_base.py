"""The pocket base's clips are those of the tensors stage; its training resumes; its files load."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from duplex.characters import GapRange
from duplex.errors import RequestError, WorkError
from duplex.mixing import VoicedTurn, mix_turns
from duplex.records import Speech
from duplex.sinks import FolderBlobs
from duplex.store import StageFolder
from duplex.streams import AGENT_ROWS, TEXT_PAD, TEXT_ROW, USER_ROWS, check_codes
from pipeline.engines import pocket
from pipeline.engines.pocket import build_lm
from pipeline.speech import wav_bytes
from tests.stages.conftest import TINY_CARD, TINY_LM_CONFIG, TINY_TEXT_CARD
from tests.stages.pocket.conftest import FEW
from tests.stages.tensor_factories import finish
from tests.stages.test_tensors import prompt_end, run
from training.pocket import base_weights
from training.pocket.base_bank import LEAD_FRAMES, TAIL_FRAMES, build_bank
from training.pocket.base_clips import ClipMaker, lesson, place, thinned
from training.pocket.base_dialogue import Dialogue, Said, draw_dialogue
from training.pocket.base_loop import train
from training.pocket.base_pack import Pack, save_pack
from training.pocket.base_probe import RUN_FRAMES, draw_probe, probe_clip
from training.pocket.base_prompts import Character, Prompted
from training.pocket.base_reading import reading_clip
from training.pocket.base_source import LoopSettings, Source, drawn_ahead
from training.pocket.base_units import UnitIndex, inventory
from training.pocket.base_voices import agent_speaker, user_speaker


def speak(text, params):
    """Noise as long as the text would take, the same for the same text and voice."""
    rng = np.random.default_rng(list(f"{text}{params['variant']}".encode()))
    return (0.1 * rng.standard_normal(1600 * len(text) // 2)).astype(np.float32)


def two_units(grammar, codec, folder):
    units = [
        min(  # the shortest: its pieces, by this tokenizer a letter each, must find frames
            (
                u
                for u in inventory(grammar, FEW, 0)
                if u.speaker.id == speaker and u.act.startswith(act)
            ),
            key=lambda u: len(u.text),
        )
        for speaker, act in (("ada-neutral", "answer/city"), ("u0-quiet", "ask/city"))
    ]
    return build_bank(units, grammar, codec, folder, speak, "noise")


@pytest.mark.parametrize("first", ["agent", "user"])
def test_a_clip_is_what_the_tensors_stage_makes(
    tmp_path, tiny_checkpoint, grammar, codec, tokenizer, first
):
    """Of the same script, sound and timing: all rows of the prompt, the whole text row, and the
    first turn's codes with their tail. Later turns have heard others in the stage than on their
    sheet, and may differ in codes."""
    bank = two_units(grammar, codec, tmp_path / "bank")
    order = (0, 1) if first == "agent" else (1, 0)
    prompt = "You enjoy having a good conversation with the barista."
    roles = ("agent", "user")
    said = tuple(
        Said(roles[unit], (unit,), LEAD_FRAMES if number == 0 else 5)
        for number, unit in enumerate(order)
    )
    dialogue = Dialogue(
        Character("friend", "Maria", "", "neutral"), Prompted(prompt),
        agent_speaker("ada", "neutral"),
        user_speaker("u0", "quiet"), None, said, (1, 1), 6,
    )  # fmt: skip
    ours = ClipMaker(bank, tokenizer).clip(dialogue, random.Random(0), "d").clip
    theirs, clip = staged(tmp_path, tiny_checkpoint, grammar, bank, order, prompt)
    start = prompt_end(clip)
    assert ours.prompt_frames == start and ours.codes.shape == theirs.shape
    assert np.array_equal(ours.codes[:, :start], theirs[:, :start])
    assert np.array_equal(ours.codes[TEXT_ROW], theirs[TEXT_ROW])
    assert [(s.label, s.start, s.end) for s in clip.turns] == list(ours.turns)
    rows = AGENT_ROWS if first == "agent" else USER_ROWS
    begin = start + LEAD_FRAMES
    end = begin + bank.speech_frames(order[0]) + TAIL_FRAMES
    same = ours.codes[rows, begin:end] == theirs[rows, begin:end]
    assert same.mean() > 0.99, f"{(~same).sum()} of {same.size} codes differ"


def staged(tmp_path, checkpoint, grammar, bank, order, prompt):
    """The tensors stage's tensor and record of the two units, mixed by the speech stage's own
    function."""
    from training.pocket.base_bank import LOUDNESS_DBFS, params_of

    voiced = []
    for number, place_of in enumerate(order):
        unit = bank.units[place_of]
        samples = speak(unit.text, params_of(unit.speaker, grammar))
        gap = LEAD_FRAMES if number == 0 else 5
        voiced.append(
            VoicedTurn(unit.speaker.side, unit.text, f"v-{unit.speaker.side}", samples, (), gap)
        )
    timeline = mix_turns(
        voiced, gap_after_user=GapRange(low=1, high=2), gap_other=GapRange(low=1, high=2),
        rng=random.Random(0), loudness_dbfs=LOUDNESS_DBFS, lead_in_s=0, tail_s=6 * 0.08,
    )  # fmt: skip
    folder = StageFolder(tmp_path / "04-speech-test", "speech", "k")
    folder.path.mkdir(parents=True)
    speeches = [
        Speech(
            id=name, dialogue_id=name, persona_id=f"p{name}", scenario_id="none",
            system_prompt=prompt, first_speaker=timeline.turns[0].role,
            audio=FolderBlobs(folder).put(wav_bytes(timeline.audio), ".wav"),
            num_samples=timeline.audio.shape[1],
            turns=tuple(t.model_copy(update={"voice_id": f"{t.voice_id}-{name}"})
                        for t in timeline.turns),
            text_digest=name * 64,
        )
        for name in "ab"
    ]  # fmt: skip
    finish(folder, speeches)
    clips, _, codes, _ = run(tmp_path, checkpoint, folder, voice_prompt_s=0)
    return codes["a"], clips["a"]


def test_codes_are_made_once_and_read_again(tmp_path, grammar, codec):
    calls = []

    def counted(text, params):
        calls.append(text)
        return speak(text, params)

    units = [
        u for u in inventory(grammar, FEW, 0) if u.speaker.id == "u2-place" and u.act != "words"
    ][:30]
    first = build_bank(units, grammar, codec, tmp_path, counted, "noise")
    assert len(calls) == 30
    again = build_bank(units, grammar, codec, tmp_path, counted, "noise")
    assert len(calls) == 30
    assert all(np.array_equal(a, b) for a, b in zip(first.codes, again.codes, strict=True))
    build_bank(units, grammar, codec, tmp_path, counted, "another version")
    assert len(calls) == 60


def test_clips_are_valid_and_seeded(grammar, bank, tokenizer, phones):
    source = Source(
        grammar,
        ClipMaker(bank, tokenizer, phones),
        LoopSettings(1, seed=3, reading_steps=0, word_steps=0),
    )
    for side in ("train", "held"):
        for number in range(30):
            one = source.clip(str(number), side)
            clip = one.clip
            assert not check_codes(
                clip.codes.astype(np.int64), card=TINY_CARD, text_card=TINY_TEXT_CARD
            )
            assert clip.loss_from == clip.prompt_frames < clip.num_frames
            again = source.clip(str(number), side)
            assert np.array_equal(clip.codes, again.clip.codes) and one.turns == again.turns


def test_two_speak_at_once_only_where_they_should(grammar, bank):
    """A turn starts behind the one before it; over it only a backchannel or a cut does."""
    overlaps = 0
    index = UnitIndex(bank.units)
    for seed in range(60):
        rng = random.Random(seed)
        turns = [turn for turn, _ in place(draw_dialogue(grammar, index, rng), bank, rng)]
        for before, after in pairwise(turns):
            if after.start < before.end:
                assert after.kind == "backchannel" or before.is_cut
                overlaps += 1
    assert overlaps > 3


def test_who_is_cut_short_stops_in_text_and_sound(grammar, bank, tokenizer):
    found = 0
    maker, index = ClipMaker(bank, tokenizer), UnitIndex(bank.units)
    for seed in range(200):
        rng = random.Random(seed)
        one = maker.clip(draw_dialogue(grammar, index, rng), rng, "d")
        start = one.clip.prompt_frames
        for cut, following in zip(one.turns, one.turns[1:], strict=False):
            if not cut.is_cut:
                continue
            assert cut.end <= following.start + 5
            text = one.clip.codes[TEXT_ROW, start + cut.end : start + following.end]
            assert (text == TEXT_PAD).all()
            agent = one.clip.codes[AGENT_ROWS, start + cut.end : start + following.end]
            assert (agent == np.asarray(bank.tokens.silence)[:, None]).all()
            found += 1
    assert found > 5


def test_silence_is_thinned_out_and_speech_is_not(grammar, bank, tokenizer, phones):
    source = Source(
        grammar, ClipMaker(bank, tokenizer, phones), LoopSettings(1, reading_steps=0, word_steps=0)
    )
    one = source.clip("0", "train")
    batch = lesson([thinned(one, np.random.default_rng(0))]).batch
    mask = batch.loss_mask[0].numpy()
    speaks = np.zeros(one.clip.num_frames, dtype=bool)
    for role, start, end in one.clip.turns:
        speaks[start:end] |= role == "agent"
    assert mask[1, speaks].all()
    assert 0 < mask[1, ~speaks].mean() < 0.6
    assert mask[0, one.clip.prompt_frames :].all() and not mask[:, : one.clip.prompt_frames].any()


SETTINGS = LoopSettings(
    6, batch_size=2, warmup_steps=2, longest_frames=120, reading_steps=2, word_steps=1, seed=5
)


@pytest.mark.parametrize("muon_rate", [0, 2])
def test_a_killed_training_ends_with_the_same_weights(
    tmp_path, grammar, bank, tokenizer, phones, muon_rate
):
    settings = replace(SETTINGS, muon_rate=muon_rate)

    def weights(folder, stops):
        for until in (*stops, None):
            lm = build_lm(TINY_LM_CONFIG, 1)
            source = Source(grammar, ClipMaker(bank, tokenizer, phones), settings)
            done = train(lm, source, settings, folder, "run", checkpoint_every=2, until=until)
        return lm.state_dict(), done.log

    whole, log = weights(tmp_path / "whole", ())
    resumed, resumed_log = weights(tmp_path / "resumed", (3, 5))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log == resumed_log and json.loads(log[-1])["step"] == 6
    other, _ = weights(tmp_path / "resumed", ())
    assert all(torch.equal(whole[name], other[name]) for name in whole), "a finished run stays"


@pytest.mark.parametrize("span", [(0, 6), (1, 3), (3, 9)])
def test_batches_drawn_ahead_are_the_same(grammar, bank, tokenizer, phones, span):
    source = Source(grammar, ClipMaker(bank, tokenizer, phones), SETTINGS)
    here, ahead = (list(drawn_ahead(source, *span, processes)) for processes in (0, 2))
    assert len(here) == len(ahead) == span[1] - span[0]
    for own, other in zip(here, ahead, strict=True):
        for a, b in zip(own, other, strict=True):
            assert torch.equal(a.batch.codes, b.batch.codes) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.batch.loss_mask, b.batch.loss_mask)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_kept(
    tmp_path, grammar, bank, tokenizer, phones
):
    lm, source = (
        build_lm(TINY_LM_CONFIG, 1),
        Source(grammar, ClipMaker(bank, tokenizer, phones), SETTINGS),
    )
    with torch.no_grad():
        lm.text_linear.weight[0, 0] = torch.nan
    with pytest.raises(WorkError, match="must be finite, found nan at step 1"):
        train(lm, source, SETTINGS, tmp_path, "run", checkpoint_every=1)
    assert not list(tmp_path.glob("step-*"))


def test_another_run_takes_up_no_foreign_checkpoint(tmp_path, grammar, bank, tokenizer, phones):
    source = Source(grammar, ClipMaker(bank, tokenizer, phones), SETTINGS)
    first = build_lm(TINY_LM_CONFIG, 1)
    train(first, source, SETTINGS, tmp_path, "one", until=2)
    second = build_lm(TINY_LM_CONFIG, 2)
    before = second.state_dict()["text_linear.weight"].clone()
    train(second, source, SETTINGS, tmp_path, "two", until=0)
    assert torch.equal(second.state_dict()["text_linear.weight"], before)


def test_a_probe_asks_in_turn_and_expects_what_its_prompt_holds(grammar, bank, tokenizer):
    index = UnitIndex(bank.units)
    expected = 0
    for seed in range(40):
        probe = draw_probe(grammar, bank, index, random.Random(seed))
        ends = [question.end for question in probe.questions]
        starts = [question.start for question in probe.questions]
        assert all(a < b for a, b in zip(ends, starts[1:], strict=False))
        for question in probe.questions:
            if question.says:
                assert question.says.lower() in probe.prompt.lower()
                expected += 1
        clip = probe_clip(probe, bank, tokenizer, (100, probe.asked[0]), "p")
        assert clip.num_frames == clip.prompt_frames + RUN_FRAMES
        cut = bank.codes[probe.asked[0]]
        here = clip.codes[USER_ROWS, clip.prompt_frames + 100 :][:, : cut.shape[1]]
        assert np.array_equal(here, cut)
    assert expected > 20


@pytest.mark.slow
def test_the_command_writes_a_base_and_finds_it_done_the_next_time(
    tmp_path, monkeypatch, bank, codec, phones
):
    """With made-up codes and a tiny model."""
    from training.pocket import base_command

    monkeypatch.setattr(base_command, "speak_and_encode", lambda *_: bank)
    monkeypatch.setattr(base_command, "find_phones", lambda *_: phones)
    monkeypatch.setattr(base_command, "load_pocket_codec", lambda _: codec)
    monkeypatch.setattr(base_command, "VALID_CLIPS", 2)
    config = {**TINY_LM_CONFIG, "text_card": pocket.TEXT_CARD}
    monkeypatch.setattr(pocket, "LM_CONFIG", config)

    def run(name, *arguments):
        where = ["--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}-work")]
        few = {"steps": 4, "reading-steps": 1, "word-steps": 1, "batch-size": 2}
        few |= {"processes": 1, "muon-rate": 0, "again": 0}
        options = [f"--{option}={value}" for option, value in few.items()]
        assert base_command.main([*where, *options, *arguments]) == 0
        return (tmp_path / name / "base.safetensors").read_bytes()

    first = run("one")
    lm = base_weights.load_base(tmp_path / "one")
    assert lm.text_linear.weight.shape[0] == pocket.TEXT_CARD
    card = (tmp_path / "one" / "BASE.md").read_text()
    assert (
        "48 businesses" in card
        and "4 steps: 1 of prompts and words alone, 1 of dialogues and lessons" in card
    )
    assert run("one") == first
    again = (tmp_path / "one" / "BASE.md").read_text()
    assert "nothing was left to do" in again and " 0 min of training" in again
    assert run("two", "--seed", "2") != first
    start = tmp_path / "one"
    alike = run("muon", "--muon-rate", "2")
    assert alike != first, "Muon changes the weights"
    assert run("on", "--start", str(start), "--muon-rate", "2") not in (first, alike)
    with pytest.raises(SystemExit):
        run("one", "--start", str(start))
    own = {"steps": 4, "weights": base_weights.base_config(start)["weights"]}
    assert base_weights.base_config(tmp_path / "on")["starts"] == [own]
    card = (tmp_path / "on" / "BASE.md").read_text()
    assert "those of a base of 4 steps (sha256" in card and "--muon-rate 2" in card
    assert "Muon and AdamW at" in card and "--start START" in card
    behind = ("--steps", "3", "--reading-steps", "0", "--word-steps", "0", "--seed", "2")
    by_hand = run("by-hand", "--start", str(start), *behind, "--learning-rate", "1e-3")
    assert run("both", "--again", "3") == by_hand, "one command does what two did"
    assert run("both", "--again", "3") == by_hand, "and finds both done"
    assert base_weights.base_config(tmp_path / "both")["starts"] == [own]
    bank_file = tmp_path / "two-work" / "bank.safetensors"
    with pytest.raises(RequestError, match="must be a base of the tokenizer in"):
        run("on", "--start", str(start), "--bank", str(bank_file))


WORDS = ["moon", "rope", "glass", "seven", "bread"]


def test_what_cannot_be_trained_is_said_at_once(tmp_path, bank, phones, capsys, monkeypatch):
    from training.pocket import base_command

    other = tmp_path / "bank.safetensors"
    save_pack(other, Pack(bank, phones, b"", "codec", "another grammar", "voices", 0, 1, False))
    argv = ["--work", str(tmp_path), "--bank", str(other), "--processes", "1"]
    with pytest.raises(RequestError, match="is of another"):
        base_command.main(argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        base_command.main([*argv, "--device", "cuda"])
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        base_command.main([*argv[:-1], "2", "--device", "cuda"])
    assert "trains in one process" in capsys.readouterr().err


def test_a_reading_clip_says_what_its_prompt_holds_and_nothing_is_heard(grammar, codec, tokenizer):
    for seed in range(30):
        one = reading_clip(grammar, tokenizer, codec.tokens, WORDS, random.Random(seed), "r", {})
        clip = one.clip
        assert not check_codes(
            clip.codes.astype(np.int64), card=TINY_CARD, text_card=TINY_TEXT_CARD
        )
        batch = lesson([one]).batch
        assert batch.loss_mask[0, 0, clip.prompt_frames :].all()
        assert not batch.loss_mask[:, 1:].any()
        rows = clip.codes[:, clip.prompt_frames :]
        said, prompt = (
            tokenizer.decode([int(t) for t in row if t > TEXT_PAD])
            for row in (rows[TEXT_ROW], clip.codes[TEXT_ROW, : clip.prompt_frames])
        )
        for word in ("dollars", "aisle", "half past"):
            assert word not in said or word in prompt
        assert (rows[AGENT_ROWS] == np.asarray(codec.tokens.silence)[:, None]).all()
