"""Reads a pickle as data: nothing that it names is imported, and nothing that it calls is called.

Python's reader calls what the file says, and so does torch.load with `weights_only=True`, if only
functions of a list, of which `bytearray` fills the memory with a few bytes. The values here take no
more than a constant for each byte of the file.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple


class Named(NamedTuple):
    """Something that a pickle refers to by its module and name, such as `torch FloatStorage`."""

    name: str


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_WITH_MARK = ("TUPLE", "APPENDS", "SETITEMS")


def read_pickle(data: bytes, made: Callable[[Any, Any], Any]) -> Any:
    """The value of a pickle of protocol 2, which torch.save writes.

    Items of other things than lists and dicts are left out, and so are items with keys that are no
    strings, and the attributes that a pickle sets.

    Args:
        data: the pickle.
        made: gives the value that stands for a call, from what is called, mostly a `Named`, and
            the arguments. A persistent id is a call of None.

    Raises:
        ValueError, LookupError: it is no such pickle.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for op, value, _ in pickletools.genops(data):
        name, items = op.name, []
        if name in _WITH_MARK:
            items, stack = stack, marked.pop()
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(value)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name == "TUPLE":
            stack.append(tuple(items))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = items or [stack.pop()]
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = items or [stack.pop(-2), stack.pop()]
            if isinstance(stack[-1], dict):
                pairs = zip(items[::2], items[1::2], strict=True)
                # Whole numbers can be chosen to collide in a dict, which then takes quadratic time.
                stack[-1].update({key: item for key, item in pairs if isinstance(key, str)})
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "GLOBAL":
            stack.append(Named(str(value)))
        elif name == "BINPERSID":
            stack.append(made(None, stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(made(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"its pickle has {name}, which torch.save does not write")
    raise ValueError("its pickle has no end")
