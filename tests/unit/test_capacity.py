"""The capacity plan: worked out by hand for round figures; the pages are what the files give."""

import json

import pytest

from benchmarks import capacity, runners
from benchmarks.capacity import (
    StageCost,
    against_demo,
    demo_of,
    gpu_rows,
    ledger_cost,
    stage_costs,
)
from benchmarks.pod_costs import GPUS
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from pipeline.pods.gpus import GpuType, load_gpus

DOCS = CHECKOUT / "docs"
RESULTS = {
    # 100 dialogues, a minute each; half of the clock was others'
    "data": {
        "dialogues": 100, "minutes": 100.0, "wall_s": 80.0, "cpu_s": 40.0,
        "stage_s": {"dialogues": 2.0, "speech": 60.0},
        "near_duplicates": {"texts": 1000, "cpu_s": 5.0},
    },
    "tensors": {"speed": {"the stage, one process": 120.0}},
    "runners": {"records": 1000, "runners": {"local": {"trivial_s": 2.0}}},
    # 10 dialogues of half a minute
    "capacity": {
        "dialogues": 10, "minutes": 5.0,
        "stage_s": {"personas": 0.5, "dialogues": 1.15, "voices": 1.0, "speech": 3.5,
                    "tensors": 6.5},
        "stage_bytes": {"personas": 9, "dialogues": 40_000, "voices": 9, "speech": 30_000_000,
                        "tensors": 500_000},
    },
}  # fmt: skip


def test_each_stages_cost_is_its_cpu_time_and_what_the_small_run_took_beyond_it():
    costs = {cost.stage: cost for cost in stage_costs(RESULTS)}
    assert costs["dialogues"].each_s == pytest.approx(0.01 + 0.005)
    assert costs["speech"].each_s == pytest.approx(0.3)
    assert costs["tensors"].each_s == pytest.approx(0.5)  # a minute at 120 times real time
    # ten dialogues of half the length: 1.5 s of speech, 2.5 s of tensors
    assert costs["speech"].fixed_s == pytest.approx(2.0)
    assert costs["tensors"].fixed_s == pytest.approx(4.0)
    assert costs["speech"].each_bytes == pytest.approx(6e6)
    assert costs["dialogues"].each_bytes == pytest.approx(4000)
    assert (costs["personas"].seconds(10**6), costs["voices"].each_s) == (0.5, 0.0)
    assert ledger_cost(RESULTS).each_s == pytest.approx(0.006)


def test_workers_share_what_is_spread_and_nothing_else():
    speech = StageCost("speech", 2.0, 0.5, 1e6, "x")
    assert (speech.seconds(100), speech.seconds(100, 10)) == (52.0, 7.0)
    assert StageCost("dialogues", 2.0, 0.5, 0, "x").seconds(100, 10) == 52.0
    assert speech.gigabytes(5000) == 5.0


def test_a_gpu_costs_its_hours_and_an_unknown_one_is_left_out():
    section = load_config(CHECKOUT / "configs" / "coffee.yaml").train
    gpus = [
        GpuType(id="NVIDIA RTX A6000", memory_gb=48, usd_h=2.0, source="x"),
        GpuType(id="Abacus 9", memory_gb=1, usd_h=1.0, source="x"),
    ]
    (row,) = gpu_rows(gpus, 500.0, section)
    # 200 dialogues of 500 frames, twice, at the published 1 330 a second by the chips' peaks
    assert row["hours"][0] == pytest.approx(200 * 500 * 2 / (1330 * 155 / 989) / 3600)
    assert row["usd"] == [2 * hours for hours in row["hours"]]
    assert row["hours"][1] == pytest.approx(100 * row["hours"][0])
    assert 15 < row["need_gb"] < 24


def test_the_demo_is_read_from_its_result_and_held_against_the_model():
    seconds = {"personas": 1.0, "dialogues": 2.5, "voices": 1.2, "speech": 6.0, "tensors": 17.0}
    stages = [{"stage": name, "seconds": s, "records": 24} for name, s in seconds.items()]
    demo = demo_of({"minutes": 12.0, "stages": stages})
    assert demo["minutes"] == 12.0 and demo["stage_s"]["tensors"] == 17.0
    (row,) = against_demo([StageCost("speech", 2.0, 0.5, 0, "x")], demo, minutes_each=0.5)
    assert row == {"stage": "speech", "model_s": 14.0, "demo_s": 6.0, "ratio": 14 / 6}
    with pytest.raises(ValueError, match="must have all stages, found no tensors"):
        demo_of({"minutes": 12.0, "stages": stages[:-1]})


def test_the_pages_are_what_the_files_give():
    """Else: python -m benchmarks.capacity --write"""
    results = {
        name: json.loads((DOCS / "results" / f"{name}.json").read_text())
        for name in capacity.SOURCES
    }
    gpus = load_gpus(GPUS)
    section = load_config(CHECKOUT / "configs" / "coffee.yaml").train
    demo = demo_of(json.loads((DOCS / "results" / "demo.json").read_text()))
    found = capacity.capacity(results, gpus, section, demo)
    assert (DOCS / "capacity.md").read_text() == capacity.page(found)
    assert (DOCS / "results" / "runners.md").read_text() == runners.page(results["runners"])
    assert all(limit["kept"] for limit in results["runners"]["limits"].values())
