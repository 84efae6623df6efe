import os
import signal
import threading

import pytest

from jtl.train.interrupt import between


def hit():
    os.kill(os.getpid(), signal.SIGINT)


def items(at, twice=False):
    for number in range(4):
        if number == at:
            hit()
            if twice:
                hit()
        yield number


@pytest.mark.parametrize("at", [0, 2, 3])
def test_the_item_that_was_being_made_is_handed_over_first(at):
    got = []
    with pytest.raises(KeyboardInterrupt):
        for item in between(items(at)):
            got.append(item)
    assert got == list(range(at + 1))


def test_a_second_one_is_raised_at_once():
    got = []
    with pytest.raises(KeyboardInterrupt):
        for item in between(items(2, twice=True)):
            got.append(item)
    assert got == [0, 1]


def test_close_does_not_swallow_it():
    stream = between(items(1))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        stream.close()


def test_without_one_items_pass_and_the_handler_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    assert list(between(items(None))) == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_pass_and_the_handler_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        list(between(1 // x for x in (1, 0)))
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    got = []
    thread = threading.Thread(target=lambda: got.extend(between(range(3))))
    thread.start()
    thread.join()
    assert got == [0, 1, 2]


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert list(between(items(1))) == [0, 1, 2, 3]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
