"""A small world of problems, checkpoints and data in which every method here can be tried."""

from pathlib import Path

NAMES = ("base", "teacher_math", "teacher_code", "large_base", "large_teacher", "open_book")


def path(name: str) -> str:
    """Absolute directory of the shipped checkpoint `name`, in Hugging Face format.

    ValueError where there is no such name. Whether the files are there is for Config.problems().
    """
    if name not in NAMES:
        raise ValueError(f"there is no microworld checkpoint {name!r}; there are {list(NAMES)}")
    return str(Path(__file__).resolve().parent / "checkpoints" / name)
