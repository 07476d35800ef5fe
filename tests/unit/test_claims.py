"""The claims' grids and tables: what is counted, and what takes to be called a difference."""

import copy
import json

import pytest

from benchmarks.claims import __main__ as command
from benchmarks.claims import index, page, plan, tables
from benchmarks.claims.plots import draw_curves, draw_measures
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.errors import RequestError

ITEMS = 8


def claim_of(**more):
    given = {
        "title": "T", "claim": "C", "question": "Q", "reference": "old", "key": "facts_said",
        "arms": {"old": {}, "new": {"train.steps": 3}}, "measures": ["facts_said", "nll_words"],
        "least": 0.1,
        "against": {"better": "Held by {arm} ({by}).", "worse": "Refuted.", "none": "Open."},
        "seven_b": {"better": "It does.", "worse": "It harms.", "none": "Who knows."},
        "not_said": "Much.",
    }  # fmt: skip
    return plan.Claim.model_validate(given | more)


def cell(arm, seed, hits, *, trials=4, trained=(), nll=2.0):
    """Item i says hits[i] of `trials` facts; two clips."""
    return {
        "arm": arm,
        "seed": seed,
        "trained": list(trained),
        "clips": 20,
        "frames": 7500,
        "measured": "here",
        "train_s": 60.0,
        "conversations": [
            {
                "item": f"i{i}",
                "persona": f"p{i}" if i % 2 else None,
                "sums": {"facts_said": [h, trials], "words": [0, 0]},
            }
            for i, h in enumerate(hits)
        ],
        "likelihood": [
            {"group": "held_out", "clip": f"c{i}", "values": {"nll_words": nll + i}}
            for i in range(2)
        ],
    }


def cells_with(new, seeds=(1, 2, 3)):
    """`old` always says one fact; `new` what is given, by seed."""
    return [
        one
        for seed, hits in zip(seeds, new, strict=True)
        for one in (cell("old", seed, [1] * ITEMS), cell("new", seed, hits, trained=["p1"]))
    ]


def row_of(measures, key="facts_said", arm="new", group=""):
    (one,) = [m for m in measures if (m["key"], m["group"]) == (key, group)]
    return next(row for row in one["rows"] if row["arm"] == arm)


def test_values_are_pooled_and_differences_are_over_items():
    new = row_of(tables.compared(claim_of(), cells_with([[3] * ITEMS, [2] * ITEMS, [4] * ITEMS])))
    assert new["by_seed"] == [0.75, 0.5, 1.0] and new["value"] == 0.75
    assert new["trials"] == 3 * ITEMS * 4
    assert new["difference"] == 0.5 and new["n"] == ITEMS
    # All 8 items differ by the same: 2 of 2^8 sign changes are as far off.
    assert new["p"] == pytest.approx(2 / 256, abs=1e-6)
    assert new["word"] == "improved"


def test_a_seed_that_points_the_other_way_takes_the_verdict():
    away = cells_with([[4] * ITEMS, [4] * ITEMS, [0] * ITEMS])
    measures = tables.compared(claim_of(), away)
    found = row_of(measures)
    assert found["p_holm"] <= 0.05 and found["word"] == tables.DISAGREE
    assert tables.decided(claim_of(), measures) == ("none", found)


def test_a_seed_that_measures_nothing_takes_the_verdict_and_says_so():
    cells = cells_with([[4] * ITEMS] * 3)
    for one in cells[-1]["conversations"]:
        one["sums"]["facts_said"] = [0, 0]
    found = row_of(tables.compared(claim_of(), cells))
    assert found["p_holm"] <= 0.05 and found["word"] == tables.UNMEASURED
    assert found["seed_differences"] == [0.75, 0.75, None]


def test_seeds_agree_by_items_and_not_by_what_talks_most():
    """Seed 2: one item talks a lot and gets worse, seven improve."""
    cells = cells_with([[3] * ITEMS] * 3)
    loud = cells[3]["conversations"][0]
    loud["sums"]["facts_said"] = [0, 400]
    found = row_of(tables.compared(claim_of(), cells))
    assert found["by_seed"][1] < 0.25 and found["seed_differences"][1] > 0
    assert found["word"] == "improved"


