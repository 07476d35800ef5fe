"""The clips that show what the pocket base forgets: made by a command, shipped, and whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duplex.errors import RequestError
from duplex.phases import Known, find_prompt
from duplex.streams import TEXT_ROW
from pipeline.engines.pocket import CARD, POCKET, TEXT_CARD
from pipeline.engines.tensor_file import read_codes
from pipeline.evaluation.likelihood_worker import read_base_clips
from training.pocket import regression
from training.pocket.base_pack import Pack, save_pack
from training.pocket.base_voices import voices_digest
from training.pocket.base_weights import TOKENIZER
from training.pocket.regression import CLIPS, FOLDER, LONGEST_FRAMES, clip_bytes


@pytest.fixture
def pack(bank, phones, grammar):
    """Of the shipped codec and tokenizer by its word: its codes are random."""
    codec = regression.load_pocket_codec(POCKET).digest
    tokenizer = (POCKET / TOKENIZER).read_bytes()
    return Pack(bank, phones, tokenizer, codec, grammar.digest, voices_digest(), 0.0, 1, False)


def test_the_shipped_clips_are_sixteen_dialogues_behind_prompts():
    clips = read_base_clips(FOLDER, LONGEST_FRAMES, card=CARD, text_card=TEXT_CARD)
    assert len(clips) == CLIPS
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
    for clip in clips:
        assert 50 < clip.prompt_frames < clip.num_frames - 50 and clip.num_frames <= LONGEST_FRAMES
        prompt, said = np.split(clip.codes[TEXT_ROW], [clip.prompt_frames])
        assert (prompt > 3).any() and (said > 3).any()
    assert len({clip.codes.tobytes() for clip in clips}) == CLIPS


def test_a_clip_comes_back_from_its_file_with_its_prompt(pack, grammar, tmp_path):
    """The file has no record beside it: the prompt is found in the codes, to the frame."""
    clips = regression.held_out_dialogues(pack, grammar, count=6)
    assert len(clips) == 6
    for clip in clips:
        path = tmp_path / f"{clip.id}.pt"
        path.write_bytes(clip_bytes(clip))
        codes, _ = read_codes(path)
        assert np.array_equal(codes, clip.codes)
        found = find_prompt(codes, Known())
        assert found is not None and found.end == clip.prompt_frames


def test_the_command_writes_the_same_bytes_again(pack, tmp_path, capsys):
    save_pack(tmp_path / "bank.safetensors", pack)
    outs = [tmp_path / name for name in ("one", "other")]
    for out in outs:
        assert regression.main(["--work", str(tmp_path), "--out", str(out)]) == 0
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == sorted(f"held-{number}.pt" for number in range(CLIPS))
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)
    assert "16 clips" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["grammar", "codec", "tokenizer", "voices", "utterances"])
def test_utterances_of_another_base_are_refused(pack, grammar, what):
    others = {"tokenizer": {"tokenizer": b"another"}, "utterances": {"seed": 2}}
    changed = replace(pack, **others.get(what, {what: "another"}))
    with pytest.raises(RequestError, match=f"must be of the {what} in data/pocket"):
        regression.check_pack(Path("bank"), changed, grammar)
