"""How often something is due, in any unit."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from trainer.settings.section import Frozen


class Period(Frozen):
    """How often something is due: `1000 steps`, `2 epochs`, `30 min`, or `never`."""

    count: float
    unit: Literal["steps", "samples", "epochs", "min", "never"]

    def __str__(self) -> str:
        if self.unit == "never":
            return "never"
        count = int(self.count) if float(self.count).is_integer() else self.count
        return f"{count} {self.unit}"


_PERIOD = r"(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*(steps?|samples?|epochs?|min)"


def _read_period(value: Any) -> Any:
    if isinstance(value, str):
        if value.strip() == "never":
            return Period.model_construct(count=math.inf, unit="never")
        match = re.fullmatch(_PERIOD, value.strip())
        if not match or not 0 < float(match[1]) < math.inf:
            raise ValueError(f"{value!r} is no period; write '1000 steps', '30 min' or 'never'")
        unit = match[2] if match[2] == "min" or match[2].endswith("s") else match[2] + "s"
        return Period.model_construct(count=float(match[1]), unit=unit)
    if isinstance(value, dict):
        return Period.model_construct(**value)
    return value


Every = Annotated[Period, BeforeValidator(_read_period)]
NEVER = Period.model_construct(count=math.inf, unit="never")
