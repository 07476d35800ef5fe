"""The table of the guards' checks: what was measured, in place; nothing where nothing was."""

from training.checks import COLUMNS, check_cells, checks_table

FREE = {"tokens_per_s": 0.5, "silent_share": None, "repeated_share": 0.25}
LINE = {
    "kind": "guards", "step": 40, "score": None, "collapse": "silence", "reason": "it is <silent>",
    "margin": {"words": {"mean": 0.1, "low": None, "high": 0.2}},
    "free": {
        "summary": FREE, "reference": {"tokens_per_s": 3.2, "silent_share": 0.4},
        "runs": [{"clip": "a<b", "said": ""}],
    },
    "budget": {
        "loss_shares": {"words": 0.3, "padding": 0.1, "semantic": 0.5, "acoustic": 0.1},
        "gradient_shares": {"words": 0.2, "padding": 0.2, "semantic": 0.5, "acoustic": 0.1},
        "warnings": ["words are drowned"],
    },
}  # fmt: skip


def test_each_cell_stands_under_its_name():
    assert dict(zip(COLUMNS, check_cells(LINE), strict=True)) == {
        "step": "40",
        "score": "",
        "prompt margin, nats a word token": "+0.100 [?, +0.200]",
        "text tokens/s (held out)": "0.50 (3.20)",
        "silent (held out)": "",
        "repeated": "0.25",
        "loss / gradient, %": "words 30 / 20, padding 10 / 20, semantic 50 / 50, acoustic 10 / 10",
        "found": "it is <silent>; words are drowned",
    }


def test_the_page_escapes_what_the_model_and_files_say():
    page = checks_table([{"kind": "train", "step": 1}, LINE])
    assert "it is &lt;silent&gt;" in page and "a&lt;b</b>: (nothing)" in page


def test_without_checks_there_is_no_table():
    assert checks_table([{"kind": "train", "step": 1}]) == ""
    bare = {"kind": "guards", "step": 0, "margin": None, "free": None, "budget": None}
    assert check_cells(bare) == ["0", *[""] * 7]