def test_the_base_and_arms_beside_the_question_decide_nothing():
    cells = cells_with([[4] * ITEMS] * 3) + [cell("base", s, [1] * ITEMS) for s in (1, 2, 3)]
    claim = claim_of(arms={"old": {}, "new": {}, "base": {}})
    measures = tables.compared(claim, cells)
    assert [row["arm"] for row in tables.deciding(claim, measures)] == ["new"]
    assert tables.decided(claim, measures) == ("better", row_of(measures))
    with pytest.raises(ValueError, match="decides must be arms besides"):
        claim_of(decides=["old"])


def test_a_difference_too_small_to_matter_decides_nothing():
    measures = tables.compared(claim_of(), cells_with([[3] * ITEMS] * 3))
    assert row_of(measures)["difference"] == 0.5
    assert tables.decided(claim_of(least=0.5), measures)[0] == "better"
    assert tables.decided(claim_of(least=0.51), measures)[0] == "none"


def test_a_refused_merge_is_a_row_without_values():
    cells = cells_with([[3] * ITEMS] * 3)
    cells += [cell("base", s, []) | {"likelihood": [], "refused": "31.0%"} for s in (1, 2, 3)]
    claim = claim_of(arms={"old": {}, "new": {}, "base": {}})
    found = row_of(tables.compared(claim, cells), arm="base")
    assert found["value"] is None and found["word"] == "not measured"


def test_measures_arms_and_groups_are_corrected_together():
    new = [[3] * ITEMS] * 3
    alone = row_of(tables.compared(claim_of(measures=["facts_said"]), cells_with(new)))
    cells = cells_with(new) + [cell("third", seed, [3] * ITEMS) for seed in (1, 2, 3)]
    arms = {"old": {}, "new": {}, "third": {}}
    among = row_of(tables.compared(claim_of(measures=["facts_said"], arms=arms), cells))
    assert among["p_holm"] == pytest.approx(2 * alone["p_holm"], abs=1e-5)


def test_the_deciding_rows_of_the_key_are_a_family_of_their_own():
    cells = cells_with([[3] * ITEMS] * 3)
    for one in cells:
        for talk in one["conversations"]:
            talk["sums"]["due_said"] = talk["sums"]["words"] = talk["sums"]["facts_said"]
    found = tables.compared(claim_of(measures=["facts_said", "due_said", "words"]), cells)
    key, other = row_of(found), row_of(found, key="due_said")
    assert key["p_holm"] == key["p"] == other["p"]
    assert other["p_holm"] == pytest.approx(2 * other["p"], abs=2e-6)  # with the words
    arms = {"old": {}, "new": {}, "third": {}}
    cells += [cell("third", seed, [3] * ITEMS) for seed in (1, 2, 3)]
    few = claim_of(measures=["facts_said"], arms=arms, decides=["third"])
    found = tables.compared(few, cells)
    assert [row_of(found, arm=arm)["p_holm"] for arm in ("new", "third")] == [key["p"]] * 2


def test_too_few_items_is_a_word_of_its_own():
    """Five items that differ could pass alone (p = 1/16 would not, six do), not among many."""
    five = [[3] * 5 + [1] * (ITEMS - 5)] * 3
    assert row_of(tables.compared(claim_of(), cells_with(five)))["word"] == tables.TOO_FEW
    six = [[3] * 6 + [1] * (ITEMS - 6)] * 3
    assert row_of(tables.compared(claim_of(), cells_with(six)))["word"] == "improved"
    cells = cells_with(six) + [cell("third", seed, six[0]) for seed in (1, 2, 3)]
    arms = {"old": {}, "new": {}, "third": {}}
    assert row_of(tables.compared(claim_of(arms=arms), cells))["word"] == tables.TOO_FEW


def test_groups_are_by_what_any_arm_of_the_seed_was_trained_on():
    found = tables.compared(claim_of(groups=True), cells_with([[3] * ITEMS] * 3))
    assert row_of(found, group="seen")["trials"] == 3 * 4
    assert row_of(found, group="unseen")["trials"] == 3 * 4 * 3
    assert row_of(found, group="new", arm="old")["trials"] == 3 * 4 * 4
    assert [one["group"] for one in found if one["key"] == "nll_words"] == [""]


