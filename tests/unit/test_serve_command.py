"""What `duplex serve` refuses before it starts anything, and what it takes for a model."""

from pathlib import Path

import pytest

from duplex.errors import RequestError
from pipeline.serve_command import ServeOptions, is_model, require_origin, serve


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("pocket", True),
        ("kyutai/moshiko-pytorch-bf16", True),
        ("checkpoint", True),
        ("configs/pocket.yaml", False),
        ("configs/pocket", False),
        ("missing.yaml", False),
        ("owner/missing.yaml", False),
        ("nothing", False),
    ],
)
def test_a_model_is_a_folder_pocket_or_a_hub_name(tmp_path, monkeypatch, target, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "configs").mkdir()
    assert is_model(target) is expected


@pytest.mark.parametrize("friend", ["localhost:8999", "http://", "http://h/page", "ftp://h", ""])
def test_a_friend_is_an_origin(friend):
    with pytest.raises(RequestError, match="--friend must be a server's origin"):
        require_origin(friend)
    require_origin("http://127.0.0.1:8998")
    require_origin("https://h.example/")


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_that_is_none_is_refused(tmp_path, port):
    config = Path(__file__).parents[2] / "configs" / "pocket.yaml"
    with pytest.raises(RequestError, match="--port must be 0 to 65535"):
        serve(str(config), ServeOptions(port=port, base=True), tmp_path, [])
