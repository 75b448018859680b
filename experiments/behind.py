"""`Behind`: one thing at a time that is done on a thread of its own, and waited for."""

import threading
from collections.abc import Callable


class Behind:
    """Does one thing at a time beside what goes on; what it raises, the next `wait` raises."""

    def __init__(self) -> None:
        self._begun: tuple[threading.Thread, Callable[[], None], threading.Event] | None = None
        self._error: Exception | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Begin a thing, once the one before is done. Where that is interrupted, `wait` does it."""
        self.wait()
        claim, done = threading.Lock(), threading.Event()

        def work() -> None:
            if not claim.acquire(blocking=False):
                return
            try:
                call()
            except Exception as error:  # noqa: BLE001  whoever waits has to know, whatever it is
                self._error = error
            except BaseException:
                claim.release()  # whoever waits the next time does it
                raise
            done.set()

        thread = threading.Thread(target=work, name="fedclip-behind")
        self._begun = thread, work, done
        thread.start()

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised; a wait that is interrupted may be done again."""
        if self._begun is not None:
            thread, work, done = self._begun
            if not thread.is_alive():  # it is done with it, or a signal kept it from its start
                work()
            done.wait()
            self._begun = None
        error, self._error = self._error, None
        if error is not None:
            raise error
