"""Prompts to token ids for CLIP and BERT, from one published tokenizer file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ds.rewards.checkpoints import one_line
from opd_ds.rewards.weights import WrongWeightsError


class Tokens:
    """Ids of a fixed length: start and end are added, long prompts cut, short ones padded with id 0."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=0)
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, file: Path, length: int) -> Tokens:
        """From a tokenizer.json.

        Raises:
            WrongWeightsError: the file is not one.
        """
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_file(str(file)), length)
        except Exception as error:  # tokenizers raises plain Exception
            raise WrongWeightsError(f"{file} is no tokenizer.json: {one_line(error)}") from error

    @classmethod
    def from_bert_vocabulary(cls, file: Path, length: int) -> Tokens:
        """Uncased BERT from its vocab.txt.

        Raises:
            WrongWeightsError: the file is not one.
        """
        from tokenizers.implementations import BertWordPieceTokenizer

        try:
            return cls(BertWordPieceTokenizer(str(file), lowercase=True), length)
        except Exception as error:  # tokenizers raises plain Exception, and TypeError without [SEP] and [CLS]
            raise WrongWeightsError(f"{file} is no vocabulary of BERT: {one_line(error)}") from error

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (1 where there is a token of the prompt), [B, length] int64 each."""
        found = self._tokenizer.encode_batch(list(prompts))
        return torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found])
