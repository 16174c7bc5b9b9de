"""Rewards behind a server where the environment names a proxy: this machine is reached without it."""

from __future__ import annotations

import json

import pytest

from opd_ds.errors import UserError
from opd_ds.rewards import build
from opd_ds.rewards.proxies import on_this_machine, proxy_hint
from tests.rewards.chat_server import Judge
from tests.rewards.drawing import flat
from tests.rewards.servers import answering

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SET = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("variable", SET)
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_server_on_this_machine_is_reached_without_the_proxy(
    variable: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    info = {"/health": b"ok", "/info": json.dumps({"name": "x", "identity": {}}).encode(), "/score": b'{"scores":[2]}'}
    with answering(lambda handler, _: (200, info[handler.path])) as url:
        assert build("remote", url=url).score([flat("red")], ["a"]).tolist() == [2.0]
    with answering(Judge()) as url:
        assert build("unifiedreward", base_url=f"{url}/v1").score([flat("red")], ["3"]).tolist() == [3.0]


@pytest.mark.parametrize("variable", SET)
def test_elsewhere_the_variable_is_named_and_not_its_value(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda *_: (503, b"blocked")) as proxy:
        monkeypatch.setenv(variable, proxy.replace("http://", "http://me:secret@"))
        wanted = rf"went through the proxy of \${variable}: add judge\.example to no_proxy"
        for reward, key in (("remote", "url"), ("unifiedreward", "base_url")):
            with pytest.raises(UserError, match=wanted) as caught:
                build(reward, **{key: "http://judge.example/v1"}, retries=0)
            assert "secret" not in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_socks_proxy_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(UserError, match=r"went through the proxy of \$ALL_PROXY"):
        build("unifiedreward", base_url="http://judge.example/v1", retries=0)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:1", True),
        ("http://localhost.:1", True),
        ("http://127.0.0.1", True),
        ("http://127.8.0.1:80/x", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1:8000", False),
        ("http://localhost.example", False),
        ("http://n1:8000", False),
    ],
)
def test_which_hosts_are_this_machine(url: str, here: bool) -> None:
    assert on_this_machine(url) == here


def test_no_proxy_and_other_schemes_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    assert proxy_hint("http://n1:8000") == ""
    assert "$https_proxy" in proxy_hint("https://n1:8000")
    monkeypatch.setenv("no_proxy", "n1,.cluster")
    assert proxy_hint("https://n1:8000") == proxy_hint("https://n2.cluster") == ""
