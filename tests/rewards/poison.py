"""Reward functions that misbehave where a completion is "bad", and score its length elsewhere."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time


def lengths(completions):
    return [float(len(text)) for text in completions]


def fine(completions):
    return lengths(completions)


async def fine_async(completions):
    return lengths(completions)


def raises(completions):
    if "bad" in completions:
        raise ValueError("cannot judge this")
    return lengths(completions)


def says_none(completions):
    return [None if text == "bad" else float(len(text)) for text in completions]


def says(value):
    return lambda completions: [value if text == "bad" else float(len(text)) for text in completions]


nan = says(float("nan"))
infinity = says(float("inf"))
minus_infinity = says(float("-inf"))
huge_int = says(10**400)
string = says("1.0")
a_list = says([1.0])


def a_bool(completions):
    return [text != "bad" for text in completions]


def nothing(completions):
    pass


def empty(completions):
    return []


def only_one(completions):
    return [1.0]


def one_short(completions):
    return lengths(completions)[:-1]


def one_more(completions):
    return [*lengths(completions), 1.0]


def a_number(completions):
    return 1.0


def a_string(completions):
    return "1" * len(completions)


def mutates(prompts, completions, answer):
    scores = lengths(completions)
    prompts.clear()
    completions[:] = ["changed"]
    for entry in answer:
        entry.append("changed")
    return scores


def sleeps(completions):
    if "bad" in completions:
        time.sleep(60)
    return lengths(completions)


def stubborn(completions):
    if "bad" in completions:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    return lengths(completions)


def prints_a_lot(completions):
    if "bad" in completions:
        for _ in range(100):
            print("x" * 1_000_000)
    return lengths(completions)


def prints_then_dies(completions):
    if "bad" in completions:
        print("the last words")
        os._exit(7)
    return lengths(completions)


def exits(completions):
    if "bad" in completions:
        sys.exit(3)
    return lengths(completions)


def exits_at_once(completions):
    if "bad" in completions:
        os._exit(3)
    return lengths(completions)


def segfaults(completions):
    if "bad" in completions:
        ctypes.string_at(0)
    return lengths(completions)


def kills_its_group(completions):
    if "bad" in completions:
        os.killpg(0, signal.SIGKILL)
    return lengths(completions)


def terminates_its_group(completions):
    if "bad" in completions:
        os.killpg(0, signal.SIGTERM)
        time.sleep(60)
    return lengths(completions)


def closes_everything(completions):
    if "bad" in completions:
        os.closerange(0, 1000)
    return lengths(completions)


def writes_everywhere(completions):
    if "bad" in completions:
        for end in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(end, b"\xff\xff\xff\xff garbage")
    return lengths(completions)


def forks_and_both_answer(completions):
    if "bad" in completions:
        os.fork()
    return lengths(completions)


def forks_and_stays(completions):
    if "bad" in completions and os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    return lengths(completions)


def starts_a_daemon(completions):
    if "bad" in completions:
        command = [sys.executable, "-c", "import time; time.sleep(600)", os.environ["DAEMON_MARK"]]
        subprocess.Popen(command, start_new_session=True, env={}, stdout=subprocess.DEVNULL)
    return lengths(completions)


def daemonises_and_dies(completions):
    starts_a_daemon(completions)
    return exits_at_once(completions)


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises_unprintable(completions):
    if "bad" in completions:
        raise Unprintable
    return lengths(completions)


def raises_surrogate(completions):
    if "bad" in completions:
        raise ValueError("half a pair: \ud800")
    return lengths(completions)
