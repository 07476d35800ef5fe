"""docs/results/pocket_base.md: what `benchmarks.pocket_base` measured, as a page. Pure."""

from __future__ import annotations

from typing import Any

WANTED = {
    "answers": "> 95 %",
    "fact right": "> 90 %",
    "premature": "< 10 %",
    "yields": "> 50 %",
    "collapsed": "0",
}


def describe(result: dict[str, Any]) -> str:
    lines = [
        "# The pocket base, speaking freely",
        "",
        f"`python -m benchmarks.pocket_base --runs {result['runs']} --write`: {result['runs']} "
        "conversations of 30 s with prompts that training never saw, by voices that it never heard "
        f"({_trainings(result['base'])}; {result['machine']}, {result['seconds_a_run']} s a run on "
        f"one core, both of its passes; {_sampling(result['sampling'])}).",
        "",
        "All but yields and voice is counted in its text row; how well its speech says that stands "
        "below. Answers: questions behind which it says something before the next one. Fact right: "
        "of the answered ones whose fact the prompt holds, it is said, word for word. Refuses: of "
        "those whose fact the prompt lacks, and of those whose fact it holds, it says that it "
        "doesn't know. Premature: it starts over the "
        "question. Yields: of its turns that the user cuts into, silent within 0.8 s. Voice: its "
        "pitch is that of the voice sample's sex. How new the new values are: docs/pocket.md.",
        "",
        "| share | reached | of | 95 % | wanted |",
        "| --- | ---: | ---: | --- | --- |",
        *(_row(name, share, WANTED) for name, share in result["shares"].items()),
        "",
        f"The same of {result['runs'] // 2} further runs, in which voices of training ask, in "
        "the very recordings that training used (prompts and dialogues are new):",
        "",
        "| share | reached | of | 95 % | |",
        "| --- | ---: | ---: | --- | --- |",
        *(_row(name, share, {}) for name, share in result["known_voices"].items()),
        "",
        _speech(result["speech"]),
        "",
        _margin(result["margin"]),
        "",
        "Facts by topic, right of asked (unanswered ones are wrong): "
        + ", ".join(f"{topic} {hits}/{count}" for topic, (hits, count) in result["topics"].items())
        + ".",
        "",
        "## The first runs",
        "",
    ]
    for one in result["examples"]:
        lines += [f"> {one['prompt']}", ""]
        for question in one["questions"]:
            wanted = question["wanted"] or "a refusal"
            verdict = {True: "right", False: "wrong", None: "no answer"}[question["right"]]
            lines.append(f"- {question['topic']} ({wanted}): {question['said']!r}, {verdict}")
        lines.append("")
    return "\n".join(lines)


def _trainings(base: dict[str, Any]) -> str:
    """The base's steps, those of the bases that it goes on from first."""
    steps = [*(one["steps"] for one in base.get("starts", [])), base["steps"]]
    return f"{' + '.join(map(str, steps))} steps"


def _sampling(sampling: dict[str, Any]) -> str:
    parts = (
        f"{kind} at {sampling[f'{kind}_temperature']:g} / top {sampling[f'{kind}_topk']}"
        for kind in ("text", "audio")
    )
    return ", ".join(parts)


def _row(name: str, share: dict[str, Any], wanted: dict[str, str]) -> str:
    if not share["of"]:
        return f"| {name} | none | 0 | | {wanted.get(name, '')} |"
    return (
        f"| {name} | {share['hits'] / share['of']:.1%} | {share['of']} | "
        f"{share['low']:.1%} to {share['high']:.1%} | {wanted.get(name, '')} |"
    )


def _speech(speech: dict[str, Any]) -> str:
    base, floor, clean = (speech[name] for name in ("base", "through_codec", "synthesiser"))
    if base["wer"] is None:
        return "Speech says its text: nothing was said."
    return (
        f"Speech says its text: word error rate {base['wer']:.2f} over {base['turns']} turns "
        f"({base['words']} words; wanted < .20). The same turns by the synthesiser: "
        f"{floor['wer']:.2f} through the codec, {clean['wer']:.2f} before it.{_values(speech)}"
    )


def _values(speech: dict[str, Any]) -> str:
    base, floor, clean = (
        f"{one['values_heard'] / one['values']:.0%}" if one["values"] else "none"
        for one in (speech[name] for name in ("base", "through_codec", "synthesiser"))
    )
    return (
        f" Of {speech['base']['values']} answers whose text has the fact right, the recogniser "
        f"hears the value, word for word, in {base}; said by the synthesiser in {floor} through "
        f"the codec, in {clean} before it."
    )


def _margin(margin: dict[str, Any]) -> str:
    words = margin["words"]
    return (
        f"Prompt-swap margin: {words['mean']:+.3f} nats per word token "
        f"[{words['low']:+.3f}, {words['high']:+.3f}] over {words['clips']} held-out dialogues, "
        "others than those of BASE.md (all that the agent says in them but its answers is by "
        "recordings that training used, too); "
        f"their own words {margin['own_words']:.3f}, semantic codes {margin['own_semantic']:.3f}."
    )
