"""The table of GPUs: its choices against the estimate, its arithmetic by hand, and no drift."""

import json

import pytest

from benchmarks import pod_costs
from benchmarks.pod_costs import CONFIG, README, RESULT, Figure, GpuSpeed, Reference, Speeds
from duplex.configfile import load_config
from duplex.errors import DataFileError
from pipeline.doctor import model_sizes
from training.estimate import MOSHI_7B, estimate_memory

ROWS = pod_costs.rows()


def test_readme_and_json_are_what_the_command_writes():
    text = pod_costs.table(ROWS, load_config(CONFIG))
    page = README.read_text()
    assert pod_costs.with_table(page, text) == page, "python -m benchmarks.pod_costs --write"
    assert RESULT.read_text() == pod_costs.as_json(ROWS)
    with pytest.raises(ValueError, match="must hold"):
        pod_costs.with_table(page.replace(pod_costs.END, ""), text)


def test_the_settings_of_a_row_fit_and_those_before_do_not():
    for row in ROWS:
        assert row.settings is not None and row.memory_gb is not None
        place = pod_costs.SETTINGS.index(row.settings)
        for settings in pod_costs.SETTINGS[: place + 1]:
            config = load_config(CONFIG, [f"{key}={value}" for key, value in settings.items()])
            need = estimate_memory(model_sizes(config), config.train).total / 1e9
            fits = need * pod_costs.MARGIN + pod_costs.CONTEXT_GB <= row.gpu.memory_gb
            assert fits == (settings is row.settings)
        assert row.memory_gb.value == pytest.approx(need)


def test_a_gpu_that_is_too_small_is_said_to_be():
    config = load_config(CONFIG)
    ways = [({}, config.train)]
    assert pod_costs.fitting_settings(model_sizes(config), ways, 8) is None
    text = pod_costs.table([pod_costs.Row(ROWS[0].gpu, None)], config)
    assert "does not fit" in text


def test_time_and_cost_by_hand():
    """H100 SXM: the reference itself, so 1 330 frames/s; 400 steps of 4 clips."""
    row = next(row for row in ROWS if row.gpu.name == "NVIDIA H100 80GB HBM3")
    assert row.frames_per_s == Figure(1330, "c")
    frames = 400 * 4 * pod_costs.clip_frames(load_config(CONFIG))
    minutes = frames / 1330 / 60
    assert row.train_min.value == pytest.approx(minutes)
    assert row.train_usd.value == pytest.approx(minutes / 60 * row.gpu.usd_per_hour)
    hours = minutes / 60 + (pod_costs.START_MIN + 200 * 20 * 3.5 / 60) / 60
    assert row.whole_h.value == pytest.approx(hours)
    assert row.whole_usd.value == pytest.approx(hours * row.gpu.usd_per_hour)


def test_speed_is_scaled_by_peak_unless_somebody_measured_it():
    speeds = Speeds(
        reference=Reference(name="big", frames_per_s=1000, source="s"),
        gpus=(
            GpuSpeed(name="big", bf16_tflops=800, source="s"),
            GpuSpeed(name="small", bf16_tflops=200, source="s"),
            GpuSpeed(name="known", bf16_tflops=200, source="s", measured_frames_per_s=777),
        ),
    )
    assert pod_costs.frames_per_s("small", speeds) == Figure(250, "c")
    assert pod_costs.frames_per_s("known", speeds) == Figure(777, "m")
    with pytest.raises(DataFileError, match="bf16 peak of other"):
        pod_costs.frames_per_s("other", speeds)


def test_a_slot_takes_its_keys_and_values():
    """The 7B model: 15.4 GB of weights, 1.57 GB a slot, in bfloat16."""
    room = pod_costs.CONTEXT_GB + pod_costs.MARGIN * (15.376 + 3 * 1.573)
    assert pod_costs.serving_slots(MOSHI_7B, room + 0.01) == 3
    assert pod_costs.serving_slots(MOSHI_7B, room - 0.1) == 2
    assert pod_costs.serving_slots({**MOSHI_7B, "dep_q": 16}, 8) == 0


def test_every_figure_of_the_json_says_what_it_is():
    for row in json.loads(RESULT.read_text()):
        figures = [value for value in row.values() if isinstance(value, dict) and "kind" in value]
        assert len(figures) == 8
        assert {figure["kind"] for figure in figures} <= {"measured", "computed"}
