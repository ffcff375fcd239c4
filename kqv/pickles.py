"""
Pickles, read without running any code that is in them.

A pickle is a program for a small stack machine. A few hundred bytes of it can make objects that take for ever
to hash, or more memory than there is. So `require_modest` runs the program first on sizes alone.
"""

import io
import pickle
import pickletools

from kqv.errors import UserError
from kqv.files import read_file

MOST_BYTES = 2**26  # of a pickle, without its tensors

MOST_OPERATIONS = 2_000_000  # a GPT of 1,000 layers has about a million, with its optimizer

MOST_VALUES = 4_000_000  # counted as often as they are reached, since hashing and comparing reach them so

DEEPEST = 100

SIZE, DEPTH, WIDE, USED = range(4)  # of what stands for an object, see `run`
LEAF, LONG = [1, 1, False, True], [1, 1, True, True]

NEW = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")

# Operations that change the object below their arguments, and those whose arguments are, or begin with, keys.
CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
KEYS = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2, "ADDITEMS": 1, "FROZENSET": 1}  # {name: one in so many}


class PlainUnpickler(pickle.Unpickler):
    """
    Admits strings, numbers and plain containers; any class or function that a pickle names is refused, but
    those in `harmless`, {module: names}.
    """

    harmless = {}

    def find_class(self, module, name):
        if name in self.harmless.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path):
    """What a file of plain containers holds. Raises UserError."""
    try:
        return loaded(read_file(path, MOST_BYTES), PlainUnpickler)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(
            f"{path} is refused, since only plain containers are read from a pickle: {error}"
        ) from None


def loaded(content, unpickler, most=MOST_OPERATIONS):
    """The object that a pickle of so many operations at `most` makes. Raises what `require_modest` does."""
    require_modest(io.BytesIO(content), most)
    return unpickler(io.BytesIO(content)).load()


def require_modest(file, most=MOST_OPERATIONS):
    """
    Read one pickle of `file`, to its end. Raises UnpicklingError where it has more operations than `most`, or
    where loading it would take much more time or memory than its size says; ValueError where it is none.
    """
    try:
        run(file, most)
    except (IndexError, KeyError):
        raise pickle.UnpicklingError("it takes from its stack or memory what is not there") from None


def run(file, most):
    """
    Run a pickle's operations on [size, depth, whether it holds a number past 64 bits, whether another object
    holds it] in place of each object. What functions make is not counted: an unpickler admits harmless ones.
    """
    stack, marks, memory = [], [], {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name, before = operation.name, operation.stack_before
        if count > most:
            refuse(f"it has more than {most} operations")
        if name in NEW:
            stack.append([1, 1, False, False])
        elif "GET" in name:
            stack.append(memory[argument])
        elif name == "MEMOIZE" or "PUT" in name:
            place = len(memory) if argument is None else argument
            if not 0 <= place <= count:  # Python makes room for all places below
                refuse(f"it puts an object in place {place} of its memory")
            memory[place] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif not before:
            if operation.stack_after:
                stack.append(leaf(name, argument))
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            has_mark = any(kind.name == "mark" for kind in before)
            first = marks.pop() if has_mark else len(stack) - len(before) + (name in CHANGES)
            if first < (name in CHANGES):
                raise IndexError
            parts = stack[first:]
            del stack[first:]
            if name in CHANGES:
                add(stack[-1], parts, name)
            elif operation.stack_after:
                stack.append([1, 1, False, False])
                add(stack[-1], parts, name)


def leaf(name, argument):
    """What stands for an object without parts, which an operation makes of its argument."""
    is_number = isinstance(argument, int) and name not in ("EXT1", "EXT2", "EXT4")
    return LONG if is_number and not -(2**63) <= argument < 2**63 else LEAF


def add(whole, parts, name):
    """Add what stands for parts to what stands for their whole. Raises UnpicklingError past a limit."""
    if name in KEYS and any(part[WIDE] for part in parts[:: KEYS[name]]):
        refuse("it has a number of more than 64 bits in a key")  # such numbers can all have one hash
    if whole[USED]:  # before anything is added: what stands for a leaf is shared by all
        refuse("it changes an object that another one holds already")
    for part in parts:
        whole[SIZE] += part[SIZE]
        whole[DEPTH] = max(whole[DEPTH], 1 + part[DEPTH])
        whole[WIDE] |= part[WIDE]
        part[USED] = True
    if whole[USED]:
        refuse("it holds itself")
    if whole[SIZE] > MOST_VALUES:
        refuse(f"it holds more than {MOST_VALUES} values, each counted as often as it is reached")
    if whole[DEPTH] > DEEPEST:
        refuse(f"it is nested more than {DEEPEST} deep")


def refuse(reason):
    raise pickle.UnpicklingError(reason)
