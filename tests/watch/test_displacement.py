"""The alarm about chosen completions that become less likely."""

from __future__ import annotations

from klimb.watch.displacement import Displacement


def alarms(values: list[float], reference: bool) -> list[int]:
    """Updates (from 1) after which something was said."""
    watch = Displacement()
    return [
        step for step, value in enumerate(values, 1)
        if watch.look(-100 + value, value if reference else None)
    ]  # fmt: skip


def test_a_steady_chosen_says_nothing() -> None:
    assert alarms([0.0] * 50, True) == alarms([0.0] * 50, False) == []
    assert alarms([0.3 * (-1) ** i for i in range(50)], True) == []
    assert alarms([i / 10 for i in range(50)], True) == []


def test_a_fall_is_said_once_and_again_when_it_is_twice_as_deep() -> None:
    said = alarms([-0.2 * i for i in range(60)], True)  # to −12 nats, the running mean about two behind
    assert said[0] >= 10
    assert len(said) == 4  # below −1, −2, −4 and −8
    assert alarms([-2.0] * 100, True) == [10]


def test_without_a_reference_the_first_updates_are_the_start() -> None:
    assert alarms([-0.1 * i for i in range(60)], False) == []  # six nats of a hundred
    said = alarms([0.0] * 10 + [-30.0] * 40, False)
    assert said[0] == 14  # the running mean is past a tenth of the start
    assert len(said) == 2


def test_its_state_goes_on_where_it_stopped() -> None:
    whole, first = Displacement(), Displacement()
    for step in range(12):
        whole.look(-100, -0.3 * step)
        first.look(-100, -0.3 * step)
    again = Displacement(**first.state())
    assert [again.look(-100, -0.3 * s) for s in range(12, 40)] == [whole.look(-100, -0.3 * s) for s in range(12, 40)]
    assert again == whole
