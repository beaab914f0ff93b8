"""How CPU memory is served while a run measures. It decides more than most kernels do, so every run has one setting, which
holds for ours and for every peer, and its record names it. docs/memory.md explains what happens in each.
"""

import os
import sys
from typing import Any

KEPT, HUGE, DEFAULT = "kept", "huge pages", "default"
CHOICES = {"kept": KEPT, "huge": HUGE, "default": DEFAULT}  # the words of the command line
WORDS = {KEPT: "freed memory stays in the process, by `memory.keep_freed_memory()`",
         HUGE: "large tensors lie in huge pages, by `THP_MEM_ALLOC_ENABLE=1`",
         DEFAULT: "the allocator as the system has it"}
# The settings in which gates are judged: where fresh outputs cost page faults, these are compared and not the kernels. On a GPU
# ("") there is no such setting.
GATED = (KEPT, HUGE, "")
ORDER = (KEPT, HUGE, DEFAULT, "")


def of(info: dict[str, Any]) -> str:
    """The setting of a recorded run, from its `machine_info`: "" on a GPU. Records from before there were three settings have
    only the allocator's description."""
    if info["device_type"] != "cpu":
        return ""
    if "memory" in info:
        return info["memory"]
    return HUGE if "THP_MEM_ALLOC_ENABLE=1" in info.get("allocator", "") else DEFAULT


def chosen(names: list[str] | None, device_type: str) -> list[str]:
    """The settings to measure: the named ones, or all that this system offers."""
    if device_type != "cpu":
        return [""]
    if names:
        return [CHOICES[name] for name in dict.fromkeys(names)]
    return [KEPT, HUGE, DEFAULT] if sys.platform == "linux" else [DEFAULT]


def without(argv: list[str], *options: str) -> list[str]:
    """The arguments without some options that take a value."""
    left, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            left.append(word)
    return left


def restart(argv: list[str], settings: list[str], **more: str) -> None:
    """Replace this process by `python -m benchmarks ARGV` in the first of the settings.

    torch reads THP_MEM_ALLOC_ENABLE when it allocates for the first time, and an allocator that has once been told to keep
    memory is not a default one again. For who started it the process stays the same: it can be waited for, stopped and killed.
    """
    words = {setting: word for word, setting in CHOICES.items()}
    options = [part for setting in settings for part in ("--memory", words[setting])]
    more["entered"] = words[settings[0]]
    options += [part for name, value in more.items() for part in (f"--{name}", value)]
    kept = without(argv, "--memory", *(f"--{name}" for name in more))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *kept, *options],
              os.environ | {"THP_MEM_ALLOC_ENABLE": "1" if settings[0] == HUGE else "0"})
