"""The vision-language judge against a small real HTTP server that speaks the OpenAI protocol."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import yaml
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards import build
from tests.rewards.chat_server import MODEL, Judge
from tests.rewards.drawing import flat
from tests.rewards.servers import answering

RATING = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    with answering(judge) as url:
        judge.url = f"{url}/v1"
        yield judge
    judge.release.set()


def asked(judge: Judge, **options: Any) -> Any:
    """A judge whose question ends in the prompt, in the brackets from which the server takes its orders."""
    return build("vlm_judge", base_url=judge.url, model=MODEL, **{"questions": "Is this [{prompt}]?"} | options)


def test_words_are_worth_their_values(judge: Judge) -> None:
    reward = asked(judge)
    said = ["yes", "No.", "**Yes**, it is", "yesterday", "I say yes", "nothing"]
    scores = reward.score([flat("red")] * 6, said)
    assert scores[:3].tolist() == [1.0, 0.0, 1.0]
    assert scores[3:].isnan().all()
    assert reward.failures == {"answer without one of the words": 3}
    assert judge.requests[0]["logprobs"] is True  # asked for once
    assert "logprobs" not in judge.requests[-1]
    assert (judge.requests[-1]["temperature"], judge.requests[-1]["max_tokens"]) == (0, 64)
    assert reward.identity()["log_probabilities"] is False


def test_a_rating_is_read_behind_its_mark(judge: Judge) -> None:
    reward = asked(judge, answers=RATING, after="Final Score:")
    said = [
        "2 of 3\nFinal Score: 4/5",
        "Final Score: 1? no. Final Score: **5**",
        "4",
        "Final Score: 3.5",
        "Final Score: 45",
    ]
    for caption in said:
        judge.tokens[caption] = [{caption: 1.0}]
    scores = reward.score([flat("red")] * 5, said)
    assert scores[:2].tolist() == [4.0, 5.0]
    assert scores[2:].isnan().all()


def test_log_probabilities_weigh_the_words(judge: Judge) -> None:
    judge.log_probabilities = True
    judge.tokens = {
        "likely": [{"Yes": 0.6, " yes": 0.2, "no": 0.2}],
        "rated": [{"Score": 1.0}, {":": 0.9, "=": 0.1}, {" 4": 0.5, " 5": 0.25, "3": 0.25}],
        "begun": [{"ex": 0.5, "good": 0.5}, {"cellent": 1.0}],
        "silent": [{"maybe": 1.0}],
    }
    yes = asked(judge)
    assert yes.score([flat("red")] * 2, ["likely", "silent"])[0].item() == pytest.approx(0.8)
    assert yes.failures == {"answer without one of the words": 1}
    rating = asked(judge, answers=RATING, after="Score:")
    assert rating.score([flat("red")], ["rated"]).item() == pytest.approx(4.0)
    levels = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
    assert asked(judge, answers=levels).score([flat("red")], ["begun"]).item() == pytest.approx(4.5)
    assert rating.identity()["log_probabilities"] is True
    assert asked(judge, log_probabilities=False).score([flat("red")], ["likely"]).item() == 1.0


def test_a_server_that_refuses_or_lacks_them(judge: Judge) -> None:
    judge.log_probabilities = None
    reward = asked(judge)
    assert reward.score([flat("red")], ["yes"]).item() == 1.0
    with pytest.raises(UserError, match=r"log_probabilities = true: http.* gives none"):
        asked(judge, log_probabilities=True)


def test_several_questions_are_a_mean_and_columns_are_filled_in(judge: Judge) -> None:
    reward = asked(judge, questions=["A {colour} thing: [{prompt}]", "[{answer}]"])
    images, prompts = [flat("red")] * 3, ["yes", "yes", "no {brace}"]
    metadata = [{"colour": "red", "answer": "no"}, {"colour": "red"}, {"colour": "red", "answer": "no"}]
    scores = reward.score(images, prompts, metadata)
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == [0.5, 0.0]
    assert reward.failures == {"prompt without 'answer'": 1}
    texts = [request["messages"][0]["content"][1]["text"] for request in judge.requests]
    assert "A red thing: [no {brace}]" in texts


def test_failures_are_those_of_the_client(judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    judge.status["no"] = [503]
    reward = asked(judge, retries=0, timeout=0.3, concurrency=1)
    with caplog.at_level(logging.WARNING, "opd_ds"):
        scores = reward.score([flat("red")] * 5, ["yes", "no", "empty", "slow", "yes"])
    assert scores.isnan().tolist() == [False, True, True, True, True]
    assert reward.failures == {
        "http 503": 1, "garbage (IndexError)": 1, "timeout": 1, "not tried, the server is lost": 1,
    }  # fmt: skip
    assert len([record for record in caplog.records if record.name == "opd_ds"]) == 1


def test_as_a_config_writes_it(judge: Judge) -> None:
    """YAML reads a bare yes as true."""
    answers = yaml.safe_load("{yes: 1, no: -1}")
    assert asked(judge, answers=answers).score([flat("red")] * 2, ["yes", "no"]).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"questions": "a {prompt"}, r"questions: 'a \{prompt': expected '}' before end of string; a brace itself is"),
        ({"questions": "{0}"}, r"questions: \{0\} in '\{0\}': expected \{prompt\} or a metadata column"),
        ({"answers": {"yes": "x", "no": 0}}, "answers: 'yes': 'x': expected a word and a finite number"),
        ({"answers": {"yes": 1}}, r"answers = \{'yes': 1\}: expected two words or more"),
    ],
)
def test_settings_that_cannot_be(judge: Judge, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked(judge, **options)
    assert not judge.requests


def test_a_model_that_takes_no_images_is_found_at_the_start(judge: Judge) -> None:
    judge.status["a grey square"] = [400, 400]
    with pytest.raises(UserError, match=rf"{MODEL} at .* gave no answer about an image \(http 400\)"):
        asked(judge, retries=0)


def test_the_reference_is_shown_before_the_edited_picture(judge: Judge) -> None:
    reward = asked(judge, references=True)
    assert reward.score([flat("red"), flat("red")], ["yes", "yes"], None, [(flat("blue"),), ()]).tolist()[:1] == [1.0]
    assert reward.failures == {"prompt without a reference picture": 1}
    *shown, question = judge.requests[-1]["messages"][0]["content"]
    pixels = [Image.open(BytesIO(base64.b64decode(one["image_url"]["url"].partition(",")[2]))) for one in shown]
    assert [image.getpixel((0, 0)) for image in pixels] == [(0, 0, 255), (255, 0, 0)]
    assert question["text"] == "Is this [yes]?"
    assert reward.identity()["references"] is True
    assert (
        "second image was made from the first"
        in build("vlm_judge", base_url=judge.url, model=MODEL, references=True).identity()["questions"][0]
    )
