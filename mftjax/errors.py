"""Errors that tell a user what to change."""

import difflib
from collections.abc import Iterable, Iterator


class MftError(Exception):
  """Base of all errors raised by mftjax on purpose."""


class InputError(MftError, ValueError):
  """The user's input is wrong; the command line prints the message and exits with 2."""


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
  """The error, what caused it, what caused that, and so on."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
  """An error for a name that does not exist, with the nearest one that does.

  Args:
    what: what kind of name it is, and where it stands, e.g. `"method in config.meta.method"`.
    name: what was given.
    known: the names that exist.

  Returns:
    The error, to be raised by the caller.
  """
  names = sorted(known)
  near = difflib.get_close_matches(name, names, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return InputError(f"Unknown {what}: {name!r}.{hint} Known: {', '.join(names)}.")
