"""docs/results/demo.md is of the JSON beside it, and says what the page of the claim says of the
same model, seed and items."""

import json

import pytest

from benchmarks import demo
from benchmarks.claims import __main__ as claims
from benchmarks.claims.plan import load_claim, load_common
from duplex.configfile import load_config
from duplex.errors import MissingInputError

FOUND = json.loads((demo.RESULTS / "demo.json").read_text())


def test_the_page_is_of_the_figures_beside_it():
    assert (demo.RESULTS / "demo.md").read_text() == demo.describe(FOUND)


def test_an_unfinished_run_is_refused_by_its_stages(tmp_path):
    with pytest.raises(MissingInputError, match=r"found no personas, .*evaluate. Run `make demo`"):
        demo.read_run(tmp_path)
    assert demo.main([str(tmp_path)]) == 2


def test_the_demo_is_one_seed_of_the_claims_page():
    """Its items are those of customers that are in no data; no override of the claim but those
    of items and guards changes what they are asked."""
    claim, common, config = load_claim("before-after"), load_common(), load_config(demo.CONFIG)
    assert config.evaluate.seed == config.seed == common.seeds[0]
    assert claim.set["train.steps"] == config.train.steps
    for section in ("evaluate", "serve"):
        sampling = getattr(config, section).sampling
        assert claim.set[f"{section}.sampling"] == sampling.model_dump()
    assert set(config.evaluate.items) <= set(claim.set["evaluate.items"])


@pytest.mark.parametrize("key", ["response_rate", "facts_said", "hallucinated", "words"])
def test_the_demo_says_what_the_claims_page_says(key):
    result = json.loads((claims.OUT / "before-after.json").read_text())
    (one,) = [m for m in result["measures"] if (m["key"], m["group"]) == (key, "new")]
    rows = {row["arm"]: row["by_seed"][0] for row in one["rows"]}
    models = {"base": "base", "tuned": "merged"}
    for arm, label in models.items():
        assert rows[arm] == pytest.approx(FOUND["pooled"][key][label], abs=1e-5), (key, arm)
