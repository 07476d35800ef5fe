"""The clock: seconds, samples and frames agree with Moshi's numbers."""

from hypothesis import given
from hypothesis import strategies as st

from duplex.frames import (
    FRAME_RATE,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    frame_at,
    frames_covering_samples,
    frames_covering_seconds,
    frames_to_seconds,
)


def test_constants_are_moshis():
    from moshi.models import loaders

    assert loaders.SAMPLE_RATE == SAMPLE_RATE
    assert loaders.FRAME_RATE == FRAME_RATE
    assert SAMPLE_RATE / FRAME_RATE == FRAME_SAMPLES


@given(st.integers(0, 1_000_000))
def test_a_frame_boundary_belongs_to_the_frame_that_starts_there(frame):
    start_s = frames_to_seconds(frame)
    assert frame_at(start_s) == frame
    assert frames_covering_seconds(start_s) == frame


@given(st.floats(0, 10_000))
def test_covering_frames_cover_and_no_frame_is_spare(duration_s):
    count = frames_covering_seconds(duration_s)
    assert frames_to_seconds(count) >= duration_s - 2e-6
    assert count == 0 or frames_to_seconds(count - 1) < duration_s


@given(st.integers(0, 10_000_000))
def test_covering_samples_is_a_ceiling(num_samples):
    count = frames_covering_samples(num_samples)
    assert 0 <= count * FRAME_SAMPLES - num_samples < FRAME_SAMPLES
