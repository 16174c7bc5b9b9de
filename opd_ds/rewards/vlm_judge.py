"""Any vision-language model as a judge: questions whose answers are words, each of which is worth a number."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs, Served, Takes
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.references import WITHOUT, Own, References
from opd_ds.rewards.vision_server import API_KEY_VARIABLE, Connection, VisionServer

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

_SHOWS = "Does this image show {prompt}? Answer with yes or no."
_EDITED = (
    "The second image was made from the first as this instruction says: {prompt}. Does it follow the instruction, and "
    "leave all else as it was? Answer with yes or no."
)
YES_OR_NO = {"yes": 1.0, "no": 0.0}
_LOG_PROBABILITIES = {"logprobs": True, "top_logprobs": 20}  # the most that the protocol allows
_UNPARSABLE, _WITHOUT = "answer without one of the words", "answer without log-probabilities of the words"


class VlmJudge(Served, CountsGaps):
    """Questions put to a vision-language model: the mean value of the answers, in the unit of `answers`.

    Where the server gives log-probabilities (it is asked once, at construction), an answer's value is its expectation
    over the words, sum(p(word) * value) / sum(p(word)) at the place of the word; else the value of the word that was
    answered. An image without a readable answer, or without an answer, is NaN and counted, as for `unifiedreward`.

    Args:
        base_url: of the server's OpenAI-compatible interface, ending in /v1.
        model: the name that the server serves it by.
        questions: one or several; `{prompt}` stands for the image's prompt, `{column}` for its metadata. By default
            whether the image shows its prompt or, with `references`, whether the edit is what the prompt asks for.
        references: show the reference pictures first, in their order, and the image last; an image without one has no
            score.
        answers: the words that answer, each with its value; `{1: 1, 2: 2, 3: 3, 4: 4, 5: 5}` is a rating.
        after: the answer stands behind the last of these marks, `Final Score:` say; empty: at the beginning.
        log_probabilities: True insists on them, False takes the words alone; None: where the server gives them.
        max_tokens: of one answer.
        timeout: seconds for one answer.
        retries: further attempts after a connection error, time-out, 429 or 5xx, with growing pauses.
        concurrency: questions under way at the same time.
        api_key_variable: environment variable that holds the server's API key, if it wants one.

    Raises:
        UserError: at construction: no server, another model, a question that cannot be filled in, no answer about an
            image.
    """

    name = "vlm_judge"
    needs: ClassVar[Needs] = Needs(packages=("openai",), extra="vlm")

    def __init__(
        self,
        base_url: str,
        model: str,
        questions: str | Sequence[str] | None = None,
        answers: Mapping[Any, float] = YES_OR_NO,
        after: str = "",
        references: bool = False,
        log_probabilities: bool | None = None,
        max_tokens: int = 64,
        timeout: float = 60.0,
        retries: int = 2,
        concurrency: int = 8,
        api_key_variable: str = API_KEY_VARIABLE,
    ) -> None:
        self.takes_references = references
        if questions is None:
            questions = _EDITED if references else _SHOWS
        self._questions = [questions] if isinstance(questions, str) else list(questions)
        self._columns = [_columns(question) for question in self._questions]
        self._values, self._after = _values(answers), after
        words = "|".join(re.escape(word) for word in sorted(self._values, key=len, reverse=True))
        self._answer = re.compile(rf"\W*({words})(?!\w|\.\d)", re.IGNORECASE)
        self._model, self._max_tokens = model, max_tokens
        self._gaps = Gaps(self.name)
        connection = Connection(base_url, model, timeout, retries, concurrency, api_key_variable)
        self._server = VisionServer(self.name, connection, {"max_tokens": max_tokens})
        self._weighted = self._find_log_probabilities(base_url, log_probabilities)

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "OpenAI-compatible server",
            "model": self._model,
            "temperature": 0,
            "questions": self._questions,
            "answers": self._values,
            "after": self._after,
            "max_tokens": self._max_tokens,
            "log_probabilities": self._weighted,
            **({"references": True} if self.takes_references else {}),
        }

    @classmethod
    def takes_for(cls, options: Mapping[str, Any]) -> Takes:
        return Takes(references=bool(options.get("references")))

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32."""
        beside = references or [()] * len(images)
        rows = [
            {**given, "prompt": prompt} for given, prompt in zip(metadata or [{}] * len(images), prompts, strict=True)
        ]
        reasons = [self._lacks(row, own) for row, own in zip(rows, beside, strict=True)]
        asked = [place for place, reason in enumerate(reasons) if reason is None]
        count = len(self._questions)
        results = self._server.results(
            [(*beside[place], images[place]) for place in asked for _ in range(count)],
            [question.format(**rows[place]) for place in asked for question in self._questions],
            self._read,
            **(_LOG_PROBABILITIES if self._weighted else {}),
        )
        found: list[Result] = [reason or "" for reason in reasons]
        for number, place in enumerate(asked):
            found[place] = _mean(results[number * count : (number + 1) * count])
        return self._gaps.close(found)

    def _lacks(self, row: Mapping[str, Any], references: Own) -> str | None:
        """A column that a question asks for and the image's row has not, or the reference picture."""
        column = next((column for columns in self._columns for column in columns if column not in row), None)
        if column is not None:
            return f"prompt without {column!r}"
        return WITHOUT if self.takes_references and not references else None

    def _read(self, answer: Choice) -> Result:
        text = answer.message.content or ""
        tokens = answer.logprobs.content or [] if answer.logprobs else []
        if self._weighted:
            text = "".join(token.token for token in tokens) or text
        before, mark, _ = text.rpartition(self._after) if self._after else ("", "", "")
        found = self._answer.match(text, len(before) + len(mark)) if mark or not self._after else None
        if found is None:
            return _UNPARSABLE
        if not self._weighted:
            return self._values[found[1].lower()]
        end, place = 0, found.start(1)
        for token in tokens:
            end += len(token.token)
            if end > place:
                return self._expected({alternative.token: alternative.logprob for alternative in token.top_logprobs})
        return _WITHOUT

    def _expected(self, log_probabilities: Mapping[str, float]) -> Result:
        """Over the words; a token counts for the one word that it begins."""
        total = weighted = 0.0
        for token, value in log_probabilities.items():
            begun = re.sub(r"\W", "", token).lower()
            words = [word for word in self._values if word == begun] or [
                word for word in self._values if begun and word.startswith(begun)
            ]
            if len(words) == 1:
                total += math.exp(value)
                weighted += math.exp(value) * self._values[words[0]]
        return weighted / total if total else _WITHOUT

    def _find_log_probabilities(self, base_url: str, wanted: bool | None) -> bool:
        """Whether answers have them. A model that takes no images is found out here, too."""
        import openai

        try:
            answer = self._ask_about_grey(plain=wanted is False)
        except Exception as error:  # garbage in place of the protocol fails anywhere in the client
            what = f"http {error.status_code}" if isinstance(error, openai.APIStatusError) else type(error).__name__
            raise UserError(
                f"reward {self.name!r}: {self._model} at {base_url} gave no answer about an image ({what}); it has to "
                "be a vision-language model"
            ) from error
        given = bool(answer.logprobs and answer.logprobs.content)
        if wanted and not given:
            raise UserError(
                f"reward {self.name!r}: log_probabilities = true: {base_url} gives none; leave it out to take the "
                "words alone"
            )
        return given

    def _ask_about_grey(self, *, plain: bool) -> Choice:
        """With log-probabilities, unless told otherwise or refused."""
        import openai

        fields = {column: "a grey square" for columns in self._columns for column in columns}
        question, image = self._questions[0].format(**fields), Image.new("RGB", (64, 64), "grey")
        images = [image] * (2 if self.takes_references else 1)
        if not plain:
            with suppress(openai.BadRequestError, openai.UnprocessableEntityError):
                return self._server.ask(images, question, **_LOG_PROBABILITIES)
        return self._server.ask(images, question)


