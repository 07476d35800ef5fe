"""What `/metrics` shows, in Prometheus' text format. No prompt, no address, no token is in it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A frame lasts .08 s: what takes longer than that is late.
STEP_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1)
PREFILL_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Counts:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.slots = Gauge("duplex_slots", "conversations that fit in", registry=own)
        self.slots_taken = Gauge("duplex_slots_taken", "conversations in progress", registry=own)
        self.ended = Counter(
            "duplex_conversations", "that ended, by reason", ["reason"], registry=own
        )
        self.frames = Counter("duplex_frames", "of 80 ms that were answered", registry=own)
        self.step_s = Histogram(
            "duplex_step_seconds", "one step of all slots", buckets=STEP_BUCKETS_S, registry=own
        )
        self.prefill_s = Histogram(
            "duplex_prefill_seconds", "of a prompt", buckets=PREFILL_BUCKETS_S, registry=own
        )
        self.prompts = Counter("duplex_prompts", "fed, or kept from before", ["how"], registry=own)
        self.refused = Counter(
            "duplex_requests_refused", "by HTTP status", ["status"], registry=own
        )
        self.connections = Gauge("duplex_connections", "open", registry=own)

    def text(self) -> bytes:
        return generate_latest(self._registry)
