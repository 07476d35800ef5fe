"""What may be posted (grades: `grades`): types are checked, nothing is made into a string."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from duplex.errors import RequestError

BodyT = TypeVar("BodyT", bound=BaseModel)


class Body(BaseModel):
    """No other keys than those that are named."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptBody(Body):
    text_prompt: StrictStr = ""


class LinkBody(Body):
    name: StrictStr
    hours: StrictInt | StrictFloat = 24
    text_prompt: StrictStr = ""
    prompt_id: StrictStr = ""
    voice_prompt: StrictStr = ""
    greeting: StrictStr = ""


def read_body(kind: type[BodyT], content: dict[str, Any]) -> BodyT:
    """
    Raises:
        RequestError: it is another thing, or holds half a character.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
        return kind.model_validate(content)
    except UnicodeEncodeError:
        raise RequestError("text must be whole characters, found half of one") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
        raise RequestError("; ".join(faults[:5])) from None
