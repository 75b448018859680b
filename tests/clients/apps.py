"""Client apps for the tests of the grid, in a module of their own so that workers can import them."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.lanes import MessageLost

app = ClientApp()


def metrics(message: Message, **values: int | float | list[int]) -> Message:
    """Reply with a metric record."""
    return Message(RecordDict({"metrics": MetricRecord(values)}), reply_to=message)


@app.train()
def step(message: Message, context: Context) -> Message:
    """Move each weight halfway to the node's partition id."""
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    target = float(context.node_config["partition-id"])
    moved = ArrayRecord({name: Array((array.numpy() + target) / 2) for name, array in arrays.items()})
    return Message(RecordDict({"arrays": moved, "metrics": MetricRecord({"loss": target, "num-examples": 1})}), reply_to=message)


@app.evaluate()
def measure(message: Message, context: Context) -> Message:
    """Report the mean weight."""
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return metrics(message, loss=float(np.mean(arrays["w"].numpy())), **{"num-examples": 1})


@app.query("count")
def count(message: Message, context: Context) -> Message:
    """Count this node's messages in its state, unless it is told to keep none."""
    seen = context.state.get("seen")
    times = int(seen["times"]) + 1 if isinstance(seen, MetricRecord) else 1  # type: ignore[arg-type]
    if context.node_config["partition-id"] != context.run_config.get("forgetful"):
        array = Array(np.arange(3))
        array.object_id  # noqa: B018  (an array whose id was computed holds memory views)
        context.state["seen"], context.state["arrays"] = MetricRecord({"times": times}), ArrayRecord({"w": array})
    return metrics(message, times=times, pid=os.getpid())


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise in partition 1, exit in partition 2, and reply otherwise."""
    context.state["spoilt"] = MetricRecord({"by": 1})
    if context.node_config["partition-id"] == 1:
        raise ZeroDivisionError("a message for the driver")
    if context.node_config["partition-id"] == 2:
        sys.exit(3)
    return metrics(message, fine=1)


@app.query("none")
def none(message: Message, context: Context) -> Message:
    """Return no reply at all."""
    return None  # type: ignore[return-value]


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    """Sleep as long as the message says."""
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(config["seconds"], float)
    time.sleep(config["seconds"])
    return metrics(message, slept=config["seconds"])


@app.query("die")
def die(message: Message, context: Context) -> Message:
    """Kill this worker in the middle of the message, as often as the message says; a file counts."""
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(config["deaths"], int)
    tries = Path(str(config["folder"])) / str(context.node_id)
    with tries.open("a") as file:
        file.write(".")
    if len(tries.read_text()) <= config["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics(message, tries=len(tries.read_text()), pid=os.getpid())


@app.query("give_back")
def give_back(message: Message, context: Context) -> Message:
    """Lose the cluster the first time; a file counts."""
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    tried = Path(str(config["folder"])) / "given-back"
    if tried.exists():
        return metrics(message, fine=1)
    tried.touch()
    raise MessageLost("Nobody answers.")


@app.query("hang")
def hang(message: Message, context: Context) -> Message:
    """Never answer, as often as the message says; a file counts."""
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(config["times"], int)
    tries = Path(str(config["folder"])) / f"hung-{config['times']}"
    with tries.open("a") as file:
        file.write(".")
    if len(tries.read_text()) <= config["times"]:
        time.sleep(1e6)
    return metrics(message, tries=len(tries.read_text()))


@app.query("large")
def large(message: Message, context: Context) -> Message:
    """Reply with as many bytes as the message says."""
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(config["bytes"], int)
    array = Array(dtype="uint8", shape=(config["bytes"],), stype="bytes", data=bytes(config["bytes"]))
    return Message(RecordDict({"arrays": ArrayRecord({"x": array})}), reply_to=message)


@app.query("look")
def look(message: Message, context: Context) -> Message:
    """Report what the process is like."""
    quiet = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    same = message.metadata.dst_node_id == context.node_id
    made = Message(RecordDict(), dst_node_id=1, message_type="query").metadata
    return metrics(
        message,
        pid=os.getpid(),
        threads=int(os.environ["OMP_NUM_THREADS"]),
        quiet=int(quiet),
        same=int(same),
        partitions=int(context.node_config["num-partitions"]),
        lr=float(context.run_config["lr"]),
        made_by=[made.run_id, made.src_node_id],
    )
