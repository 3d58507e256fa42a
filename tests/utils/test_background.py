import threading

import pytest

from ratioctl.utils.background import Background


def test_work_runs_beside_the_caller_and_its_result_is_waited_for():
    caller = threading.current_thread()
    go_on = threading.Event()

    def work() -> threading.Thread:
        assert go_on.wait(60)
        return threading.current_thread()

    begun = Background(work)
    go_on.set()  # only a caller that is not blocked gets here
    worker = begun.result()
    assert worker is not caller
    assert worker.daemon
    assert begun.result() is worker


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_errors_of_the_work_are_raised_where_the_result_is_taken(error: BaseException):
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Background(work).result()
    assert caught.value is error