def test_what_was_not_said_is_not_measured():
    claim = claim_of(measures=["facts_said", "words"])
    found = row_of(tables.compared(claim, cells_with([[3] * ITEMS] * 3)), key="words")
    assert found["value"] is None and found["word"] == "not measured"


def test_a_situation_that_no_data_has_makes_a_group_of_its_own():
    cells = cells_with([[3] * ITEMS] * 3)
    before = tables.compared(claim_of(groups=True), cells)
    assert "elsewhere" not in {one["group"] for one in before}
    for cell in cells:
        for one in cell["conversations"]:
            one["situation"] = "power-cut" if one["persona"] else None
    found = tables.compared(claim_of(groups=True), cells)
    assert {one["group"] for one in found} == {"", "elsewhere", "unseen", "new"}
    assert row_of(found, group="elsewhere")["trials"] == row_of(before, group="seen")["trials"]
    assert row_of(found, group="unseen") == row_of(before, group="unseen")


def test_clips_count_once_whatever_the_group():
    cells = cells_with([[1] * ITEMS] * 3)
    for one in cells:
        one["likelihood"][0]["values"]["nll_words"] += one["arm"] == "new"
    found = row_of(tables.compared(claim_of(), cells), key="nll_words")
    assert found["value"] == 3.0 and found["difference"] == 0.5
    assert found["n"] == 6  # a seed's held-out clips are its own
    assert found["word"] == tables.TOO_FEW  # three clips differ
    for one in cells:
        for clip in one["likelihood"]:
            clip["group"] = "base_clips"  # these are the same for every seed
    assert row_of(tables.compared(claim_of(), cells), key="nll_words")["n"] == 2


def test_curves_are_means_over_seeds():
    one, other = ({"arm": "a", "curves": {"loss": {"valid": [[0, v], [9, v]]}}} for v in (1.0, 2.0))
    other["curves"]["loss"]["valid"].append([20, 5.0])  # a step that one seed alone has
    assert tables.mean_curves([one, other], "a") == {"loss": {"valid": [[0, 1.5], [9, 1.5]]}}


# -- the files


