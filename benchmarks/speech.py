"""What speaking costs: engines against real time, the checks on top, and memory over time.

    python -m benchmarks.speech                 # prints
    python -m benchmarks.speech --write         # and writes docs/results/speech.{json,md}

Speed: seconds of speech a second of wall clock, through `Speaker`, one utterance at a time; the
checks of sound alone, then with every utterance transcribed. Engines: those that run on this
machine without anything fetched. Memory: of a process that speaks 2 000 utterances, resident
after 200 and after all of them. Refused: good utterances, and texts that were not spoken.

The text is that of the scripted writer, the voices those of the shipped personas.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from typing import Any

import psutil

from duplex.config_data import SpeechSection
from duplex.datafiles import CHECKOUT, load_personas, load_scenarios
from duplex.errors import DuplexError, RecordError
from duplex.frames import SAMPLE_RATE
from duplex.metrics import proportion_interval
from duplex.records import Voice
from pipeline.engines.engines import ENGINES, engine_module
from pipeline.engines.espeak_voices import agent_params, user_params
from pipeline.engines.listening import choose_recogniser
from pipeline.engines.scripted import ScriptedWriter
from pipeline.engines.speaker import Speaker
from pipeline.engines.speaking import SpeechRequest
from training.device import cpu_name

UTTERANCES, HEARD, LONG_RUN, EARLY = 300, 60, 2000, 200
RESULTS = CHECKOUT / "docs/results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="docs/results/speech.{json,md}")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measure_memory()))
        return
    result = measure()
    text = describe(result)
    print(text)
    if arguments.write:
        (RESULTS / "speech.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "speech.md").write_text(text)


def measure() -> dict[str, Any]:
    requests = scripted_requests(UTTERANCES)
    command = [sys.executable, "-m", "benchmarks.speech", "--memory"]
    memory = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT)
    recogniser = choose_recogniser(SpeechSection().checks)
    rows = [
        speed("sound checked", requests, {"recogniser": "none"}),
        speed("and transcribed", requests[:HEARD], {"share": 1.0}),
    ]
    return {
        "machine": {"cpu": cpu_name(), "cores": len(psutil.Process().cpu_affinity() or [])},
        "python": platform.python_version(),
        "engine": engine_module("espeak").revision(SpeechSection()),
        "recogniser": recogniser,
        "speed": rows,
        "refused": refused(requests[:HEARD]),
        "memory": json.loads(memory.stdout),
        "not_here": not_here(),
    }


def scripted_requests(count: int) -> list[SpeechRequest]:
    """Turns of the scripted writer in the voices of personas and users; the same every time."""
    personas = load_personas(CHECKOUT / "data/personas")
    scenarios = load_scenarios(CHECKOUT / "data/scenarios")
    writer, found = ScriptedWriter(), []
    for number in range(count):
        persona = personas[number % len(personas)]
        scenario = scenarios[number % len(scenarios)]
        rng = random.Random(number)
        dialogue = writer.write(persona, scenario, seed=number, min_turns=15, max_turns=25)
        turn = rng.choice(dialogue.turns)
        params = agent_params(persona.id, persona.voice)
        if turn.role == "user":
            params = user_params(number % 8)
        voice = Voice(
            id=f"v{number}", engine="espeak", role=turn.role, params=params, licence="GPL"
        )
        found.append(SpeechRequest(turn.text, voice, seed=number))
    return found


def speed(name: str, requests: list[SpeechRequest], checks: dict[str, Any]) -> dict[str, Any]:
    """Seconds of speech a second, of espeak through `Speaker`."""
    section = SpeechSection.model_validate({"checks": {"max_wer": 99} | checks})
    with Speaker(section, lambda message: None) as speaker:
        speaker.speak(requests[0])  # the start is not what is measured
        started, cpu = time.perf_counter(), time.process_time()
        spoken_s = sum(len(speaker.speak(r).samples) for r in requests[1:]) / SAMPLE_RATE
        wall_s = time.perf_counter() - started
        cpu_s = time.process_time() - cpu
    count = len(requests) - 1
    return {
        "name": name, "utterances": count, "speech_s": spoken_s, "times_real": spoken_s / wall_s,
        "ms_each": 1000 * wall_s / count, "own_cpu_ms_each": 1000 * cpu_s / count,
    }  # fmt: skip


def refused(requests: list[SpeechRequest]) -> dict[str, Any]:
    """How many good utterances the checks refuse, and how many wrong texts they let through."""
    from pipeline.engines.espeak_speech import EspeakSpeech

    section = SpeechSection.model_validate({"checks": {"share": 1.0}})
    good = wrong = 0
    engine = EspeakSpeech()
    with Speaker(section, lambda message: None) as speaker:
        for number, request in enumerate(requests):
            try:
                speaker.speak(request)
            except RecordError:
                good += 1
            other = requests[(number + 17) % len(requests)]
            spoken = engine.synthesize(other)
            try:
                speaker._checked("espeak", engine, spoken, request, 0)
                wrong += 1
            except RecordError:
                pass
    engine.close()
    return {"of": len(requests), "good_refused": good, "wrong_taken": wrong}


def measure_memory() -> dict[str, float]:
    """Resident MB of this process while it speaks, sound checked."""
    requests = scripted_requests(EARLY)
    process = psutil.Process()
    early = 0.0
    with Speaker(SpeechSection(), lambda message: None) as speaker:
        for number in range(LONG_RUN):
            speaker.speak(requests[number % len(requests)])
            if number + 1 == EARLY:
                early = _family_mb(process)
        late = _family_mb(process)
    return {"utterances": LONG_RUN, "early_mb": early, "late_mb": late}


def _family_mb(process: psutil.Process) -> float:
    """Resident memory of a process and of the workers that it started."""
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 1e6


def not_here() -> dict[str, str]:
    """Why the other engines were not measured."""
    section, reasons = SpeechSection(model="any"), {}
    for name in ENGINES:
        if name == "espeak":
            continue
        try:
            lacking = engine_module(name).missing(section)
        except DuplexError as error:
            lacking = str(error)
        reasons[name] = lacking or "its weights, which nothing here fetches"
    return reasons


def describe(result: dict[str, Any]) -> str:
    machine, memory, refusals = result["machine"], result["memory"], result["refused"]
    most = {
        key: proportion_interval(refusals[key], refusals["of"])[1]
        for key in ("good_refused", "wrong_taken")
    }
    lines = [
        "# Speaking",
        "",
        f"`python -m benchmarks.speech --write`: {result['engine']}, {machine['cores']} cores "
        f"({machine['cpu']}), Python {result['python']}, transcribed by {result['recogniser']}.",
        "",
        "| espeak through the speaker | utterances | times real time | ms each |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {row['name']} | {row['utterances']} | {row['times_real']:.0f} | "
          f"{row['ms_each']:.0f} |" for row in result["speed"]),
        "",
        f"Of {refusals['of']} good utterances the checks refused {refusals['good_refused']} (at "
        f"most {most['good_refused']:.0%} with 95 % confidence), and of as many that say "
        f"another text they let {refusals['wrong_taken']} through (at most "
        f"{most['wrong_taken']:.0%}).",
        "",
        f"Memory of speaker and worker: {memory['early_mb']:.0f} MB after {EARLY} utterances, "
        f"{memory['late_mb']:.0f} MB after {memory['utterances']}.",
        "",
        "Not measured here:",
        "",
        *(f"- {name}: {reason}" for name, reason in result["not_here"].items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
