"""Enums of the op schemas. Torch schemas carry them as plain ints."""

from __future__ import annotations

from enum import IntEnum


class Statistic(IntEnum):
    """What `score_keys` computes over the voting rows, per key and head."""

    SUM = 0
    MAX = 1
    SUM_OF_SQUARES = 2


class DiversityReference(IntEnum):
    """The mean over keys that `mix_scores` scales the diversity to."""

    ATTENTION = 0
    IMPORTANCE = 1


class HeadReduction(IntEnum):
    """How the scores of the query heads become the scores of one list."""

    NONE = 0
    GROUP_MEAN = 1
    GROUP_MAX = 2
    ALL_MEAN = 3


class Metric(IntEnum):
    """How alike two tokens are to `match_tokens`."""

    COSINE = 0
    DOT = 1