def test_every_arm_of_every_claim_is_a_config():
    common = plan.load_common().model_copy(update={"seeds": (42,)})
    for name in plan.claim_names():
        claim = plan.load_claim(name)
        seen = set()
        for one in plan.cells_of(claim, common):
            config = load_config(CHECKOUT / common.config, list(one.overrides))
            assert config.seed == config.evaluate.seed == one.seed
            seen.add((one.arm == plan.BASE, config.model_dump_json()))
        arms = len(claim.arms) * len(common.seeds)
        assert len(seen) == arms, f"{name}: two arms are the same"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"reference": "none"}, "reference must be one of the arms"),
        ({"key": "words"}, "key must be one of the measures"),
        ({"measures": ["facts_said", "wit"]}, "found wit"),
        ({"arms": {"old": {}, "base": {"seed": 1}}}, "takes no overrides"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        claim_of(**wrong)


def test_an_unknown_claim_is_refused_with_those_there_are(capsys):
    assert command.main(["nothing"]) == RequestError.exit_code
    assert "alignment" in capsys.readouterr().err


def test_a_trial_never_takes_a_page_s_place(capsys):
    with pytest.raises(SystemExit):
        command.main(["alignment", "--seeds", "1"])
    assert "--out" in capsys.readouterr().err


# -- the pages

WRITTEN = sorted(path.stem for path in command.OUT.glob("*.json"))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_of_the_figures_beside_it(name):
    claim, result = plan.load_claim(name), json.loads((command.OUT / f"{name}.json").read_text())
    assert (command.OUT / f"{name}.md").read_text() == page.describe(
        name, claim, result, plan.pocket_base()
    )
    common = plan.load_common()
    assert {arm["arm"]: arm["overrides"] for arm in result["arms"]} == claim.arms
    assert (result["set"], result["seeds"]) == (common.set | claim.set, list(common.seeds))
    assert {one["key"] for one in result["measures"]} == set(claim.measures)
    # Else its numbers are of another protocol than the files say: measure it again.
    assert result["config_digest"] == command.config_digest(claim, common)
    assert (command.OUT / f"{name}.svg").exists()


def test_the_index_is_of_the_figures_beside_it():
    results = {name: json.loads((command.OUT / f"{name}.json").read_text()) for name in WRITTEN}
    assert (command.OUT / "README.md").read_text() == index.describe_index(
        results, plan.pocket_base()
    )


def result_with(new):
    claim = claim_of(curves=True, knob="It", survival=True)
    cells = cells_with(new)
    for one in cells:
        one["curves"] = {"loss": {"valid": [[0, 3.0], [40, 1.0]]}}
    common = plan.load_common()
    return claim, command.result_of(claim, common, cells)


def test_a_page_of_an_earlier_base_says_so_and_the_index_too():
    claim, result = result_with([[3] * ITEMS] * 3)
    today = plan.pocket_base()
    assert result["base"] == today and "earlier pocket base" not in page.describe(
        "x", claim, result, today
    )
    later = {"weights": "f" * 64, "steps": 7}
    text = page.describe("x", claim, result, later)
    own = f"{today['steps']} steps, sha256 {today['weights'][:12]}…"
    assert f"earlier pocket base ({own})" in text and "(7 steps, sha256 ffffffffffff…)" in text
    results = {name: json.loads((command.OUT / f"{name}.json").read_text()) for name in WRITTEN}
    assert "How long to train; " in index.describe_index(results, later)


def test_the_page_says_what_the_key_measure_shows():
    claim, result = result_with([[3] * ITEMS] * 3)
    text = page.describe("x", claim, result, result["base"])
    assert "It does." in text and "It harms." not in text
    assert "**Against the claim.** Held by `new` (+50.0 pp)." in text
    assert "| `new` | 75.0 % · 75.0 % · 75.0 % | 75.0 % |" in text
    assert "| total, after epoch | 0 | 8 |" in text and "| `old` | 3.00 | 1.00 |" in text
    assert "Held-out clips are of seed 1: c0, c1; " in text
    claim, nothing = result_with([[1] * ITEMS] * 3)
    assert "Who knows." in page.describe("x", claim, nothing, result["base"])
    _, harm = result_with([[0] * ITEMS] * 3)
    assert "It harms." in page.describe("x", claim, harm, result["base"])
    drawn = draw_measures(result["measures"], "old", "facts_said")
    assert drawn == draw_measures(copy.deepcopy(result["measures"]), "old", "facts_said")
    assert drawn != draw_measures(nothing["measures"], "old", "facts_said")
    assert b"<svg" in draw_curves(result["curves"], {"loss": (9, 3)}, 5)


def test_what_did_better_is_tried_first():
    claim, better = result_with([[1 + i % 2 for i in range(ITEMS)] for _ in range(3)])
    claim, clearly = result_with([[4] * (ITEMS - 1) + [3]] * 3)
    _, worse = result_with([[0] * ITEMS] * 3)
    _, none = result_with([[1] * ITEMS] * 3)
    claims = dict.fromkeys("abcd", claim)
    results = {"a": better, "b": none, "c": worse, "d": clearly}
    found = index.ranked(claims, results)
    assert [(name, kind) for name, kind, _ in found] == [
        ("d", ("better", False)), ("c", ("worse", False)),
        ("a", ("none", False)), ("b", ("none", False)),
    ]  # fmt: skip


def test_what_did_better_at_a_price_comes_behind_and_names_it():
    _, free = result_with([[2] * ITEMS] * 3)
    claim = claim_of(knob="It")
    cells = cells_with([[4] * ITEMS] * 3)
    for one in cells:
        extra = [copy.deepcopy(one["likelihood"][0]) | {"clip": f"d{i}"} for i in range(ITEMS)]
        one["likelihood"] += extra
        for clip in one["likelihood"]:
            clip["values"]["nll_words"] += one["arm"] == "new"
    dear = command.result_of(claim, plan.load_common(), cells)
    results = {"dear": dear, "free": free}
    found = index.ranked(dict.fromkeys(results, claim), results)
    assert [(name, has_price) for name, (_, has_price), _ in found] == [
        ("free", False), ("dear", True),
    ]  # fmt: skip
    assert "It does. Its price: NLL of words, held-out clips `new` regressed, +1." in page.advice(
        claim, dear["measures"]
    )
