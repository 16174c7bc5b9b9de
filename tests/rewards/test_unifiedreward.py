"""UnifiedReward's client against a fake OpenAI-compatible server that answers as told."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator

import openai
import pytest
import torch
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards import build
from opd_ds.rewards.unifiedreward import grade
from tests.rewards.chat_server import MODEL, Judge
from tests.rewards.drawing import flat
from tests.rewards.servers import answering


@pytest.fixture
def judge() -> Iterator[tuple[Judge, str]]:
    judge = Judge()
    with answering(judge) as url:
        yield judge, f"{url}/v1"
    judge.release.set()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Final Score: 4", 4.0),
        ("cat (animal): 1\nFinal Score: 3.5\n", 3.5),
        ("**Final Score:** 2.25", 2.25),
        ("final score: 5.", 5.0),
        ("Final Score: 4/5", 4.0),
        ("I would say 'Final Score: 1' is harsh. Final Score: 3", 3.0),
        ("Final Score: 45", None),
        ("Final Score: 0.5", None),
        ("Final Score: 5.1", None),
        ("Final Score: good", None),
        ("4", None),
        ("", None),
        (None, None),
    ],
)
def test_grades(answer: str | None, expected: float | None) -> None:
    assert grade(answer) == expected


def test_scores_are_the_raw_grades_in_order(judge: tuple[Judge, str], monkeypatch: pytest.MonkeyPatch) -> None:
    told, url = judge
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    reward = build("unifiedreward", base_url=url, api_key_variable="MY_KEY")
    scores = reward.score([flat("red")] * 4, ["1", "2.5", "5", "3"])
    assert scores.tolist() == [1.0, 2.5, 5.0, 3.0]
    assert scores.dtype == torch.float32
    assert set(told.headers) == {"Bearer secret-of-mine"}
    request = told.requests[0]
    assert request["model"] == MODEL
    assert request["temperature"] == 0
    picture, text = request["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert (sent.format, sent.size, sent.getpixel((0, 0))) == ("PNG", (16, 16), (255, 0, 0))
    assert "assign a score from 1 to 5 after 'Final Score:'" in text["text"]


def test_what_cannot_be_read_is_a_counted_gap(judge: tuple[Judge, str], caplog: pytest.LogCaptureFixture) -> None:
    told, url = judge
    told.status["4"] = [400]
    reward = build("unifiedreward", base_url=url, retries=0)
    with caplog.at_level(logging.WARNING, "opd_ds"):
        scores = reward.score([flat("red")] * 6, ["3", "I refuse", "9", "empty", "4", "garbage"])
    assert scores[0] == 3
    assert scores[1:].isnan().all()
    assert reward.failures["answer without a grade"] == 2
    assert reward.failures["http 400"] == 1
    assert reward.failures.total() == 5
    assert len([record for record in caplog.records if record.name == "opd_ds"]) == 1


def test_a_500_and_a_429_are_tried_again(judge: tuple[Judge, str]) -> None:
    told, url = judge
    told.status["4"] = [500, 429]
    reward = build("unifiedreward", base_url=url, retries=2)
    assert reward.score([flat("red")], ["4"]).tolist() == [4.0]
    told.status["4"] = [500, 500, 500]
    assert reward.score([flat("red")], ["4"]).isnan().all()
    assert reward.failures == {"http 500": 1}


def test_a_slow_server_is_a_timeout_and_the_rest_is_not_tried(judge: tuple[Judge, str]) -> None:
    _, url = judge
    reward = build("unifiedreward", base_url=url, retries=0, timeout=0.3, concurrency=1)
    assert reward.score([flat("red")] * 3, ["4", "slow", "5"]).isnan().tolist() == [False, True, True]
    assert reward.failures == {"timeout": 1, "not tried, the server is lost": 1}
    assert reward.score([flat("red")], ["5"]).tolist() == [5.0]  # the next call tries again


def test_a_dead_server_is_one_line_and_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    with answering(Judge()) as url:
        reward = build("unifiedreward", base_url=f"{url}/v1", retries=1, concurrency=2)
    with caplog.at_level(logging.WARNING, "opd_ds"):
        assert reward.score([flat("red")] * 20, ["3"] * 20).isnan().all()
    assert reward.failures.total() == 20
    assert reward.failures["connection failed"] <= 2
    assert len([record for record in caplog.records if record.name == "opd_ds"]) == 1


def test_no_more_than_concurrency_at_a_time(judge: tuple[Judge, str]) -> None:
    told, url = judge
    reward = build("unifiedreward", base_url=url, concurrency=3)
    reward.score([flat("red")] * 12, ["busy"] * 12)
    assert 1 < told.most_busy <= 3


def test_a_missing_server_or_model_is_said_at_the_start(judge: tuple[Judge, str]) -> None:
    told, url = judge
    told.models = ["another/model"]
    with pytest.raises(UserError, match=f"model = '{MODEL}' is not served at .*; served: another/model"):
        build("unifiedreward", base_url=url)
    with pytest.raises(UserError, match=r"no server answers at base_url = 'http://127\.0\.0\.1:9/v1' \(APIConn"):
        build("unifiedreward", base_url="http://127.0.0.1:9/v1", retries=0)


def test_a_refused_key_names_the_variable_and_not_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    with (
        answering(lambda *_: (401, b'{"error": {"message": "wrong key secret-of-mine"}}')) as url,
        pytest.raises(UserError, match=r"answered 401; its API key is read from \$MY_KEY") as caught,
    ):
        build("unifiedreward", base_url=url, api_key_variable="MY_KEY")
    assert "secret-of-mine" not in str(caught.value)
    assert isinstance(caught.value.__cause__, openai.AuthenticationError)
