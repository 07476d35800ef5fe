"""A report folder to judge, and judges: one that is honest, one that likes a place, one that
invents what it quotes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import yaml

from duplex.files import read_lines
from pipeline.judge_command import JudgeOptions, run
from tests.stages.llm_server import KEY, PRICE_IN, PRICE_OUT

CRITERIA = ("character", "facts", "topic", "speech")


def report_of(items=6, seeds=1, *, base="I want a latte, Ann.", merged="A large latte, please."):
    """Two models on the same items; what they say is the argument, told apart by the item."""
    return {
        "conversations": [
            {
                "item": f"item-{item}", "seed": seed, "model": model, "persona_type": "angry",
                "prompt": f"You are Ann {item}. You want a large latte.", "opening": "",
                "transcript": says, "novel_key": {"x": 1},
                "exchanges": [
                    {"user": "Hi, what will it be?", "delay_s": 0.2, "echo": False,
                     "out_of_role": False, "invented": [],
                     "reply": f"{says} {item} {seed}" if says else ""},
                    {"user": "And your name?", "reply": "", "delay_s": None},
                ],
            }
            for model, says in (("base", base), ("merged", merged))
            for item in range(items)
            for seed in range(seeds)
        ]
    }  # fmt: skip


def data_of(body: dict[str, Any]) -> dict[str, Any]:
    content = body["messages"][1]["content"]
    inside = re.fullmatch(r"<data>\n(.*)\n</data>", content, flags=re.DOTALL)
    assert inside is not None
    return json.loads(inside[1])


def agent_line(lines: list[dict[str, str]]) -> str:
    return next(line["text"] for line in lines if line["speaker"] == "agent" and line["text"])


def likes_large(lines: list[dict[str, str]]) -> bool:
    return "large" in agent_line(lines)


def honest(body: dict[str, Any]) -> str:
    """Quotes what is there; likes whoever says large."""
    data = data_of(body)
    if "A" in data:
        a, b = data["A"]["lines"], data["B"]["lines"]
        better = "tie" if likes_large(a) == likes_large(b) else "A" if likes_large(a) else "B"
        return json.dumps(
            {"evidence_a": agent_line(a), "evidence_b": agent_line(b), "better": better}
        )
    line, good = agent_line(data["lines"]), likes_large(data["lines"])
    scored = {key: {"evidence": line.upper(), "score": 5 if good else 2} for key in CRITERIA}
    graded = {"evidence": f'"{line}"', "grade": "perfect" if good else "poor"}
    return json.dumps(scored | {"grade": graded})


def first_place(body: dict[str, Any]) -> str:
    answer = json.loads(honest(body))
    return json.dumps(answer | ({"better": "A"} if "better" in answer else {}))


def inventing(body: dict[str, Any]) -> str:
    """Quotes of one criterion what nobody said, each time."""
    answer = json.loads(honest(body))
    if "facts" in answer:
        answer["facts"]["evidence"] = "I would like a cappuccino"
    else:
        answer["evidence_b"] = "What will it be?"  # the user's words are none of the agent's
    return json.dumps(answer)


class Bench:
    """A report folder and the command on it."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self._capsys = folder, capsys
        monkeypatch.setenv("DUPLEX_TEST_JUDGE_KEY", KEY)
        self.printed = ""
        self.write(report_of())

    def write(self, report):
        (self.folder / "report.json").write_text(json.dumps(report))

    def judge(self, server, *, as_json=False, **given):
        options = JudgeOptions(
            endpoint=server.base_url, model="tiny", api_key_env="DUPLEX_TEST_JUDGE_KEY",
            price_in=PRICE_IN, price_out=PRICE_OUT,
        )  # fmt: skip
        try:
            run(self.folder, replace(options, **given), as_json=as_json)
        finally:
            printed = self._capsys.readouterr()
            self.printed = printed.out + printed.err
        return json.loads((self.folder / "judge.json").read_text())

    def requests(self):
        return [
            line["request"]
            for line in read_lines(self.folder / "judge" / "exchanges.jsonl")
            if line["event"] == "sent"
        ]


def config_of(folder, **runtime):
    path = folder / "judge-config.yaml"
    runtime |= {"base_url": "http://127.0.0.1:9/v1", "api_key": "${DUPLEX_TEST_JUDGE_KEY}",
                "price_in": 7, "price_out": 8, "concurrency": 1}  # fmt: skip
    section = {"writer": "openai", "llm": "of-config", "runtime": runtime}
    path.write_text(yaml.safe_dump({"name": "judge", "dialogues": section}))
    return path
