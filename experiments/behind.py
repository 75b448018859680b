"""`Behind`: one thing at a time that is done on a thread of its own, and waited for."""

import threading
from collections.abc import Callable


class Behind:
    """Does one thing at a time beside what goes on; what it raises, the next `wait` raises."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Begin a thing, once the one before is done."""
        self.wait()

        def work() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001  whoever waits has to know, whatever it is
                self._error = error

        self._thread = threading.Thread(target=work, name="fedclip-behind")
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised; a wait that is interrupted may be done again."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
