"""Folders of personas and dialogues, and the voices and speech made from them by espeak."""

from duplex.characters import VoiceTraits
from duplex.config import Config
from duplex.records import Turn, record_line
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage
from pipeline.voices import VoicesStage
from tests.factories import dialogue, persona

PERSONAS = [
    persona("angry-ann"),
    persona("friendly-bob", voice=VoiceTraits(gender="male", accent="en-gb")),
]
TURNS = (
    Turn(role="user", text="Good morning. What can I get you?"),
    Turn(role="agent", text="A large latte, please."),
    Turn(role="user", text="That is four dollars."),
    Turn(role="agent", text="Here you <are>."),
)


def conversation(persona_id, index, turns=TURNS):
    return dialogue(f"{persona_id}.rush-hour.{index:02d}", persona_id=persona_id, turns=turns)


DIALOGUES = [
    conversation(persona_id, index)
    for persona_id in ("angry-ann", "friendly-bob", "imported-cleo")
    for index in range(3)
]


def complete(root, number, stage, records):
    folder = StageFolder.of(root, number, stage, "0" * 64)
    folder.complete((record_line(r) for r in records), files=[], counts={}, provenance={})
    return folder


def folders(root, personas=PERSONAS, dialogues=DIALOGUES):
    return {
        "personas": complete(root, 1, "personas", personas),
        "dialogues": complete(root, 2, "dialogues", dialogues),
    }


def context_of(inputs, root, **sections):
    config = Config.model_validate({"name": "toy", **sections})
    return StageContext(config, root, inputs)


def made_voices(root, personas=PERSONAS, dialogues=DIALOGUES, **sections):
    inputs = folders(root, personas, dialogues)
    folder = StageFolder.of(root, 3, "voices", "1" * 64)
    execute(VoicesStage(), context_of(inputs, root, **sections), folder)
    return inputs, folder


def made_speech(root, dialogues=DIALOGUES):
    inputs, voices = made_voices(root, dialogues=dialogues)
    folder = StageFolder.of(root, 4, "speech", "2" * 64)
    context = context_of({"dialogues": inputs["dialogues"], "voices": voices}, root)
    execute(SpeechStage(), context, folder)
    return context, folder
