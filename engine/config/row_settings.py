"""Settings about rows that training, evaluating and looking at data share."""

from typing import Annotated

from pydantic import BeforeValidator

from engine.config.choices import Thinking
from engine.config.data_names import ColumnMap
from engine.config.settings import Settings, setting
from engine.config.spelling import BAD_LINES, BAD_LINES_WORDS, number_of_bytes

MAX_ROW_BYTES = 16 * 2**20


class BadRowSettings(Settings):
    """What a bad row is, and what is done with it."""

    bad_lines: str = setting(
        "fail",
        "Data",
        "a row that cannot be used: fail, or skip, or skip:5% (no more than that share)",
        pattern=BAD_LINES,
        expected=BAD_LINES_WORDS,
    )
    max_row_bytes: Annotated[int, BeforeValidator(number_of_bytes)] = setting(
        MAX_ROW_BYTES,
        "Data",
        "a longer row, such as one of 16MiB, is a bad one, and so is one with more than an object, "
        "list or key for each 32 of these bytes",
        ge=1024,
        le=2**30,
    )


class ChoiceSettings(BadRowSettings):
    """Which rows of a source are read, and in which columns."""

    query: str | None = setting(
        None, "Data", "SQL query whose rows are read, where --data is the URL of a database"
    )
    map: ColumnMap = setting(
        {}, "Data", "columns by the fields they are: prompt=question,response=answer"
    )
    min_rating: int | None = setting(None, "Data", "leave out rows rated lower", ge=1, le=5)


class RowSettings(ChoiceSettings):
    """Which rows of a source are read, and what of them is trained."""

    train_on: str = setting(
        "all",
        "Data",
        "which answers of a conversation are trained: all, last, or a text, such as "
        "'### Response:', after which everything up to the end of the turn is",
        min_length=1,
    )
    thinking: Thinking = setting(
        "auto",
        "Data",
        "reasoning: as the template has it (auto), always shown (keep), removed (strip), or "
        "removed with an empty block in its stead (empty)",
    )
