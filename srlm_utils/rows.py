"""The shape of every seed row, checked before any model loads."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from srlm_utils.artefacts import is_there, read_jsonl
from srlm_utils.errors import DataError, MissingInputError, cut
from srlm_utils.instructions import check_instructions


class _Row(BaseModel):
    # extra fields are kept: they are the user's notes and travel with the row
    model_config = ConfigDict(extra="allow", strict=True)

    prompt_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, v: str) -> str:
        if not v.strip():
            raise ValueError("is blank")
        return v


class IftRow(_Row):
    """An instruction with the answer to learn."""

    response: str = Field(min_length=1)


class PromptRow(_Row):
    """A prompt of the validation or test set; `reference` is a good answer to read beside others.

    Instructions in it that a program can verify stand in `instruction_id_list` and `kwargs` (`instructions.py`).
    """

    reference: str = ""
    instruction_id_list: list[str] = Field(default_factory=list)
    kwargs: list[dict] = Field(default_factory=list)

    @model_validator(mode="after")
    def _verifiable(self):
        check_instructions(self.instruction_id_list, self.kwargs)
        return self


class Reply(BaseModel):
    """One ranked reply. `score` (0 to 5) and `justification` may be missing: 03_build_eft makes them."""

    model_config = ConfigDict(extra="allow", strict=True)

    reply_id: str = Field(min_length=1)
    text: str = Field(min_length=1)
    rank: int = Field(ge=0)
    score: int | None = Field(None, ge=0, le=5)
    justification: str = ""
    source: str = ""


class RankedRow(_Row):
    """A prompt with two or more replies put in order; rank 0 is best, equal ranks are ties."""

    replies: list[Reply] = Field(min_length=2)

    @model_validator(mode="after")
    def _consistent(self):
        ids = [r.reply_id for r in self.replies]
        if len(set(ids)) < len(ids):
            raise ValueError("reply_id is not unique within the row")
        if min(r.rank for r in self.replies) != 0:
            raise ValueError("no reply has rank 0 (the best)")
        return self


def load_rows(path: Path, shape: type[_Row], limit: int = 0) -> list[dict]:
    """The first `limit` rows of a JSONL file (0: all), each checked against `shape`, ids unique.

    Raises `MissingInputError` for no file and `DataError` with file, row, field, what was found and
    what was expected.
    """
    if not is_there(path):
        raise MissingInputError(
            f"{path}: no such file. Expected JSONL rows of {shape.__name__} ({', '.join(shape.model_fields)})."
        )
    rows = check_rows(read_jsonl(path), shape, str(path))
    return rows[:limit] if limit else rows


def check_rows(rows: list[dict], shape: type[BaseModel], name: str) -> list[dict]:
    """`rows` of the source `name`, each checked as in `load_rows`; the first field of `shape` is the id."""
    id_field = next(iter(shape.model_fields))
    if not rows:
        raise DataError(f"{name}: no rows. Expected at least one {shape.__name__} object a line.")
    seen: set[str] = set()
    for i, row in enumerate(rows, 1):
        id = row.get(id_field, f"no {id_field}")
        # a number alone would not say what it is
        where = f"{name}: row {i} ({id[:80] if isinstance(id, str) else f'{id_field} {cut(id)}'})"
        try:
            shape.model_validate(row)
        except ValidationError as e:
            raise DataError(f"{where}: {first_fault(e)}. Mend this row and run the step again.") from e
        if str(row[id_field]) in seen:
            raise DataError(f"{where}: {id_field} stands twice in this file. Give each row an id of its own.")
        seen.add(str(row[id_field]))
    return rows


def first_fault(e: ValidationError) -> str:
    """Field, what is wrong with it, and what was found there."""
    err = e.errors()[0]
    return f"{'.'.join(map(str, err['loc'])) or 'row'}: {err['msg']}; found {cut(err['input'])}"
