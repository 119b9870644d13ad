"""One exception tree. Every message is one line that names the field, its value, the rule and the remedy.

RayscaleError            exit 1, HTTP 500   something of ours is wrong
├── UserError            exit 2, HTTP 400   the caller can mend it: one line, no traceback
│   ├── ConfigError      exit 2, HTTP 400   a setting, a flag, a recipe
│   ├── ImageError       exit 2, HTTP 422   bytes that are no usable picture
│   ├── MediaTypeError   exit 2, HTTP 415   a format we do not read or write
│   ├── TooLargeError    exit 2, HTTP 413   a picture beyond the limits
│   ├── MissingError     exit 2, HTTP 404   no such file, bucket, model, version
│   ├── ConflictError    exit 2, HTTP 409   it exists already, or another one won
│   └── ResourceError    exit 2, HTTP 507   CPU, memory, disk or a port that is not there
├── GateError            exit 3, HTTP 409   the gate held a promotion back
├── IntegrityError       exit 1, HTTP 500   bytes that are not what their digest says
├── ParityError          exit 1, HTTP 500   the exported model does not say what the trained one says
├── DivergedError        exit 1, HTTP 500   a loss became NaN or infinite
└── UnavailableError     exit 1, HTTP 503   a service we need does not answer; try again
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RayscaleError(Exception):
    """Base of all errors of the platform: `field=value: rule; remedy`, in one line."""

    exit_code = 1
    http_status = 500

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(field, value, rule, remedy)
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy

    def __str__(self) -> str:
        shown = str(self.value)
        shown = shown if len(shown) <= 200 else shown[:197] + "..."
        return " ".join(f"{self.field}={shown}: {self.rule}; {self.remedy}".split())


class UserError(RayscaleError):
    """The caller can mend it."""

    exit_code = 2
    http_status = 400


class ConfigError(UserError):
    """A setting, a flag or a recipe is wrong."""


class ImageError(UserError):
    """These bytes are no usable picture."""

    http_status = 422


class MediaTypeError(UserError):
    """A format we do not read or write."""

    http_status = 415


class TooLargeError(UserError):
    """A picture beyond the limits."""

    http_status = 413


class MissingError(UserError):
    """No such file, bucket, model or version."""

    http_status = 404


class ConflictError(UserError):
    """It exists already, or another one won."""

    http_status = 409


class ResourceError(UserError):
    """CPU, memory, disk or a port that is not there."""

    http_status = 507


class GateError(RayscaleError):
    """The gate held a promotion back."""

    exit_code = 3
    http_status = 409


class IntegrityError(RayscaleError):
    """Bytes that are not what their digest says."""


class DamageError(IntegrityError):
    """More photos are damaged than the run may do without."""


class ParityError(RayscaleError):
    """The exported model does not say what the trained one says."""


class DivergedError(RayscaleError):
    """A loss became NaN or infinite."""


class UnavailableError(RayscaleError):
    """A service we need does not answer."""

    http_status = 503


def nearest(wrong: str, known: Iterable[str]) -> str:
    """A remedy that suggests: "did you mean 'x'?", or the choices where nothing is near."""
    choices = sorted(known)
    close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(choices) or '(none)'}"