def _mean(results: Sequence[Result]) -> Result:
    """Of one image's answers; the first failure where there is one."""
    values = [result for result in results if not isinstance(result, str)]
    if len(values) < len(results):
        return next(result for result in results if isinstance(result, str))
    return math.fsum(values) / len(values)


def _columns(question: str) -> list[str]:
    """What stands in braces."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(question) if field is not None]
    except ValueError as error:
        raise UserError(
            f"reward 'vlm_judge': questions: {question!r}: {error}; a brace itself is {{{{ or }}}}"
        ) from error
    for field in fields:
        if not field.isidentifier():
            raise UserError(
                f"reward 'vlm_judge': questions: {{{field}}} in {question!r}: expected {{prompt}} or a metadata column"
            )
    return fields


def _values(answers: Mapping[Any, float]) -> dict[str, float]:
    """By word in lower case. YAML reads yes and no as booleans, and a rating's words as numbers."""
    values: dict[str, float] = {}
    for word, value in answers.items():
        text = {True: "yes", False: "no"}[word] if isinstance(word, bool) else str(word).strip().lower()
        number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not text.isalnum() or not number:
            raise UserError(f"reward 'vlm_judge': answers: {word!r}: {value!r}: expected a word and a finite number")
        values[text] = float(value)
    if len(values) < 2:
        raise UserError(
            f"reward 'vlm_judge': answers = {dict(answers)!r}: expected two words or more, with their values"
        )
    return values
