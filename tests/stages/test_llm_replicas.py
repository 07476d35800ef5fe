"""One model behind several addresses: requests are shared, and a dead server costs none of them."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from duplex.config_data import DialoguesSection
from duplex.errors import TransientError
from pipeline.engines.llm.build import client_of
from pipeline.engines.llm.client import Client
from pipeline.engines.llm.exchanges import Exchanges
from pipeline.engines.llm.replicas import Replicas
from pipeline.engines.llm.wire import Wire
from tests.stages.llm_server import KEY, MisbehavingServer
from tests.stages.test_llm_run import some_request


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def client_at(tmp_path: Path, *addresses: str, **runtime: Any) -> Client:
    given = {"base_url": list(addresses), "api_key": KEY, "concurrency": 4, **runtime}
    section = DialoguesSection.model_validate({"writer": "openai", "llm": "tiny", "runtime": given})
    return client_of(section, Exchanges(tmp_path / "exchanges.jsonl"))


def ask(client: Client, count: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.ask, some_request(seed), f"t-{seed}") for seed in range(count)]
        for one in asked:
            one.result()
    client.close()


def test_requests_are_shared_and_none_is_sent_twice(tmp_path: Path) -> None:
    with MisbehavingServer() as one, MisbehavingServer() as other:
        ask(client_at(tmp_path, one.base_url, other.base_url), 8)
    assert (len(one.books.completed), len(other.books.completed)) == (4, 4)
    assert not one.books.completed.keys() & other.books.completed.keys()


def test_a_dead_server_costs_no_request_and_is_passed_over(tmp_path: Path) -> None:
    with MisbehavingServer() as server:
        client = client_at(tmp_path, nobody(), server.base_url, max_retries=0)
        ask(client, 4)
    assert len(server.books.completed) == 4
    assert client.describe().startswith("4 replies, 0 retries")


def test_what_one_turns_away_the_other_takes_at_once(tmp_path: Path) -> None:
    with MisbehavingServer(share=1.0, deeds=("503",)) as busy, MisbehavingServer() as server:
        ask(client_at(tmp_path, busy.base_url, server.base_url, max_retries=0), 4)
    assert sum(busy.books.requests.values()) == 2
    assert len(server.books.completed) == 4


def test_what_may_have_been_billed_is_sent_nowhere_else_within_one_try(tmp_path: Path) -> None:
    with MisbehavingServer(share=1.0, deeds=("cut",)) as cutting, MisbehavingServer() as server:
        client = client_at(tmp_path, cutting.base_url, server.base_url, max_retries=0)
        with pytest.raises(TransientError, match="broke the connection off"):
            client.ask(some_request(1), "t")
        client.close()
    assert sum(server.books.requests.values()) == 0


def test_when_all_are_dead_it_is_said_of_one(tmp_path: Path) -> None:
    client = client_at(tmp_path, nobody(), nobody(), max_retries=0)
    with pytest.raises(TransientError, match=r"endpoint at 127\.0\.0\.1 cannot be reached"):
        client.ask(some_request(1), "t")
    client.close()


def test_one_that_cannot_be_reached_comes_last_until_it_has_rested() -> None:
    wires = [
        Wire(base_url=address, api_key=KEY, timeout_s=5, deadline_s=5)
        for address in (nobody(), nobody())
    ]
    both = Replicas(wires)
    assert [both._order() for _ in range(3)] == [[0, 1], [1, 0], [0, 1]]
    both._resting_until_s[1] = time.monotonic() + 60
    assert [both._order() for _ in range(2)] == [[0, 1], [0, 1]]
    both._resting_until_s[1] = time.monotonic()
    assert [both._order() for _ in range(2)] == [[1, 0], [0, 1]]


def test_addresses_are_one_several_or_openais() -> None:
    def addresses(base_url: Any) -> tuple[str, ...]:
        return DialoguesSection.model_validate(
            {"runtime": {"base_url": base_url}}
        ).runtime.addresses

    assert addresses(None) == ()
    assert addresses("http://a/v1") == ("http://a/v1",)
    assert addresses(["http://a/v1", "http://b/v1"]) == ("http://a/v1", "http://b/v1")
    with pytest.raises(ValueError, match="at least 1 item"):
        addresses([])
